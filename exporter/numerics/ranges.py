"""Scales and zero points of a weight, before any integer is computed; shared by all methods.

A symmetric scheme has codes `-2**(bits-1) .. 2**(bits-1)-1` around its middle, and compressed-tensors' scale
`max|w| / ((2**bits - 1) / 2)`: half a step beyond the last positive code, so a peak loses at most half a step and
every other weight gains a finer grid.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from exporter.numerics.quantized import FP8, FP8_MAX, Scheme, float8_scales

Range = Literal["minmax", "mse"]

SHRINK_STEPS = 40
KERNEL_WIDTH = 16384  # the widest group that one Triton program holds in registers
BLOCK_WIDTH = 128  # the widest group of which it holds a part of the Hessian too
SHRINK_MOST = 0.8  # the narrowest range that is tried is 0.2 of the full one
PIECE = 1 << 17  # weights whose ranges are searched together on a CPU: what is tried stays in its cache
CUDA_PIECE = 1 << 24  # the same on a GPU, which would wait for small ones: what is tried takes 0.2 GiB


def fit_scale(
    weight: Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    range_: Range = "minmax",
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale (in `scale_dtype`) and zero (uint8), each `[out, groups]`, of `weight` f32 `[out, in]`.

    range_: "minmax" covers every weight; "mse" tries narrower ranges and keeps, group by group, the one with the least
    error. "tensor" schemes repeat one value.
    Scales of `mixed` schemes are rounded to what their engine makes of them, relative to the largest of the row.
    importance: f32 `[in]`; the error that "mse" compares is then `importance * |off|^2.5`, summed over the columns of a
    group, else `off^2`. Two and a half, since clipping a few weights costs an output more than their squares say.
    """
    scale, zero = _fitted(weight, scheme, scale_dtype, range_, importance)
    return (_as_float8(scale) if scheme.mixed else scale), zero


