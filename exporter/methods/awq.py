"""AWQ (Lin et al., arXiv 2306.00978): scale up important columns before rounding, and search the ranges.

The scales are folded into the previous module (a norm or another linear; `numerics/scale_folding.py`), so inference has
no division. Candidates are compared on all calibration rows: by the error of the linears' own outputs, which follows
from the second moments without running the block (on a GPU with bfloat16 products), or by the error of the block's
output. The paper's search runs the module around the linears on a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from exporter.lazy_torch import torch
from exporter.methods.options import MethodOptions
from exporter.numerics.hessian import Statistics, times
from exporter.numerics.quantized import QuantizedLinear, Scheme, dequantize, quantize
from exporter.numerics.ranges import Range, clip_fast, fit_scale, scale_within

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "VERSION",
    "Options",
    "Statistics",
    "best",
    "candidates",
    "find_scales",
    "quantize_linear",
    "rounded",
]

VERSION = 4
ROWS = 4096  # rows per range search, because a candidate's errors take as much memory as its weights
LARGEST_SCALE = 1e4  # the smallest scale is its inverse; AutoAWQ has the same limits


class Options(MethodOptions):
    """points: number of exponents to try for the column scales. clip: search narrower ranges, weighted by the inputs.

    range: "mse" and "signed" are those of `ranges.fit_scale`, weighted by the squares of the inputs; "clip" searches by
    each group's part of the output, as published. None is "signed" for symmetric integers without activations, and
    "mse" for others.

    search: how candidates are compared: by the outputs of the "linears" that they scale, or by the output of the whole
    "block", which then runs on all batches for every point.
    """

    points: int = Field(20, ge=1, le=100)
    search: Literal["linears", "block"] = "linears"
    clip: bool = True
    range_: Literal["clip", "mse", "signed"] | None = Field(None, alias="range")
    clip_steps: int = Field(10, ge=1, le=100)

    @property
    def signed_scales(self) -> bool:
        """Whether the options require negative scales."""
        return self.clip and self.range_ == "signed"

    @property
    def runs_block(self) -> bool:
        """Whether the search runs the whole block for every candidate."""
        return self.search == "block"


def find_scales(
    weights: Sequence[Tensor],
    statistics: Statistics,
    scheme: Scheme,
    options: Options,
    scale_dtype: torch.dtype,
    tie: Callable[[Tensor], Tensor] = lambda scales: scales,
) -> tuple[Tensor, float, float]:
    """Column scales f32 `[in]` for linears `[out_i, in]` that share an input; output errors without and with them.

    The best of `candidates` by the error of the linears' own outputs (`search: linears`). tie: gives columns that read
    the same value the same scale.
    """
    results = (
        (scales, _output_error(rounded(weights, scales, scheme, scale_dtype), weights, statistics))
        for scales in map(tie, candidates(weights, statistics, scheme, options))
    )
    return best(results)


def candidates(weights: Sequence[Tensor], statistics: Statistics, scheme: Scheme, options: Options) -> Iterator[Tensor]:
    """Candidate column scales f32 `[in]`, starting with ones, so that the best is never worse than no scales.

    The others are `x^r / w^(1-r)`, r = 0, 1/points, ... below 1 ("duo scaling"): x is the root mean square of each
    input, w the mean relative size of its weights in their groups. Scales are divided by sqrt(max * min). A column
    without inputs or weights gets 1 and is excluded from max and min.
    """
    size = statistics.hessian.diagonal().sqrt()
    relative = _relative_size(torch.cat(list(weights)), scheme)
    alive = (size > 0) & (relative > 0)
    yield torch.ones_like(size)
    for point in range(options.points if alive.any() else 0):
        ratio = point / options.points
        scales = size**ratio / relative ** (1 - ratio)
        scales = scales / (scales[alive].max() * scales[alive].min()).sqrt()
        yield torch.where(alive, scales.clamp(1 / LARGEST_SCALE, LARGEST_SCALE), 1.0)


def best(results: Iterable[tuple[Tensor, float]]) -> tuple[Tensor, float, float]:
    """From (scales, error) pairs: the scales with the smallest error, the error of the first pair, and the smallest."""
    pairs = iter(results)
    scales, first = next(pairs)
    least = first
    for others, error in pairs:
        if error < least:
            scales, least = others, error
    return scales, first, least


def rounded(weights: Iterable[Tensor], scales: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Iterator[Tensor]:
    """`Q(W s) / s` of each weight: the weight that the fold gives, for unscaled inputs."""
    for weight in weights:
        scaled = weight * scales
        scale, zero = fit_scale(scaled, scheme, scale_dtype)
        yield dequantize(quantize(scaled, scale, zero, scheme), scale, zero, scheme) / scales


def _relative_size(weight: Tensor, scheme: Scheme) -> Tensor:
    """Mean over rows of |w| divided by the largest |w| of its group, `[in]`."""
    rows, columns = weight.shape
    width, groups = scheme.columns_per_group(columns), scheme.groups(columns)
    magnitude = torch.nn.functional.pad(weight.abs(), (0, groups * width - columns)).view(rows, groups, width)
    share = magnitude / magnitude.amax(-1, keepdim=True).clamp_min(1e-12)
    return share.view(rows, -1)[:, :columns].mean(0)


def _output_error(quantized: Iterable[Tensor], weights: Sequence[Tensor], statistics: Statistics) -> float:
    """`tr(D H D^T)` summed over the linears, with `D = Q - W`."""
    return sum(statistics.energy(q - weight) for q, weight in zip(quantized, weights, strict=True))


def quantize_linear(
    weight: Tensor, statistics: Statistics, scheme: Scheme, options: Options, scale_dtype: torch.dtype
) -> tuple[QuantizedLinear, tuple[str, ...]]:
    """Round `weight` f32 `[out, in]`, whose columns are already scaled, within searched ranges."""
    grouped = scheme.group_size != "block" and scheme.number != "nvfp4"  # groups whose scales are independent
    if options.clip and not (options.range_ == "clip" and grouped):
        scale, zero = fit_scale(weight, scheme, scale_dtype, _range(options, scheme), statistics.importance())
        return QuantizedLinear(scheme, quantize(weight, scale, zero, scheme), scale, zero), ()
    scale, zero = fit_scale(weight, scheme, scale_dtype)
    if options.clip and scheme.group_size != "tensor":
        parts = [part.split(ROWS) for part in (weight, scale, zero)]
        ranges = [
            _clip(w, statistics.hessian, scheme, options.clip_steps, s, z) for w, s, z in zip(*parts, strict=True)
        ]
        scale, zero = torch.cat([s for s, _ in ranges]), torch.cat([z for _, z in ranges])
    return QuantizedLinear(scheme, quantize(weight, scale, zero, scheme), scale, zero), ()


def _range(options: Options, scheme: Scheme) -> Range:
    """The search of ranges: the one in the options, or the best that the scheme has."""
    if options.range_ in ("mse", "signed"):
        return options.range_
    return "mse" if scheme.grid or scheme.activations else "signed"


def _clip(
    weight: Tensor, hessian: Tensor, scheme: Scheme, steps: int, scale: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor]:
    """The range of each group, down to half, with the smallest error of this group's own contribution to the output.

    The contributions of a row's groups add up, so the clipped ranges can be worse together: then the row keeps the full
    ranges.
    """
    full = scale, zero
    scale, zero = clip_fast(weight, hessian, scheme, scale.dtype, steps) or _clip_plain(
        weight, hessian, scheme, steps, scale, zero
    )
    helps = _row_errors(weight, hessian, scale, zero, scheme) < _row_errors(weight, hessian, *full, scheme)
    return torch.where(helps, scale, full[0]), torch.where(helps, zero, full[1])


def _clip_plain(
    weight: Tensor, hessian: Tensor, scheme: Scheme, steps: int, scale: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor]:
    """The best range of each group on its own, in torch, on any device."""
    blocks = _diagonal_blocks(hessian, scheme)
    error = _group_output_error(weight, blocks, scale, zero, scheme)
    for step in range(1, steps + 1):
        candidate = scale_within(weight, scheme, scale.dtype, 1 - 0.5 * step / steps)
        candidate_error = _group_output_error(weight, blocks, *candidate, scheme)
        better = candidate_error < error
        error = torch.where(better, candidate_error, error)
        scale, zero = torch.where(better, candidate[0], scale), torch.where(better, candidate[1], zero)
    return scale, zero


def _row_errors(weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """`d H d^T` of each row, `[out, 1]`."""
    difference = dequantize(quantize(weight, scale, zero, scheme), scale, zero, scheme) - weight
    left = difference.to(torch.bfloat16) if difference.is_cuda else difference  # precise enough to compare two sums
    return (times(left, hessian) * difference).sum(1, keepdim=True)


def _diagonal_blocks(hessian: Tensor, scheme: Scheme) -> Tensor:
    """The Hessian's diagonal block of each group, `[groups, width, width]`, zero where the last group is short."""
    columns = len(hessian)
    width, groups = scheme.columns_per_group(columns), scheme.groups(columns)
    blocks = torch.zeros(groups, width, width, device=hessian.device)
    for group in range(groups):
        part = slice(group * width, min(columns, (group + 1) * width))
        count = part.stop - part.start
        blocks[group, :count, :count] = hessian[part, part]
    return blocks


def _group_output_error(weight: Tensor, blocks: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """`d H_gg d^T` of each row and group, `[out, groups]`."""
    rows, columns = weight.shape
    groups, width, _ = blocks.shape
    difference = dequantize(quantize(weight, scale, zero, scheme), scale, zero, scheme) - weight
    parts = torch.nn.functional.pad(difference, (0, groups * width - columns)).view(rows, groups, width).transpose(0, 1)
    return ((parts @ blocks) * parts).sum(-1).T
