"""Scales and zero points of a weight, before any integer is computed; shared by all methods.

A symmetric scheme has codes `-2**(bits-1) .. 2**(bits-1)-1` around its middle, and compressed-tensors' scale
`max|w| / ((2**bits - 1) / 2)`: half a step beyond the last positive code, so a peak loses at most half a step and
every other weight gains a finer grid.
"""

from typing import Literal

import torch
from torch import Tensor

from exporter.quantized import FP8_MAX, Scheme, dequantize, quantize

Range = Literal["minmax", "mse"]

SHRINK_STEPS = 40
KERNEL_WIDTH = 1024  # the widest group that one Triton program holds in registers
SHRINK_MOST = 0.8  # the narrowest range that is tried is 0.2 of the full one


def fit_scale(
    weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, range_: Range = "minmax"
) -> tuple[Tensor, Tensor]:
    """Scale (in `scale_dtype`) and zero (uint8), each `[out, groups]`, of `weight` f32 `[out, in]`.

    range_: "minmax" covers every weight; "mse" tries narrower ranges and keeps, group by group, the one whose rounding
    has the smallest squared error. "tensor" schemes repeat one value.
    """
    if range_ == "mse" and weight.is_cuda and _fits_kernel(scheme):
        return _search_fast(weight, scheme, scale_dtype)
    low, high = _extremes(weight, scheme)
    scale, zero = _scale_of(low, high, scheme, scale_dtype)
    if range_ == "minmax":
        return scale, zero
    error = _group_errors(weight, scale, zero, scheme)
    for step in range(1, SHRINK_STEPS):
        part = 1 - SHRINK_MOST * step / SHRINK_STEPS
        tried = _scale_of(low * part, high * part, scheme, scale_dtype)
        found = _group_errors(weight, *tried, scheme)
        better = found < error
        error = torch.where(better, found, error)
        scale = torch.where(better, tried[0], scale)
        zero = torch.where(better, tried[1], zero)
    return scale, zero


def scale_within(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, share: float) -> tuple[Tensor, Tensor]:
    """Scale and zero for `share` of each group's full range; weights beyond it will be clipped."""
    low, high = _extremes(weight, scheme)
    return _scale_of(low * share, high * share, scheme, scale_dtype)


def _fits_kernel(scheme: Scheme) -> bool:
    return scheme.number == "int" and isinstance(scheme.group_size, int) and scheme.group_size <= KERNEL_WIDTH


def _search_fast(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same search in one pass over the weights."""
    from exporter.ranges_kernel import launch

    width, shrink = scheme.columns_per_group(weight.shape[1]), SHRINK_MOST / SHRINK_STEPS
    sizes = (width, scheme.levels, scheme.middle, scheme.symmetric)
    return launch(weight, *sizes, scale_dtype, shrink, SHRINK_STEPS)


def _extremes(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each group, `[out, groups]`; the range always includes 0."""
    rows, columns = weight.shape
    groups = scheme.groups(columns)
    missing = groups * scheme.columns_per_group(columns) - columns
    grouped = torch.nn.functional.pad(weight, (0, missing)).view(rows, groups, -1)
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
    """Rounded to `dtype`, never 0, subnormal or infinite: kernels flush subnormals, and codes divide by it."""
    info = torch.finfo(dtype)
    return scale.clamp(info.smallest_normal, info.max).to(dtype)


def _group_errors(weight: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """Squared rounding error of each group, `[out, groups]` (of everything, repeated, for "tensor")."""
    rows, columns = weight.shape
    difference = dequantize(quantize(weight, scale, zero, scheme), scale, zero, scheme) - weight
    missing = scheme.groups(columns) * scheme.columns_per_group(columns) - columns
    errors = torch.nn.functional.pad(difference.square(), (0, missing)).view(rows, scheme.groups(columns), -1).sum(-1)
    return errors.sum().expand_as(errors) if scheme.group_size == "tensor" else errors