def _fitted(
    weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, range_: Range, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    if range_ == "mse" and weight.is_cuda and _fits_kernel(scheme, weight.shape[1]):
        return _search_fast(weight, scheme, scale_dtype, importance)
    low, high = full_range(weight, scheme)
    if range_ == "minmax":
        return _scale_of(low, high, scheme, scale_dtype)
    piece = CUDA_PIECE if weight.is_cuda else PIECE
    rows = len(weight) if scheme.group_size == "tensor" else max(1, piece // max(1, weight.shape[1]))
    pieces = zip(weight.split(rows), low.split(rows), high.split(rows), strict=True)
    found = [_search(part, least, most, scheme, scale_dtype, importance) for part, least, most in pieces]
    return torch.cat([scale for scale, _ in found]), torch.cat([zero for _, zero in found])


def _as_float8(scale: Tensor) -> Tensor:
    """The scales that an engine will make of `scale` `[out, groups]`, so that codes are computed for these."""
    eighths, row = float8_scales(scale)
    return _stored(eighths * (8 * row), scale.dtype)


def _search(
    weight: Tensor, low: Tensor, high: Tensor, scheme: Scheme, scale_dtype: torch.dtype, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scale and zero of the best range, for ends `low` and `high` `[out, groups]` of the full one."""
    grouped = _grouped(weight, scheme)
    counts = None if importance is None else _grouped(importance.unsqueeze(0), scheme)
    scale, zero = _scale_of(low, high, scheme, scale_dtype)
    error = _errors(grouped, scale, zero, scheme, counts)
    for step in range(1, SHRINK_STEPS):
        part = 1 - SHRINK_MOST * step / SHRINK_STEPS
        tried = _scale_of(low * part, high * part, scheme, scale_dtype)
        found = _errors(grouped, *tried, scheme, counts)
        better = found < error
        error = torch.where(better, found, error)
        scale = torch.where(better, tried[0], scale)
        zero = torch.where(better, tried[1], zero)
    return scale, zero


def scale_within(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, share: float) -> tuple[Tensor, Tensor]:
    """Scale and zero for `share` of each group's full range; weights beyond it will be clipped."""
    low, high = full_range(weight, scheme)
    return _scale_of(low * share, high * share, scheme, scale_dtype)


def clip_fast(
    weight: Tensor, hessian: Tensor, scheme: Scheme, scale_dtype: torch.dtype, steps: int
) -> tuple[Tensor, Tensor] | None:
    """Ranges down to half, by the output error of each group alone (`methods.awq`); None where no kernel does it."""
    narrow_enough = isinstance(scheme.group_size, int) and 16 <= scheme.group_size <= BLOCK_WIDTH
    if not weight.is_cuda or scheme.number != "int" or not narrow_enough:
        return None
    from triton.runtime.errors import OutOfResources

    try:
        return _launch(weight, scheme, scale_dtype, 0.5 / steps, steps + 1, hessian=hessian)
    except OutOfResources:  # a card with little shared memory
        return None


def _fits_kernel(scheme: Scheme, columns: int) -> bool:
    one_row = scheme.group_size != "tensor"  # what a tensor shares, programs that see a few rows each cannot choose
    return scheme.number == "int" and one_row and scheme.columns_per_group(columns) <= KERNEL_WIDTH


def _search_fast(
    weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same search in one pass over the weights."""
    return _launch(weight, scheme, scale_dtype, SHRINK_MOST / SHRINK_STEPS, SHRINK_STEPS, importance)


def _launch(
    weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, shrink: float, steps: int, *measure: Any, **more: Any
) -> tuple[Tensor, Tensor]:
    from exporter.numerics.ranges_kernel import launch

    sizes = (scheme.columns_per_group(weight.shape[1]), scheme.levels, scheme.middle, scheme.symmetric)
    return launch(weight, *sizes, scale_dtype, least_scale(scale_dtype), shrink, steps, *measure, **more)


def _grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """`[out, in]` as `[out, groups, columns of a group]`, zeros where the last group is short."""
    rows, columns = weight.shape
    groups, width = scheme.groups(columns), scheme.columns_per_group(columns)
    return torch.nn.functional.pad(weight, (0, groups * width - columns)).view(rows, groups, width)


def full_range(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each group, `[out, groups]`; the range always includes 0."""
    grouped = _grouped(weight, scheme)
    low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
    if scheme.group_size == "tensor":
        low, high = low.amin().expand_as(low), high.amax().expand_as(high)
    return low, high


def _scale_of(low: Tensor, high: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale, rounded to its stored dtype, then the zero point that fits that scale."""
    peak = torch.maximum(-low, high)
    if scheme.number == "fp8":
        return _stored(peak / FP8_MAX, scale_dtype), torch.zeros_like(peak, dtype=torch.uint8)
    if scheme.symmetric:
        return _stored(2 * peak / scheme.levels, scale_dtype), torch.full_like(peak, scheme.middle, dtype=torch.uint8)
    scale = _stored((high - low) / scheme.levels, scale_dtype)
    return scale, torch.round(-low / scale.float()).clamp(0, scheme.levels).to(torch.uint8)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to `dtype`, never 0 or infinite: codes are divided by it.

    Scales of small float16 weights are subnormal numbers, multiples of 2^-24, rounded up so that the range is covered.
    Weights of a float16 checkpoint are such multiples too, so that none of them gets lost. The subnormal numbers of
    other types are too small to matter, and are not used.
    """
    info, least = torch.finfo(dtype), least_scale(dtype)
    small = (scale / least).ceil_().clamp_min_(1).mul_(least)
    return torch.where(scale < info.smallest_normal, small, scale).clamp_(max=info.max).to(dtype)


def least_scale(dtype: torch.dtype) -> float:
    """The smallest scale that is stored in `dtype`; those below its normal numbers are multiples of it."""
    return 2.0**-24 if dtype == torch.float16 else float(torch.finfo(dtype).smallest_normal)


def _errors(grouped: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme, counts: Tensor | None) -> Tensor:
    """Rounding error of each group, `[out, groups]` (of everything, repeated, for "tensor"); see `fit_scale`.

    grouped: `[out, groups, width]`. counts: `[1, groups, width]`, importance of each column. What `quantize` and
    `dequantize` would say, without the codes in between.
    """
    steps, zeros = scale.float().unsqueeze(-1), zero.float().unsqueeze(-1)
    off = grouped / steps
    if scheme.number == "fp8":
        off = off.clamp_(-FP8_MAX, FP8_MAX).to(FP8).float()
    else:
        off.round_().add_(zeros).clamp_(0, scheme.levels).sub_(zeros)
    off.mul_(steps).sub_(grouped)
    if counts is None:
        errors = off.square_().sum(-1)
    else:
        size = off.abs_().sqrt()
        errors = off.square_().mul_(size).mul_(counts).sum(-1)
    return errors.sum().expand_as(errors) if scheme.group_size == "tensor" else errors
