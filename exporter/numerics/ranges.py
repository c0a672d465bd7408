"""Ranges of a weight's groups: their scales and zero points, for all methods, before codes are computed.

A symmetric scheme has codes `-2**(bits-1) .. 2**(bits-1)-1` around its middle, and compressed-tensors' scale
`max|w| / ((2**bits - 1) / 2)`. Its range ends half a step beyond the last positive code, so the largest weight has an
error of at most half a step, and all other weights get a finer grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from exporter.lazy_torch import torch
from exporter.numerics.float_grids import common_factor, float8_multiples, four_digits, power_of_two
from exporter.numerics.quantized import BLOCK, Scheme, float8_scales

if TYPE_CHECKING:
    from torch import Tensor

Range = Literal["minmax", "mse", "signed"]

SHRINK_STEPS = 40
KERNEL_WIDTH = 16384  # widest group that one Triton program holds in registers
BLOCK_WIDTH = 128  # widest group for which it also holds a block of the Hessian
MAX_SHRINK = 0.8  # the narrowest candidate range is 0.2 of the full range
PIECE = 1 << 17  # weights per search on a CPU, so that the candidates stay in the cache
CUDA_PIECE = 1 << 24  # weights per search on a GPU, where small searches are slow; the candidates take 0.2 GiB


def fit_scale(
    weight: Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    range_: Range = "minmax",
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale (in `scale_dtype`) and zero (uint8), each `[out, groups]`, of `weight` f32 `[out, in]`.

    range_: "minmax" covers every weight; "mse" tries narrower ranges and keeps the one with the smallest error per
    group; "signed" tries them with scales of either sign: a symmetric scheme has one code more below zero than above,
    and a negative scale moves it to the other side of the range. "tensor" schemes repeat one value, "block" schemes one
    for 128 rows. Scales of `mixed` schemes are rounded as vLLM will round them; those of nvfp4, mxfp4 and mxfp8 are
    f32 numbers that the formats of these schemes have. importance: f32 `[in]`. With it, "mse" and "signed" minimize the
    sum of `importance * |error|^2.5` over the columns of a group, without it the sum of `error^2`. The exponent exceeds
    2 because clipping a few weights harms the output more than their squared errors suggest.
    """
    if range_ == "signed":
        return _with_sign(weight, scheme, scale_dtype, importance)
    scale, zero = _fitted(weight, scheme, scale_dtype, range_, importance)
    if scheme.number == "nvfp4":
        return float8_multiples(scale, common_factor(float(scale.max()))), zero
    return (_as_float8(scale) if scheme.mixed else scale), zero


