"""AWQ (Lin et al., arXiv 2306.00978): activation-aware column scales, then clipped ranges.

The scales are folded into the preceding module (a norm or a linear layer; `numerics/scale_folding.py`), so the engine
divides nothing at run time. Candidates are compared over all calibration rows, either by the output error of the
linears, computed from the second moments without running the block (on a GPU with bfloat16 products), or by the output
error of the block. The paper's search runs the surrounding module on a sample.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from exporter.methods.options import MethodOptions
from exporter.numerics.hessian import Statistics, times
from exporter.numerics.quantized import QuantizedLinear, Scheme, dequantize, quantize
from exporter.numerics.ranges import clip_fast, fit_scale, scale_within

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

VERSION = 2
ROWS = 4096  # rows per range search: the errors of a candidate take as much memory as these weights
LARGEST_SCALE = 1e4  # scales are clamped to this and its inverse, as in AutoAWQ


class Options(MethodOptions):
    """points: number of exponents tried for the column scales. clip: search narrower ranges, in clip_steps steps.

    search: the objective of the scale search, the output error of the "linears" or of the whole "block". "block" runs
    the block on all batches for every point.
    """

    points: int = Field(20, ge=1, le=100)
    search: Literal["linears", "block"] = "linears"
    clip: bool = True
    clip_steps: int = Field(10, ge=1, le=100)

    @property
    def runs_block(self) -> bool:
        """Whether the search runs the whole block for every candidate."""
        return self.search == "block"


def find_scales(
    weights: Sequence[Tensor], statistics: Statistics, scheme: Scheme, options: Options, scale_dtype: torch.dtype
) -> tuple[Tensor, float, float]:
    """Column scales f32 `[in]` for linears `[out_i, in]` that share an input; output errors without and with them.

    Selects from `candidates` by the output error of the linears (`search: linears`).
    """
    tried = (
        (scales, _output_error(rounded(weights, scales, scheme, scale_dtype), weights, statistics))
        for scales in candidates(weights, statistics, scheme, options)
    )
    return best(tried)


def candidates(weights: Sequence[Tensor], statistics: Statistics, scheme: Scheme, options: Options) -> Iterator[Tensor]:
    """Candidate column scales f32 `[in]`; the first are ones, so that the best is never worse than no scaling.

    The others are `x^r / w^(1-r)`, r = 0, 1/points, ... below 1 ("duo scaling"): x is the root mean square of each
    input, w the mean relative magnitude of its weights in their groups. Scales are divided by sqrt(max * min). Columns
    whose inputs or weights are all zero keep 1 and are excluded from max and min.
    """
    size = statistics.hessian.diagonal().sqrt()
    reach = _reach(torch.cat(list(weights)), scheme)
    alive = (size > 0) & (reach > 0)
    yield torch.ones_like(size)
    for point in range(options.points if alive.any() else 0):
        ratio = point / options.points
        scales = size**ratio / reach ** (1 - ratio)
        scales = scales / (scales[alive].max() * scales[alive].min()).sqrt()
        yield torch.where(alive, scales.clamp(1 / LARGEST_SCALE, LARGEST_SCALE), 1.0)


def best(tried: Iterable[tuple[Tensor, float]]) -> tuple[Tensor, float, float]:
    """Of (scales, error) pairs: the scales with the smallest error, the first error, and the smallest error."""
    pairs = iter(tried)
    scales, first = next(pairs)
    least = first
    for others, error in pairs:
        if error < least:
            scales, least = others, error
    return scales, first, least


def rounded(weights: Iterable[Tensor], scales: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Iterator[Tensor]:
    """`Q(W s) / s` of each weight: the effective weight for unscaled inputs."""
    for weight in weights:
        scaled = weight * scales
        scale, zero = fit_scale(scaled, scheme, scale_dtype)
        yield dequantize(quantize(scaled, scale, zero, scheme), scale, zero, scheme) / scales


def _reach(weight: Tensor, scheme: Scheme) -> Tensor:
    """Mean over rows of |w| relative to the largest |w| of its group, `[in]`."""
    rows, columns = weight.shape
    width, groups = scheme.columns_per_group(columns), scheme.groups(columns)
    magnitude = torch.nn.functional.pad(weight.abs(), (0, groups * width - columns)).view(rows, groups, width)
    share = magnitude / magnitude.amax(-1, keepdim=True).clamp_min(1e-12)
    return share.view(rows, -1)[:, :columns].mean(0)


def _output_error(tried: Iterable[Tensor], weights: Sequence[Tensor], statistics: Statistics) -> float:
    """`tr(D H D^T)` summed over the linears, with `D = tried - W`."""
    return sum(statistics.energy(rounded - weight) for rounded, weight in zip(tried, weights, strict=True))


def quantize_linear(
    weight: Tensor, statistics: Statistics, scheme: Scheme, options: Options, scale_dtype: torch.dtype
) -> tuple[QuantizedLinear, tuple[str, ...]]:
    """Round `weight` f32 `[out, in]`, whose columns are already scaled, to the nearest codes in clipped ranges."""
    scale, zero = fit_scale(weight, scheme, scale_dtype)
    if options.clip and scheme.group_size != "tensor":
        parts = [part.split(ROWS) for part in (weight, scale, zero)]
        clipped = [
            _clip(w, statistics.hessian, scheme, options.clip_steps, s, z) for w, s, z in zip(*parts, strict=True)
        ]
        scale, zero = torch.cat([s for s, _ in clipped]), torch.cat([z for _, z in clipped])
    return QuantizedLinear(scheme, quantize(weight, scale, zero, scheme), scale, zero), ()


def _clip(
    weight: Tensor, hessian: Tensor, scheme: Scheme, steps: int, scale: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor]:
    """Range of each group, down to half, with the smallest error of the group's own contribution to the output.

    The errors of groups may add up, so a row keeps its full ranges if the output error of the whole row is smaller.
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
    """`d H d^T` of each whole row, `[out, 1]`."""
    difference = dequantize(quantize(weight, scale, zero, scheme), scale, zero, scheme) - weight
    left = (
        difference.to(torch.bfloat16) if difference.is_cuda else difference
    )  # precise enough: the sums are only compared
    return (times(left, hessian) * difference).sum(1, keepdim=True)


def _diagonal_blocks(hessian: Tensor, scheme: Scheme) -> Tensor:
    """Diagonal Hessian block of each group, `[groups, width, width]`; a short last group is padded with zeros."""
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
