"""AWQ equals exhaustive searches; edge cases."""

import pytest
import torch
from torch import nn

from exporter.methods import awq, rtn
from exporter.methods.awq import Options, find_scales
from exporter.numerics.hessian import Statistics
from exporter.numerics.quantized import Scheme, quantize
from exporter.numerics.ranges import fit_scale
from exporter.numerics.scale_folding import fold
from tests.oracles import awq_candidates_by_hand, awq_clip_by_hand, awq_scales_by_hand

CPU = torch.device("cpu")
HALF = torch.float16
CLIP = Options(range="clip")


def inputs(rows: int, columns: int) -> torch.Tensor:
    """Correlated rows; every eleventh column is 20 times as large as the others."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator) @ torch.randn(columns, columns, generator=generator) * 0.1
    x[:, ::11] *= 20
    return x


def weights(*rows: int, columns: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(out, columns, generator=generator) for out in rows]


def statistics_of(x: torch.Tensor) -> Statistics:
    statistics = Statistics(x.shape[1], CPU)
    statistics.update(x)
    return statistics


@pytest.mark.parametrize(
    "scheme", [Scheme(3, 16), Scheme(3, 16, False), Scheme(4, 24), Scheme(3, "row"), Scheme(2, 40, False)], ids=str
)
def test_scales_equal_a_search_by_hand(scheme: Scheme) -> None:
    x, both = inputs(60, 100), weights(6, 9, columns=100)  # two linears share the input; the last group is short
    scales, before, after = find_scales(both, statistics_of(x), scheme, Options(), HALF)
    torch.testing.assert_close(scales, awq_scales_by_hand(both, x, scheme, HALF), rtol=1e-4, atol=0)
    assert after < before
    assert float(scales.std()) > 0.1


def test_errors_are_those_of_the_outputs() -> None:
    """Fold into a norm, round, run: what the search promised."""
    norm, linear = nn.LayerNorm(40, dtype=torch.float64), nn.Linear(40, 8, bias=False)
    x, (weight,) = norm(inputs(50, 40).double()).detach().float(), weights(8, columns=40)
    linear.weight.data.copy_(weight)
    scheme, block = Scheme(3, 16, False), nn.ModuleDict({"norm": norm, "linear": linear})
    scales, before, after = find_scales([weight], statistics_of(x), scheme, Options(), HALF)
    fold(block, "norm", ("linear",), None, scales)
    folded = norm(inputs(50, 40).double()).detach().float()
    for y, stored, promised in ((x, weight, before), (folded, linear.weight.detach(), after)):
        rounded, _ = rtn.quantize_linear(stored, None, scheme, rtn.Options(), HALF)
        error = float((y @ rounded.dequantize().T - x @ weight.T).square().sum() / 50)
        assert error == pytest.approx(promised, rel=1e-3)


@pytest.mark.parametrize("bits", [3, 4])
def test_scales_lower_the_error_where_columns_differ(bits: int) -> None:
    x, both = inputs(400, 96), weights(24, 24, columns=96)
    _, before, after = find_scales(both, statistics_of(x), Scheme(bits, 32), Options(), HALF)
    assert after < 0.7 * before


def test_scales_that_do_not_help_are_not_used() -> None:
    """Weights that 4 bits hold exactly: any scale makes them worse."""
    codes = torch.randint(-8, 8, (8, 40), generator=torch.Generator().manual_seed(0)).float()
    codes[:, ::8] = -7.5  # the peak of every group, half way between two codes, so that the step is 1
    x = inputs(60, 40)
    x[:, ::8] = 0.001
    scales, before, after = find_scales([codes], statistics_of(x), Scheme(4, 8), Options(), torch.float32)
    assert torch.equal(scales, torch.ones(40))
    assert after == before


def test_columns_without_inputs_or_weights_keep_scale_one_and_change_no_others() -> None:
    x, (weight,) = inputs(60, 40), weights(8, columns=40)
    weight[:, 5] = 0
    x[:, 9] = 0
    scheme = Scheme(3, 8)
    scales, before, after = find_scales([weight], statistics_of(x), scheme, Options(), HALF)
    others = [i for i in range(40) if i not in (5, 9)]
    assert after < before
    assert scales[[5, 9]].tolist() == [1.0, 1.0]
    torch.testing.assert_close(scales[others].max() * scales[others].min(), torch.tensor(1.0))
    unscaled, before, after = find_scales([weight], Statistics(40, CPU), scheme, Options(), HALF)
    assert torch.equal(unscaled, torch.ones(40))
    assert before == after == 0


def test_scales_stay_within_the_range_of_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    x, (weight,) = inputs(60, 40), weights(8, columns=40)
    free, _, _ = find_scales([weight], statistics_of(x), Scheme(3, 8), Options(), HALF)
    assert float(free.max()) > 1.5
    monkeypatch.setattr(awq, "LARGEST_SCALE", 1.5)
    bound, _, _ = find_scales([weight], statistics_of(x), Scheme(3, 8), Options(), HALF)
    assert float(bound.max()) == 1.5
    assert float(bound.min()) >= 1 / 1.5


@pytest.mark.parametrize("points", [1, 7, 20])
def test_every_exponent_is_a_candidate_after_no_scales(points: int) -> None:
    x, both = inputs(60, 40), weights(8, columns=40)
    candidates = list(awq.candidates(both, statistics_of(x), Scheme(4, 8), Options(points=points)))
    expected = awq_candidates_by_hand(both, x, Scheme(4, 8), points)
    assert len(candidates) == len(expected) == points + 1
    assert torch.equal(candidates[0], torch.ones(40))
    torch.testing.assert_close(torch.stack(candidates), torch.tensor(expected), rtol=1e-4, atol=0)


def test_the_best_is_the_first_of_the_smallest_errors() -> None:
    scales = [torch.full((2,), float(i)) for i in range(4)]
    assert awq.best(zip(scales, (2.0, 3.0, 1.0, 1.0), strict=True)) == (scales[2], 2.0, 1.0)
    assert awq.best(zip(scales, (1.0, 1.0, 3.0, 2.0), strict=True)) == (scales[0], 1.0, 1.0)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(3, 32),
        Scheme(3, 32, False),
        Scheme(2, 40),
        Scheme(4, "row"),
        Scheme(4, 16, False),
        Scheme(8, "row", number="fp8"),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [20, pytest.param(300, marks=pytest.mark.slow)])  # fewer and more than columns
def test_clipping_equals_a_search_by_hand(scheme: Scheme, rows: int) -> None:
    x, (weight,) = inputs(rows, 100), weights(12, columns=100)  # a short last group
    clipped, notes = awq.quantize_linear(weight, statistics_of(x), scheme, CLIP, HALF)
    scale, zero = awq_clip_by_hand(weight, x, scheme, HALF)
    assert notes == ()
    assert torch.equal(clipped.scale, scale)
    assert torch.equal(clipped.zero, zero)


def test_clipping_is_used_where_it_helps_and_never_hurts_a_row() -> None:
    """Group by group the errors shrink; all inputs rise and fall together here, so that those of a row may add up."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 1, generator=generator) + 0.3 * torch.randn(300, 96, generator=generator)
    (weight,) = weights(64, columns=96)
    scheme = Scheme(3, 32)
    clipped, _ = awq.quantize_linear(weight, statistics_of(x), scheme, CLIP, HALF)
    plain, _ = awq.quantize_linear(weight, statistics_of(x), scheme, Options(clip=False), HALF)
    errors = [(x @ (linear.dequantize() - weight).T).square().sum(0) for linear in (clipped, plain)]
    assert (errors[0] <= errors[1] * 1.0001).all()
    assert float(errors[0].sum()) < 0.9 * float(errors[1].sum())