def _with_sign(
    weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The best range of an integer scheme; of a symmetric one with a scale of either sign.

    A negative scale is the positive scale of the negated weights, so both searches are the same.
    """
    scale, zero = fit_scale(weight, scheme, scale_dtype, "mse", importance)
    if not scheme.symmetric:
        return scale, zero
    mirrored, _ = fit_scale(-weight, scheme, scale_dtype, "mse", importance)
    counts = None if importance is None else _grouped(importance.unsqueeze(0), scheme)
    pieces = zip(*(tensor.split(_rows(weight, scheme)) for tensor in (weight, scale, mirrored, zero)), strict=True)
    better = [
        _errors(_grouped(-part, scheme), other, middle, scheme, counts)
        < _errors(_grouped(part, scheme), plain, middle, scheme, counts)
        for part, plain, other, middle in pieces
    ]
    return torch.where(torch.cat(better), -mirrored, scale), zero


def _fitted(
    weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, range_: Range, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    if range_ == "mse" and weight.is_cuda and _fits_kernel(scheme, weight.shape[1]):
        return _search_fast(weight, scheme, scale_dtype, importance)
    low, high = full_range(weight, scheme)
    if range_ == "minmax":
        return _scale_of(low, high, scheme, scale_dtype)
    pieces = zip(*(tensor.split(_rows(weight, scheme)) for tensor in (weight, low, high)), strict=True)
    fitted = [_search(part, least, most, scheme, scale_dtype, importance) for part, least, most in pieces]
    return torch.cat([scale for scale, _ in fitted]), torch.cat([zero for _, zero in fitted])


def _rows(weight: Tensor, scheme: Scheme) -> int:
    """The number of rows per search."""
    piece = CUDA_PIECE if weight.is_cuda else PIECE
    rows = max(1, piece // max(1, weight.shape[1]))
    return len(weight) if scheme.group_size == "tensor" else -(-rows // BLOCK) * BLOCK if _in_blocks(scheme) else rows


def _as_float8(scale: Tensor) -> Tensor:
    """`scale` `[out, groups]` rounded as vLLM rounds it, so that codes are computed with the rounded scales."""
    eighths, row = float8_scales(scale)
    return _stored(eighths * (8 * row), scale.dtype)


def _search(
    weight: Tensor, low: Tensor, high: Tensor, scheme: Scheme, scale_dtype: torch.dtype, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scale and zero of the best range; `low` and `high` `[out, groups]` are the ends of the full range."""
    grouped = _grouped(weight, scheme)
    counts = None if importance is None else _grouped(importance.unsqueeze(0), scheme)
    scale, zero = _scale_of(low, high, scheme, scale_dtype)
    error = _errors(grouped, scale, zero, scheme, counts)
    for step in range(1, SHRINK_STEPS):
        part = 1 - MAX_SHRINK * step / SHRINK_STEPS
        candidate = _scale_of(low * part, high * part, scheme, scale_dtype)
        candidate_error = _errors(grouped, *candidate, scheme, counts)
        better = candidate_error < error
        error = torch.where(better, candidate_error, error)
        scale = torch.where(better, candidate[0], scale)
        zero = torch.where(better, candidate[1], zero)
    return scale, zero


def scale_within(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, share: float) -> tuple[Tensor, Tensor]:
    """Scale and zero for `share` of each group's full range; weights outside of it will be clipped."""
    low, high = full_range(weight, scheme)
    return _scale_of(low * share, high * share, scheme, scale_dtype)


def clip_fast(
    weight: Tensor, hessian: Tensor, scheme: Scheme, scale_dtype: torch.dtype, steps: int
) -> tuple[Tensor, Tensor] | None:
    """Best ranges down to half of the full range, by each group's own output error (`methods.awq`), from a kernel.

    None when no Triton kernel supports the device or the scheme.
    """
    narrow_enough = isinstance(scheme.group_size, int) and 16 <= scheme.group_size <= BLOCK_WIDTH
    if not weight.is_cuda or scheme.number != "int" or not narrow_enough:
        return None
    from triton.runtime.errors import OutOfResources

    try:
        return _launch(weight, scheme, scale_dtype, 0.5 / steps, steps + 1, hessian=hessian)
    except OutOfResources:  # the GPU has too little shared memory
        return None


def _fits_kernel(scheme: Scheme, columns: int) -> bool:
    one_row = scheme.group_size != "tensor"  # a program has only a few rows, so it cannot choose a range for all
    return scheme.number == "int" and one_row and scheme.columns_per_group(columns) <= KERNEL_WIDTH


def _search_fast(
    weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`_search` as a kernel, in one pass over the weights."""
    return _launch(weight, scheme, scale_dtype, MAX_SHRINK / SHRINK_STEPS, SHRINK_STEPS, importance)


def _launch(
    weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, shrink: float, steps: int, *measure: Any, **more: Any
) -> tuple[Tensor, Tensor]:
    from exporter.numerics.ranges_kernel import launch

    sizes = (scheme.columns_per_group(weight.shape[1]), scheme.levels, scheme.middle, scheme.symmetric)
    return launch(weight, *sizes, scale_dtype, least_scale(scale_dtype), shrink, steps, *measure, **more)


def _grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """`[out, in]` as `[out, groups, columns of a group]`, with zeros where the last group is short."""
    rows, columns = weight.shape
    groups, width = scheme.groups(columns), scheme.columns_per_group(columns)
    return torch.nn.functional.pad(weight, (0, groups * width - columns)).view(rows, groups, width)


def full_range(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each group, `[out, groups]`; the range always includes 0."""
    grouped = _grouped(weight, scheme)
    low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
    if scheme.group_size == "tensor":
        low, high = low.amin().expand_as(low), high.amax().expand_as(high)
    if _in_blocks(scheme):
        low, high = -_by_block(-low, torch.amax), _by_block(high, torch.amax)
    return low, high


def _in_blocks(scheme: Scheme) -> bool:
    return scheme.group_size == "block"


def _by_block(values: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """`values` `[out, groups]`, all at least 0, reduced over every 128 rows and repeated to these rows."""
    rows, groups = values.shape
    padded = torch.nn.functional.pad(values, (0, 0, 0, -rows % BLOCK)).view(-1, BLOCK, groups)
    return reduce(padded, 1).repeat_interleave(BLOCK, 0)[:rows]


def _scale_of(low: Tensor, high: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale, rounded to its stored dtype, and the zero point for this rounded scale."""
    peak = torch.maximum(-low, high)
    if scheme.grid:
        return _float_scale(peak / scheme.grid.largest, scheme, scale_dtype), torch.zeros_like(peak, dtype=torch.uint8)
    if scheme.symmetric:
        return _stored(2 * peak / scheme.levels, scale_dtype), torch.full_like(peak, scheme.middle, dtype=torch.uint8)
    scale = _stored((high - low) / scheme.levels, scale_dtype)
    return scale, torch.round(-low / scale.float()).clamp(0, scheme.levels).to(torch.uint8)


def _float_scale(scale: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """A scale of a float grid, rounded to the numbers that its format has."""
    if scheme.number == "nvfp4":
        return four_digits(scale)
    if scheme.powers_of_two:
        powers = power_of_two(scale)
        return powers if scheme.number != "fp8" else powers.clamp_min_(least_scale(dtype)).to(dtype)
    return _stored(scale, dtype)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale rounded to `dtype`, never 0 or infinite, because weights are divided by it.

    Scales of small float16 weights are subnormal numbers, multiples of 2^-24, rounded up so that they cover the range.
    A float16 checkpoint's weights are such multiples too, so none of them is lost. The subnormal numbers of other
    dtypes are too small to matter and are not used.
    """
    info, least = torch.finfo(dtype), least_scale(dtype)
    small = (scale / least).ceil_().clamp_min_(1).mul_(least)
    return torch.where(scale < info.smallest_normal, small, scale).clamp_(max=info.max).to(dtype)


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale of either sign rounded to `dtype`, never 0 or infinite."""
    return torch.where(scale < 0, -_stored(-scale, dtype), _stored(scale, dtype))


def least_scale(dtype: torch.dtype) -> float:
    """The smallest scale that is stored in `dtype`; scales below its normal numbers are multiples of it."""
    return 2.0**-24 if dtype == torch.float16 else float(torch.finfo(dtype).smallest_normal)


def _errors(grouped: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme, counts: Tensor | None) -> Tensor:
    """Rounding error of each group, `[out, groups]` (of all groups, repeated, for "tensor"); see `fit_scale`.

    grouped: `[out, groups, width]`. counts: `[1, groups, width]`, importance of each column. Equals the error after
    `quantize` and `dequantize`, without computing codes.
    """
    steps, zeros = scale.float().unsqueeze(-1), zero.float().unsqueeze(-1)
    difference = grouped / steps
    if scheme.grid:
        difference = scheme.grid.round(difference)
    else:
        difference.round_().add_(zeros).clamp_(0, scheme.levels).sub_(zeros)
    difference.mul_(steps).sub_(grouped)
    if counts is None:
        errors = difference.square_().sum(-1)
    else:
        size = difference.abs_().sqrt()
        errors = difference.square_().mul_(size).mul_(counts).sum(-1)
    if _in_blocks(scheme):
        return _by_block(errors, torch.sum)
    return errors.sum().expand_as(errors) if scheme.group_size == "tensor" else errors
