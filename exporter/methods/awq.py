"""AWQ (Lin et al., arXiv 2306.00978): protect the columns that matter by scaling them up before they are rounded.

A weight's column is multiplied by s and its input divided by s: `W x = (W * s) (x / s)`. A column with s > 1 uses more
of its group's range, so its relative error shrinks. `find_scales` searches s; `folds.fold` moves 1 / s into whatever
makes the input (a `Smoothing` of the family), so the artifact needs no further tensors. After that `quantize_linear`
sees `W * s` and statistics of `x / s`, searches how far each group may be clipped, and rounds.

All folds of a block come before its first linear is quantized: a fold from one linear to another changes both.
"""

from collections.abc import Callable, Sequence

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn.functional import pad

from exporter.quantized import QuantizedLinear, Scheme, dequantize, quantize, spread
from exporter.ranges import fit_scale

VERSION = 1
SAMPLE_ROWS = 512
POINTS = 20  # exponents 0, 1/20 .. 19/20
LARGEST_SCALE = 1e4  # and 1e-4: a norm divided by more would leave the range of float16
CLIP_STEPS = 10
CLIP_STEP = 0.05  # the smallest range that is tried is 0.55 of the full one


class Options(BaseModel):
    """clip: search a smaller range for every group by the output's error on sampled inputs; else cover every weight."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    clip: bool = True


class Statistics:
    """Mean |x| of every column, f32 `[in]`, and a sample of the rows, f32 `[<=512, in]`.

    The sample does not depend on how rows are batched: every row has a fixed priority by its position, spread evenly
    (multiples of the golden ratio), and the first 512 by priority stay.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.mean_abs = torch.zeros(columns, dtype=torch.float32, device=device)
        self.sample = torch.zeros(0, columns, dtype=torch.float32, device=device)
        self.rows = 0
        self._total = 0.0
        self._priorities = torch.zeros(0, dtype=torch.int64, device=device)

    def update(self, rows: Tensor, weights: Tensor | None = None) -> None:
        """Add input rows `[rows, in]`, each counted `weights` `[rows]` times (sampled rows get its square root)."""
        if not len(rows):
            return
        added = float(len(rows) if weights is None else weights.sum())
        if weights is None:
            sums = torch.linalg.vector_norm(rows, 1, dim=0, dtype=torch.float32)
        else:
            sums = weights.float() @ rows.float().abs()
        total = self._total + added
        if total:
            self.mean_abs.mul_(self._total / total).add_(sums, alpha=1 / total)
        self._add_to_sample(rows, weights)
        self._total, self.rows = total, self.rows + len(rows)

    def _add_to_sample(self, rows: Tensor, weights: Tensor | None) -> None:
        position = torch.arange(self.rows, self.rows + len(rows), device=rows.device)
        priorities = torch.cat([self._priorities, position * 0x9E3779B1 % 2**32])
        count, old = min(SAMPLE_ROWS, len(priorities)), len(self.sample)
        kept = priorities.topk(count, largest=False).indices.sort().values
        new = kept[kept >= old] - old
        chosen = rows[new].float()
        if weights is not None:
            chosen = chosen * weights[new].float().sqrt().unsqueeze(1)
        self.sample = torch.cat([self.sample[kept[kept < old]], chosen])
        self._priorities = priorities[kept]

    def divide(self, scales: Tensor) -> None:
        """Turn them into statistics of `x / scales` `[in]`, the input after a fold; the last thing before they are used."""
        self.mean_abs = self.mean_abs / scales
        self.sample = self.sample / scales

    def energy(self, matrix: Tensor) -> float:
        """Mean squared size of `matrix` f32 `[out, in]` times a sampled row; for reports."""
        return float((self.sample @ matrix.T).square().sum() / max(len(self.sample), 1))


def find_scales(
    mean_abs: Tensor, weights: Sequence[Tensor], scheme: Scheme, output_error: Callable[[Tensor], float]
) -> tuple[Tensor, float]:
    """The best scales f32 `[in]` of a shared input, and their error.

    mean_abs: f32 `[in]`. weights: f32 `[out_i, in]`, every linear that reads this input. output_error: what scales
    `[in]` cost, usually by running the block with `rounded` weights; `sample_error` is the cheap one.

    Tried are no scales at all, so the result is never worse than that, and `x**r / w**(1-r)` for r = 1/20 .. 19/20,
    with x the mean input and w the mean weight relative to its group's peak, divided by sqrt(max * min). A column
    without inputs or weights keeps 1.
    """
    size = _relative_size(weights, scheme)
    alive = (mean_abs > 0) & (size > 0)
    best = torch.ones_like(mean_abs)
    error = output_error(best)
    if not alive.any():
        return best, error
    for point in range(1, POINTS):
        ratio = point / POINTS
        scales = torch.where(alive, mean_abs**ratio / size ** (1 - ratio), 1.0)
        scales = scales / (scales[alive].max() * scales[alive].min()).sqrt()
        scales = torch.where(alive, scales.clamp(1 / LARGEST_SCALE, LARGEST_SCALE), 1.0)
        found = output_error(scales)
        if found < error:
            best, error = scales, found
    return best, error


