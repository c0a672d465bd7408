"""Scales and zero points: exact values where arithmetic gives them, valid values at the limits of the stored dtype."""

import itertools
from typing import Any

import pytest
import torch

from exporter.methods import rtn
from exporter.numerics import ranges
from exporter.numerics.quantized import Scheme, dequantize, quantize
from exporter.numerics.ranges import fit_scale, least_scale

SCHEMES = [
    Scheme(bits, group, symmetric)
    for bits, group, symmetric in itertools.product((2, 3, 4, 8), (16, "row", "tensor"), (True, False))
]


def weights(columns: int = 50, seed: int = 0) -> torch.Tensor:
    """Random `[6, columns]` with rows of different size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, columns, generator=generator) * torch.tensor([[1.0], [0.1], [3.0], [1e-3], [1.0], [20.0]])


def error(weight: torch.Tensor, scheme: Scheme, range_: str) -> torch.Tensor:
    """Squared error of each row."""
    linear, _ = rtn.quantize_linear(weight, None, scheme, rtn.Options(range=range_), torch.float16)
    return (linear.dequantize() - weight).square().sum(1)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label())
def test_error_is_within_a_step_and_searching_never_hurts(scheme: Scheme) -> None:
    weight = weights()
    linear, _ = rtn.quantize_linear(weight, None, scheme, rtn.Options(), torch.float16)
    steps = linear.scale.float().repeat_interleave(scheme.columns_per_group(50), 1)[:, :50]
    bound = 1.01 * steps / 2 if scheme.bits < 8 else 1.2 * steps  # rounding a scale to 11 bits moves the last codes
    assert ((linear.dequantize() - weight).abs() <= bound + 1e-9).all()
    searched, plain = error(weight, scheme, "mse"), error(weight, scheme, "minmax")
    assert searched.sum() <= plain.sum() * 1.0001
    if scheme.bits <= 3 and scheme.group_size != "tensor":
        assert searched.sum() < plain.sum()


def test_search_equals_trying_every_range_by_hand() -> None:
    weight, scheme = weights(16), Scheme(3, 16)
    scale, _ = fit_scale(weight, scheme, torch.float16, "mse")
    for row in range(6):
        candidates = [(1 - 0.8 * step / 40) * 2 * float(weight[row].abs().max()) / 7 for step in range(40)]
        errors = []
        for candidate in candidates:
            s = torch.tensor([[candidate]]).half()
            codes = torch.round(weight[row] / s.float()).clamp(-4, 3)
            errors.append((float((codes * s.float() - weight[row]).square().sum()), float(s)))
        assert float(scale[row, 0]) == pytest.approx(min(errors)[1], rel=2e-3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_weighted_search_equals_trying_every_range_by_hand(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "PIECE", 100)  # rows in several pieces
    weight, scheme = weights(40), Scheme(3, 16, symmetric)  # the last group is short
    importance = torch.rand(40, generator=torch.Generator().manual_seed(1)) ** 3
    scale, zero = fit_scale(weight, scheme, torch.float16, "mse", importance)
    for row, group in itertools.product(range(6), range(3)):
        group_columns = slice(group * 16, min(40, group * 16 + 16))
        own, counts = weight[row, group_columns].double(), importance[group_columns].double()
        low, high = min(float(own.min()), 0), max(float(own.max()), 0)
        errors = []
        for part in (1 - 0.8 * step / 40 for step in range(40)):
            size = 2 * max(-low, high) / 7 if symmetric else (high - low) / 7
            s = torch.tensor(size * part).half().double()
            z = 4 if symmetric else round(-low * part / float(s))
            off = ((own / s).round() + z).clamp(0, 7).sub(z) * s - own
            errors.append((float((counts * off.abs() ** 2.5).sum()), float(s), z))
        assert (float(scale[row, group]), int(zero[row, group])) == pytest.approx(min(errors)[1:], rel=2e-3)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scheme", [Scheme(4, 128), Scheme(3, 48, False)], ids=Scheme.label)
def test_kernel_equals_the_plain_search(scheme: Scheme, weighted: bool) -> None:
    weight = torch.randn(70, 200, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(200) ** 3 if weighted else None
    plain = fit_scale(weight, scheme, torch.float16, "mse", importance)
    device = torch.accelerator.current_accelerator()
    fast = fit_scale(
        weight.to(device), scheme, torch.float16, "mse", None if importance is None else importance.to(device)
    )
    for expected, other in zip(plain, fast, strict=True):
        assert int((expected != other.cpu()).sum()) <= 2  # sums in another order may break a tie


def test_groups_are_independent_and_the_last_may_be_short() -> None:
    weight, scheme = weights(50), Scheme(4, 16, False)
    scale, zero = fit_scale(weight, scheme, torch.float16)
    assert scale.shape == (6, 4)
    for group in range(4):
        part = weight[:, group * 16 : group * 16 + 16]
        alone, alone_zero = fit_scale(part, Scheme(4, "row", False), torch.float16)
        assert torch.equal(alone[:, 0], scale[:, group])
        assert torch.equal(alone_zero[:, 0], zero[:, group])


def test_tensor_schemes_repeat_one_scale() -> None:
    scale, zero = fit_scale(weights(), Scheme(8, "tensor", False), torch.bfloat16)
    assert scale.shape == (6, 1)
    assert len(scale.unique()) == len(zero.unique()) == 1


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-8, 1e38])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extreme_weights_give_finite_scales_above_zero(size: float, symmetric: bool, dtype: torch.dtype) -> None:
    weight, scheme = torch.tensor([[1.0, -0.5, 0.25, 0.0]]) * size, Scheme(4, "row", symmetric)
    scale, zero = fit_scale(weight, scheme, dtype, "mse")
    assert torch.isfinite(scale).all()
    least = least_scale(dtype)
    assert (scale >= least).all()
    assert torch.equal(scale.float() / least, (scale.float() / least).round())
    codes = quantize(weight, scale, zero, scheme)
    if size < least / 2:
        assert (codes == zero).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("range_", ["minmax", "mse"])
def test_float16_holds_the_scales_of_small_weights(bits: int, symmetric: bool, range_: Any) -> None:
    """Weights of a float16 checkpoint, down to a few multiples of its smallest number, lose as much as large ones."""
    shape = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).div_(4).clamp_(-1, 1)
    scheme, errors = Scheme(bits, 32, symmetric), []
    for size in (1e-1, 8e-3, 1e-3, 1e-4, 3e-5, 4e-6):
        weight = (shape * size).half().float()
        scale, zero = fit_scale(weight, scheme, torch.float16, range_)
        rounded = dequantize(quantize(weight, scale, zero, scheme), scale, zero, scheme)
        errors.append(float((rounded - weight).norm() / weight.norm()))
    assert max(errors) < 1.35 * errors[0], errors  # scales are rounded up to multiples of 2^-24
    assert errors[0] < {2: 0.6, 4: 0.12, 8: 0.01}[bits]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_float16_weight_of_few_steps_is_exact(bits: int) -> None:
    """The step is the smallest float16 number, of which every float16 weight is a multiple."""
    steps = torch.randint(-7, 8, (8, 32), generator=torch.Generator().manual_seed(0))
    weight, scheme = steps * 2.0**-24, Scheme(bits, "row")
    scale, zero = fit_scale(weight, scheme, torch.float16)
    assert (scale == 2.0**-24).all()
    assert torch.equal(dequantize(quantize(weight, scale, zero, scheme), scale, zero, scheme), weight)


def test_zero_is_always_exact() -> None:
    weight = torch.tensor([[0.0, 3.0, 5.0, 4.0], [0.0, -3.0, -5.0, -4.0]])  # one sign only
    linear, _ = rtn.quantize_linear(weight, None, Scheme(4, "row", False), rtn.Options(), torch.float16)
    assert (linear.dequantize()[:, 0] == 0).all()


def test_float8_scale_maps_the_peak_to_448() -> None:
    weight = weights()
    linear, _ = rtn.quantize_linear(weight, None, Scheme(8, "row", number="fp8"), rtn.Options(), torch.float32)
    peak = linear.codes.view(torch.float8_e4m3fn).float().abs().amax(1)
    assert (peak == 448).all()
    assert ((linear.dequantize() - weight).abs() <= weight.abs() / 16 + linear.scale * 2**-9).all()


def test_the_range_of_a_block_is_that_of_its_128_rows_and_columns() -> None:
    weight = -torch.rand(200, 256, generator=torch.Generator().manual_seed(0)) - 0.5
    weight[130, 200] = 7.0
    low, high = ranges.full_range(weight, Scheme(8, "block", number="fp8"))
    for rows in (slice(0, 128), slice(128, 200)):
        for block in range(2):
            part = weight[rows, 128 * block : 128 * (block + 1)]
            assert (low[rows, block] == part.min()).all()
            assert (high[rows, block] == max(0, part.max())).all()