@pytest.mark.parametrize(
    ("options", "group", "rows"), [(Options(clip=False), 32, 300), (CLIP, "tensor", 300), (CLIP, 32, 0)]
)
def test_without_clipping_it_is_rounding(options: Options, group: int, rows: int) -> None:
    (weight,) = weights(24, columns=96)
    linear, _ = awq.quantize_linear(weight, statistics_of(inputs(rows, 96)), Scheme(4, group), options, HALF)
    plain, _ = rtn.quantize_linear(weight, None, Scheme(4, group), rtn.Options(), HALF)
    assert torch.equal(linear.codes, plain.codes)
    assert torch.equal(linear.scale, plain.scale)


def test_stacked_linears_equal_separate_ones() -> None:
    x, both = inputs(300, 96), weights(8, 16, columns=96)
    whole, _ = awq.quantize_linear(torch.cat(both), statistics_of(x), Scheme(3, 32), Options(), HALF)
    parts = [awq.quantize_linear(weight, statistics_of(x), Scheme(3, 32), Options(), HALF)[0] for weight in both]
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts]))
    assert torch.equal(whole.scale, torch.cat([part.scale for part in parts]))


@pytest.mark.parametrize("range_", ["mse", "signed"])
def test_other_ranges_are_weighted_by_the_squares_of_the_inputs(range_: str) -> None:
    weight = torch.randn(20, 40, generator=torch.Generator().manual_seed(0))
    statistics = awq.Statistics(40, torch.device("cpu"))
    statistics.update(torch.randn(50, 40, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 4, 40))
    scheme, squares = Scheme(2, 8), statistics.hessian.diagonal()
    linear, _ = awq.quantize_linear(weight, statistics, scheme, Options(range=range_), torch.bfloat16)
    scale, zero = fit_scale(weight, scheme, torch.bfloat16, range_, squares / squares.mean())
    assert torch.equal(linear.scale, scale)
    assert torch.equal(linear.codes, quantize(weight, scale, zero, scheme))
    assert bool((scale < 0).any()) == (range_ == "signed")
    plain, _ = fit_scale(weight, scheme, torch.bfloat16, range_)
    assert not torch.equal(plain, scale)


@pytest.mark.parametrize(
    ("scheme", "range_"),
    [
        (Scheme(2, 8), "signed"),
        (Scheme(4, 16, number="nvfp4"), "mse"),
        (Scheme(8, "row", activations="int8"), "mse"),
    ],
    ids=str,
)
def test_the_default_range_has_negative_scales_only_for_weight_only_integers(scheme: Scheme, range_: str) -> None:
    (weight,), statistics = weights(20, columns=48), statistics_of(inputs(100, 48))
    default, _ = awq.quantize_linear(weight, statistics, scheme, Options(), torch.bfloat16)
    named, _ = awq.quantize_linear(weight, statistics, scheme, Options(range=range_), torch.bfloat16)
    assert torch.equal(default.scale, named.scale)
    assert torch.equal(default.codes, named.codes)
    assert bool((default.scale < 0).any()) == (range_ == "signed")
