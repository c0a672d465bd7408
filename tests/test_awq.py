"""AWQ against searches by hand, and at its edges."""

import pytest
import torch
from torch import nn

from exporter.folds import fold
from exporter.methods import awq, rtn
from exporter.methods.awq import Options, Statistics, find_clip, find_scales, rounded, sample_error
from exporter.quantized import Scheme
from exporter.ranges import fit_scale
from tests.oracles import awq_clip_by_hand, awq_scales_by_hand

CPU = torch.device("cpu")


def inputs(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Correlated rows; every eleventh column is 20 times as large as the others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) @ torch.randn(columns, columns, generator=generator) * 0.1
    x[:, ::11] *= 20
    return x


def weights(*rows: int, columns: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(out, columns, generator=generator) for out in rows]


def seen(x: torch.Tensor) -> Statistics:
    statistics = Statistics(x.shape[1], CPU)
    statistics.update(x)
    return statistics


def test_statistics_do_not_depend_on_batches() -> None:
    x = inputs(2000, 12)
    one, many = seen(x), Statistics(12, CPU)
    for part in x.split(170):
        many.update(part)
    many.update(x[:0])
    torch.testing.assert_close(one.mean_abs, x.abs().mean(0))
    torch.testing.assert_close(many.mean_abs, one.mean_abs)
    assert one.sample.shape == (512, 12)
    assert torch.equal(many.sample, one.sample)
    assert many.rows == 2000