def _relative_size(weights: Sequence[Tensor], scheme: Scheme) -> Tensor:
    """Mean over all rows of |w| as a share of its group's peak (up to one factor), `[in]`."""
    whole = torch.cat(list(weights))
    shape = Scheme(scheme.bits, scheme.group_size, True, scheme.number)  # a symmetric scale is a share of the peak
    peaks, _ = fit_scale(whole, shape, torch.float32)
    return (whole.abs() / spread(peaks, whole.shape[1], scheme)).mean(0)


def rounded(weight: Tensor, scales: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Tensor:
    """`weight` f32 `[out, in]` as it acts on the unscaled input once `weight * scales` is rounded."""
    scaled = weight * scales
    scale, zero = fit_scale(scaled, scheme, scale_dtype)
    return dequantize(quantize(scaled, scale, zero, scheme), scale, zero, scheme) / scales


def sample_error(
    weights: Sequence[Tensor], sample: Tensor, scheme: Scheme, scale_dtype: torch.dtype
) -> Callable[[Tensor], float]:
    """An `output_error` for `find_scales`: squared error of the linears' own outputs on `sample` `[rows, in]`."""

    def output_error(scales: Tensor) -> float:
        lost = [sample @ (rounded(weight, scales, scheme, scale_dtype) - weight).T for weight in weights]
        return float(torch.stack([part.square().sum() for part in lost]).sum())

    return output_error


def find_clip(weight: Tensor, sample: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Tensor:
    """How large a weight of each group may be, f32 `[out, groups]`; larger ones get the last code.

    weight f32 `[out, in]`, sample f32 `[rows, in]`. Each group takes the range with the smallest error of its own part
    of the output. Parts add up, and their errors may too, so a row keeps the full range when it does better as a whole.
    """
    roots = _roots(sample, scheme)
    full = _peaks(weight, scheme)
    best, least = full, _part_errors(weight, full, roots, scheme, scale_dtype)
    for step in range(1, CLIP_STEPS):
        peaks = full * (1 - CLIP_STEP * step)
        error = _part_errors(weight, peaks, roots, scheme, scale_dtype)
        best, least = torch.where(error < least, peaks, best), torch.minimum(error, least)
    whole = [(_lost(weight, peaks, scheme, scale_dtype) @ sample.T).square().sum(1, True) for peaks in (best, full)]
    if scheme.group_size == "tensor":
        whole = [errors.sum() for errors in whole]
    return torch.where(whole[0] < whole[1], best, full)


def _roots(sample: Tensor, scheme: Scheme) -> Tensor:
    """R `[groups, min(rows, width), width]` with `R^T R = X^T X` for each group's columns of `sample`, so that products
    with R are as large as products with X, and cheaper."""
    rows, columns = sample.shape
    width, groups = scheme.columns_per_group(columns), scheme.groups(columns)
    parts = pad(sample, (0, groups * width - columns)).view(rows, groups, width).transpose(0, 1)
    roots: Tensor = torch.linalg.qr(parts, mode="r").R
    return roots


def _peaks(weight: Tensor, scheme: Scheme) -> Tensor:
    """Largest |w| of each group, `[out, groups]`; of everything, repeated, for "tensor"."""
    peaks = _grouped(weight, scheme).abs().amax(-1)
    return peaks.amax().expand_as(peaks) if scheme.group_size == "tensor" else peaks


def _grouped(matrix: Tensor, scheme: Scheme) -> Tensor:
    """`[out, in]` -> `[out, groups, width]`, the last group filled up with zeros."""
    out, columns = matrix.shape
    width, groups = scheme.columns_per_group(columns), scheme.groups(columns)
    return pad(matrix, (0, groups * width - columns)).view(out, groups, width)


def _scale_under(weight: Tensor, peaks: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    limits = spread(peaks, weight.shape[1], scheme)
    return fit_scale(weight.clamp(-limits, limits), scheme, scale_dtype)


def _lost(weight: Tensor, peaks: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Tensor:
    """What rounding with ranges cut at `peaks` `[out, groups]` changes, `[out, in]`."""
    scale, zero = _scale_under(weight, peaks, scheme, scale_dtype)
    return dequantize(quantize(weight, scale, zero, scheme), scale, zero, scheme) - weight


def _part_errors(weight: Tensor, peaks: Tensor, roots: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Tensor:
    """Squared error of each group's part of the output, `[out, groups]` (of all, repeated, for "tensor")."""
    lost = _grouped(_lost(weight, peaks, scheme, scale_dtype), scheme).transpose(0, 1)  # [groups, out, width]
    errors = torch.bmm(lost, roots.transpose(1, 2)).square_().sum(-1).T
    return errors.sum().expand_as(errors) if scheme.group_size == "tensor" else errors


def quantize_linear(
    weight: Tensor, statistics: Statistics, scheme: Scheme, options: Options, scale_dtype: torch.dtype
) -> tuple[QuantizedLinear, tuple[str, ...]]:
    """Clip and round `weight` f32 `[out, in]`, whose scales have been folded already; `statistics` of its input now.

    Codes are the nearest to the weights themselves: the clipped range decides the scale and nothing else.
    """
    notes: tuple[str, ...] = ()
    peaks = _peaks(weight, scheme)
    if options.clip and not statistics.rows:
        notes = ("no input was seen: rounded to nearest without clipping",)
    elif options.clip:
        peaks = find_clip(weight, statistics.sample, scheme, scale_dtype)
    scale, zero = _scale_under(weight, peaks, scheme, scale_dtype)
    return QuantizedLinear(scheme, quantize(weight, scale, zero, scheme), scale, zero), notes
