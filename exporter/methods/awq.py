"""AWQ (Lin et al., arXiv 2306.00978): scale up the columns that matter before rounding, and clip what does not.

The scales are folded into the module before (a norm or another linear; `numerics/scale_folding.py`), so nothing is
divided at run time. Candidates are compared over all calibration rows: by the error of the linears' own outputs, which
the second moments give without running the block again (on a GPU from products in bfloat16), or by the error of the
block's output.
The paper's search runs the module around the linears on a sample.
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
ROWS = 4096  # rows whose ranges are searched together: each error of a candidate is as large as its weights
LARGEST_SCALE = 1e4  # and its inverse, where AutoAWQ stops too


class Options(MethodOptions):
    """points: exponents tried for the column scales. clip: search narrower ranges, weighted by the inputs.

    search: what tells a good scale, the outputs of the "linears" it is for or of the whole "block", which is run on all
    batches for every point.
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

    The best of `candidates` by the error of the linears' own outputs (`search: linears`).
    """
    tried = (
        (scales, _output_error(rounded(weights, scales, scheme, scale_dtype), weights, statistics))
        for scales in candidates(weights, statistics, scheme, options)
    )
    return best(tried)


def candidates(weights: Sequence[Tensor], statistics: Statistics, scheme: Scheme, options: Options) -> Iterator[Tensor]:
    """Column scales f32 `[in]` worth trying, ones first, so that the best is never worse than none.

    The others are `x^r / w^(1-r)`, r = 0, 1/points, ... below 1 ("duo scaling"): x is the root mean square of each
    input, w how large its weights are in their groups. Scales are divided by sqrt(max * min); a column without inputs
    or weights keeps 1 and does not stretch the others.
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
    """Of (scales, error) pairs: the scales with the least error, the error of the first pair, and the least."""
    pairs = iter(tried)
    scales, first = next(pairs)
    least = first
    for others, error in pairs:
        if error < least:
            scales, least = others, error
    return scales, first, least


def rounded(weights: Iterable[Tensor], scales: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Iterator[Tensor]:
    """`Q(W s) / s` of each weight: what the fold makes of it, for inputs as they are without the fold."""
    for weight in weights:
        scaled = weight * scales
        scale, zero = fit_scale(scaled, scheme, scale_dtype)
        yield dequantize(quantize(scaled, scale, zero, scheme), scale, zero, scheme) / scales


def _reach(weight: Tensor, scheme: Scheme) -> Tensor:
    """Mean over rows of |w| as a share of the largest in its group, `[in]`."""
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
    """Rounding of `weight` f32 `[out, in]`, whose columns are already scaled, within clipped ranges."""
    scale, zero = fit_scale(weight, scheme, scale_dtype)
    if options.clip and scheme.group_size != "tensor":
        parts = [part.split(ROWS) for part in (weight, scale, zero)]
        found = [_clip(w, statistics.hessian, scheme, options.clip_steps, s, z) for w, s, z in zip(*parts, strict=True)]
        scale, zero = torch.cat([s for s, _ in found]), torch.cat([z for _, z in found])
    return QuantizedLinear(scheme, quantize(weight, scale, zero, scheme), scale, zero), ()


def _clip(
    weight: Tensor, hessian: Tensor, scheme: Scheme, steps: int, scale: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor]:
    """The range of each group, down to half, with the least error of that group's own contribution to the output.

    Contributions add up, and their errors may too: a row keeps the full ranges when it does better as a whole.
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
    """The best range of each group by itself, in torch, on any device."""
    blocks = _diagonal_blocks(hessian, scheme)
    error = _group_output_error(weight, blocks, scale, zero, scheme)
    for step in range(1, steps + 1):
        tried = scale_within(weight, scheme, scale.dtype, 1 - 0.5 * step / steps)
        found = _group_output_error(weight, blocks, *tried, scheme)
        better = found < error
        error = torch.where(better, found, error)
        scale, zero = torch.where(better, tried[0], scale), torch.where(better, tried[1], zero)
    return scale, zero


def _row_errors(weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """`d H d^T` of each whole row, `[out, 1]`."""
    difference = dequantize(quantize(weight, scale, zero, scheme), scale, zero, scheme) - weight
    left = difference.to(torch.bfloat16) if difference.is_cuda else difference  # two sums are compared, not kept
    return (times(left, hessian) * difference).sum(1, keepdim=True)


def _diagonal_blocks(hessian: Tensor, scheme: Scheme) -> Tensor:
    """The part of the Hessian inside each group, `[groups, width, width]`, zero where the last group is short."""
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