@pytest.mark.parametrize("period", [32, 257, 512, 576])
def test_the_sample_spreads_over_positions_of_a_repeated_sequence(period: int) -> None:
    """Images have a fixed number of tokens: a sample of every n-th row could be the same token of every image."""
    rows = 16384
    position = torch.arange(rows, dtype=torch.float32)
    sample = seen(torch.stack([position, position % period], 1)).sample.long()
    assert len(sample[:, 0].unique()) == 512
    assert len(sample[:, 1].unique()) > 0.6 * min(period, 512) * (1 - 2.718 ** -(512 / period))
    fifths = torch.bincount(sample[:, 0] * 5 // rows, minlength=5)
    assert int(fifths.min()) > 80


def test_weighted_rows_count_that_often() -> None:
    x, counts = inputs(40, 6), torch.arange(40) % 3
    twice, weighted = seen(x.repeat_interleave(counts, dim=0)), Statistics(6, CPU)
    weighted.update(x[:15], counts[:15].float())
    weighted.update(x[15:], counts[15:].float())
    torch.testing.assert_close(weighted.mean_abs, twice.mean_abs)
    torch.testing.assert_close(weighted.sample.T @ weighted.sample, twice.sample.T @ twice.sample)


@pytest.mark.parametrize(("width", "symmetric"), [(16, True), (16, False), (100, True)])
def test_scales_equal_a_search_by_hand(width: int, symmetric: bool) -> None:
    x, both = inputs(60, 100), weights(6, 9, columns=100)
    scheme = Scheme(3, width, symmetric)
    error = sample_error(both, x, scheme, torch.float16)
    scales, lost = find_scales(seen(x).mean_abs, both, scheme, error)
    by_hand = awq_scales_by_hand(x.abs().mean(0), both, x, width, lambda w: fit_scale(w, scheme, torch.float16))
    torch.testing.assert_close(scales, by_hand, rtol=1e-4, atol=0)
    assert lost == error(scales)
    assert float(scales.std()) > 0.1


def test_every_exponent_is_tried_and_the_best_returned() -> None:
    x, both = inputs(60, 40), weights(8, columns=40)
    tried: list[torch.Tensor] = []

    def seventh_is_best(scales: torch.Tensor) -> float:
        tried.append(scales)
        return 1.0 if len(tried) == 7 else 1.0 + len(tried)

    scales, error = find_scales(seen(x).mean_abs, both, Scheme(4, 8), seventh_is_best)
    assert len(tried) == 20
    assert torch.equal(tried[0], torch.ones(40))
    assert error == 1.0
    assert torch.equal(scales, tried[6])
    for some in tried:
        torch.testing.assert_close(some.max() * some.min(), torch.tensor(1.0))


def test_scales_that_do_not_help_are_not_used() -> None:
    x, both = inputs(60, 40), weights(8, columns=40)
    scales, error = find_scales(
        seen(x).mean_abs, both, Scheme(4, 8), lambda scales: float((scales - 1).abs().sum()) + 3.0
    )
    assert torch.equal(scales, torch.ones(40))
    assert error == 3.0


def test_columns_without_inputs_or_weights_keep_one_and_stretch_nothing() -> None:
    x, both = inputs(60, 40), weights(8, columns=40)
    both[0][:, 5] = 0
    x[:, 9] = 0
    scheme = Scheme(3, 8)
    scales, _ = find_scales(seen(x).mean_abs, both, scheme, sample_error(both, x, scheme, torch.float16))
    assert scales[[5, 9]].tolist() == [1.0, 1.0]
    others = [i for i in range(40) if i not in (5, 9)]
    assert float(scales[others].max()) < 50
    assert float(scales[others].min()) > 1 / 50
    nothing, _ = find_scales(torch.zeros(40), both, scheme, lambda scales: 0.0)
    assert torch.equal(nothing, torch.ones(40))


@pytest.mark.parametrize("bits", [3, 4])
def test_scales_lower_the_output_error_where_columns_differ(bits: int) -> None:
    x, both = inputs(400, 96), weights(24, 24, columns=96)
    scheme = Scheme(bits, 32)
    error = sample_error(both, x, scheme, torch.float16)
    _, lost = find_scales(seen(x).mean_abs, both, scheme, error)
    assert lost < 0.7 * error(torch.ones(96))


def test_rounded_is_what_a_folded_linear_does() -> None:
    """Fold, quantize, run: the same output as the rounded weight on the input as it was."""
    x, (weight,) = inputs(30, 40), weights(8, columns=40)
    scheme, scales = Scheme(4, 16, False), torch.logspace(-1, 1, 40)
    norm, linear = nn.LayerNorm(40), nn.Linear(40, 8, bias=False)
    block = nn.ModuleDict({"norm": norm, "linear": linear})
    linear.weight.data.copy_(weight)
    before = norm(x).detach()
    fold(block, "norm", ("linear",), None, scales)
    folded, _ = awq.quantize_linear(
        linear.weight.detach(), seen(norm(x).detach()), scheme, Options(clip=False), torch.float16
    )
    found = norm(x).detach() @ folded.dequantize().T
    torch.testing.assert_close(found, before @ rounded(weight, scales, scheme, torch.float16).T, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    "scheme",
    [Scheme(3, 32), Scheme(3, 32, False), Scheme(2, 40), Scheme(4, "row"), Scheme(8, "row", number="fp8")],
    ids=str,
)
@pytest.mark.parametrize("rows", [20, 300])  # fewer and more than a group has columns
def test_clipping_equals_a_search_by_hand(scheme: Scheme, rows: int) -> None:
    x, (weight,) = inputs(rows, 100), weights(12, columns=100)  # every group size leaves a ragged last group
    found = find_clip(weight, x, scheme, torch.float16)
    by_hand = awq_clip_by_hand(weight, x, scheme, torch.float16)
    assert found.shape == by_hand.shape
    different = int(((found - by_hand).abs() > 1e-5).sum())
    assert different <= 1, f"{different} of {found.numel()} ranges differ; float32 sums may break a tie, no more"


def test_clipping_is_found_where_it_pays_and_never_hurts_a_row() -> None:
    x, (weight,) = inputs(300, 96), weights(64, columns=96)
    scheme = Scheme(3, 32)
    clipped, notes = awq.quantize_linear(weight, seen(x), scheme, Options(), torch.float16)
    plain, _ = awq.quantize_linear(weight, seen(x), scheme, Options(clip=False), torch.float16)
    errors = [(x @ (linear.dequantize() - weight).T).square().sum(0) for linear in (clipped, plain)]
    assert notes == ()
    assert (errors[0] <= errors[1] * 1.0001).all()
    assert float(errors[0].sum()) < 0.9 * float(errors[1].sum())


def test_one_range_for_a_whole_tensor() -> None:
    x, (weight,) = inputs(300, 60), weights(20, columns=60)
    weight[3, 3] = 6.0
    x[:, 3] *= 0.01  # the peak hardly matters
    scheme = Scheme(3, "tensor")
    clip = find_clip(weight, x, scheme, torch.float16)
    assert len(clip.unique()) == 1
    assert float(clip[0, 0]) < 5
    lost = []
    for step in range(10):
        scale, _ = fit_scale(weight.clamp(-6 * (1 - 0.05 * step), 6 * (1 - 0.05 * step)), scheme, torch.float16)
        codes = (weight / scale.float()[:1, :1]).round().clamp(-4, 3)
        lost.append(float((x @ (codes * scale.float()[0, 0] - weight).T).square().sum()))
    assert float(clip[0, 0]) == pytest.approx(6 * (1 - 0.05 * lost.index(min(lost))))


def test_without_clipping_it_is_rounding() -> None:
    x, (weight,) = inputs(300, 96), weights(24, columns=96)
    for statistics, options, said in ((seen(x), Options(clip=False), 0), (Statistics(96, CPU), Options(), 1)):
        linear, notes = awq.quantize_linear(weight, statistics, Scheme(4, 32), options, torch.float16)
        plain, _ = rtn.quantize_linear(weight, None, Scheme(4, 32), rtn.Options(), torch.float16)
        assert torch.equal(linear.codes, plain.codes)
        assert torch.equal(linear.scale, plain.scale)
        assert len(notes) == said


def test_stacked_linears_equal_separate_ones() -> None:
    x, both = inputs(300, 96), weights(8, 16, columns=96)
    whole, _ = awq.quantize_linear(torch.cat(both), seen(x), Scheme(3, 32), Options(), torch.float16)
    parts = [awq.quantize_linear(weight, seen(x), Scheme(3, 32), Options(), torch.float16)[0] for weight in both]
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts]))
    assert torch.equal(whole.scale, torch.cat([part.scale for part in parts]))


def test_divided_statistics_are_those_of_the_divided_input() -> None:
    x, scales, matrix = inputs(300, 12), torch.linspace(0.5, 3, 12), torch.randn(4, 12)
    divided, direct = seen(x), seen(x / scales)
    divided.divide(scales)
    torch.testing.assert_close(divided.mean_abs, direct.mean_abs)
    torch.testing.assert_close(divided.sample, direct.sample)
    assert direct.energy(matrix) == pytest.approx(float(((x / scales) @ matrix.T).square().sum() / 300), rel=1e-5)
