"""Float grids of weights: rounding, codes and scales, compared with naive twins that try every number."""

import math
from itertools import pairwise

import pytest
import torch

from exporter.numerics.activation_rounding import round_rows
from exporter.numerics.float_grids import (
    FLOAT4,
    FLOAT8,
    FP4_VALUES,
    FP8_MAX,
    GRIDS,
    common_factor,
    four_digits,
    power_of_two,
)
from exporter.numerics.quantized import Scheme, dequantize, quantize
from exporter.numerics.ranges import Range, fit_scale

MX4, MX8, NV4 = Scheme(4, 32, number="mxfp4"), Scheme(8, 32, number="mxfp8"), Scheme(4, 16, number="nvfp4")
BLOCK = Scheme(8, "block", number="fp8")


def nearest(value: float, numbers: list[float]) -> float:
    """The nearest number; of two, the one at an even place, whose fraction ends in 0."""
    size = abs(value)
    return math.copysign(min(numbers, key=lambda each: (abs(each - size), numbers.index(each) % 2)), value)


@pytest.mark.parametrize("name", GRIDS)
def test_numbers_are_rounded_to_the_nearest_and_codes_give_them_back(name: str) -> None:
    grid = GRIDS[name]
    numbers = [*FP4_VALUES] if grid is FLOAT4 else FLOAT8.decode(torch.arange(127, dtype=torch.uint8)).tolist()
    midpoints = [(low + high) / 2 for low, high in pairwise(numbers)]
    drawn = (torch.randn(300, generator=torch.Generator().manual_seed(0)) * grid.largest / 3).tolist()
    values = torch.tensor([*numbers, *midpoints, *(-value for value in midpoints), *drawn, 1e6, -1e6])
    rounded = grid.round(values)
    assert rounded.tolist() == [nearest(value, numbers) for value in values.tolist()]
    assert torch.equal(grid.decode(grid.encode(rounded)), rounded)
    assert (grid.largest, grid.least) == (max(numbers), min(number for number in numbers if number))


def test_powers_of_two_and_four_binary_digits_are_the_next_numbers() -> None:
    scales = torch.rand(500, generator=torch.Generator().manual_seed(1)) * 4 + 2.0**-60
    scales = torch.cat([scales, 2.0 ** torch.arange(-20, 20)])
    assert power_of_two(scales).tolist() == [2.0 ** math.ceil(math.log2(value)) for value in scales.tolist()]
    assert power_of_two(torch.zeros(1)) > 0
    digits = four_digits(scales)
    assert ((digits - scales).abs() <= scales / 16).all()
    assert all((math.frexp(value)[0] * 16).is_integer() for value in digits.tolist())


@pytest.mark.parametrize("largest", [1e-9, 0.01, 0.07, 1.0, 448.0, 480.0])
def test_the_common_factor_makes_the_largest_scale_a_large_float8_number(largest: float) -> None:
    factor = common_factor(largest)
    assert FP8_MAX / 2 < largest * factor <= FP8_MAX
    assert math.frexp(factor)[0] == 0.5
    assert common_factor(0.0) == 1


@pytest.mark.parametrize("range_", ["minmax", "mse"])
@pytest.mark.parametrize("scheme", [MX4, MX8, NV4, BLOCK], ids=Scheme.label)
def test_scales_are_numbers_of_their_format(scheme: Scheme, range_: Range) -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(2)) * torch.logspace(-4, 0, 256)
    scale, zero = fit_scale(weight, scheme, torch.bfloat16, range_)
    assert not zero.any()
    if scheme is NV4:
        stored = scale * common_factor(float(scale.max()))
        assert torch.equal(stored.to(torch.float8_e4m3fn).float(), stored)
    else:
        assert torch.equal(power_of_two(scale), scale.float())
    if scheme is BLOCK:
        assert scale.shape == (256, 2)
        assert all(len(rows.unique(dim=0)) == 1 for rows in scale.split(128))
    again = quantize(dequantize(quantize(weight, scale, zero, scheme), scale, zero, scheme), scale, zero, scheme)
    assert torch.equal(again, quantize(weight, scale, zero, scheme))


@pytest.mark.parametrize("scheme", [MX4, NV4], ids=Scheme.label)
def test_a_searched_range_is_better_than_the_full_one(scheme: Scheme) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))

    def error(range_: Range) -> float:
        scale, zero = fit_scale(weight, scheme, torch.bfloat16, range_)
        return float((dequantize(quantize(weight, scale, zero, scheme), scale, zero, scheme) - weight).square().sum())

    assert error("mse") < 0.95 * error("minmax")


def test_inputs_in_groups_have_a_scale_for_128_of_a_token() -> None:
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(4))
    x[:, :128] *= 1000
    by_hand = torch.cat([round_rows(x[:, :128], "fp8"), round_rows(x[:, 128:], "fp8")], dim=1)
    assert torch.equal(round_rows(x, "fp8-groups"), by_hand)
    assert not torch.equal(round_rows(x, "fp8"), by_hand)
