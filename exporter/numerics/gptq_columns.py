"""GPTQ's column loops over one block of columns: quantization with error propagation, and coordinate descent.

`quantize_columns` quantizes the columns, and `descend_columns` rounds them once more. The functions named `_plain` are
the reference in torch; on a CUDA device a single Triton kernel launch replaces a loop of about a thousand small ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.lazy_torch import torch
from exporter.numerics.quantized import ColumnGrid, Scheme

if TYPE_CHECKING:
    from torch import Tensor


def quantize_columns(weight: Tensor, upper: Tensor, grid: ColumnGrid, codes: Tensor) -> Tensor:
    """Quantize columns `weight` f32 `[out, b]` left to right, propagating each rounding error into the later columns.

    upper: f32 `[b, b]`, this block of the factor U. codes: uint8 `[out, b]`, written. Returns the scaled errors f32
    `[out, b]`, which the caller propagates into later blocks.
    """
    if grid.has_kernels:
        from exporter.numerics.gptq_columns_kernel import quantize_columns_fast

        return quantize_columns_fast(weight, upper, grid.steps, grid.scheme.levels, codes)
    return quantize_columns_plain(weight, upper, grid, codes)


def quantize_columns_plain(weight: Tensor, upper: Tensor, grid: ColumnGrid, codes: Tensor) -> Tensor:
    """`quantize_columns` in torch, on any device."""
    weight, values, errors = weight.clone(), torch.empty_like(weight), torch.empty_like(weight)
    columns = zip(*(tensor.split(1, dim=1) for tensor in (weight, values, errors, *_steps(grid))), strict=True)
    for i, (column, value, error, scale, zero, empty) in enumerate(columns):
        rounded = _round_column(column, scale, zero, empty, grid.scheme, value)
        error.copy_((column - rounded) / upper[i, i])
        weight[:, i + 1 :].addmm_(error, upper[i : i + 1, i + 1 :], alpha=-1)
    codes.copy_(_as_codes(values, grid.scheme))
    return errors


def descend_columns(
    weight: Tensor, gradient: Tensor, hessian: Tensor, diagonal: Tensor, grid: ColumnGrid, codes: Tensor, errors: Tensor
) -> None:
    """Round columns `weight` f32 `[out, b]` again, left to right, given the current errors of all columns.

    gradient: f32 `[out, b]`, the errors of all columns times the Hessian without its diagonal. hessian: `[b, b]`, this
    block of the Hessian with a zero diagonal. diagonal: f32 `[b]`, the Hessian's diagonal. The optimal value of a
    column is `weight + gradient / diagonal`. codes (uint8) and errors, `[out, b]`, are rewritten; errors is `weight`
    minus the dequantized codes, and its changes update the gradient of later columns.
    """
    if grid.has_kernels:
        from exporter.numerics.gptq_columns_kernel import descend_columns_fast

        descend_columns_fast(weight, gradient, hessian, diagonal, grid.steps, grid.scheme.levels, codes, errors)
    else:
        descend_columns_plain(weight, gradient, hessian, diagonal, grid, codes, errors)


def descend_columns_plain(
    weight: Tensor, gradient: Tensor, hessian: Tensor, diagonal: Tensor, grid: ColumnGrid, codes: Tensor, errors: Tensor
) -> None:
    """`descend_columns` in torch, on any device."""
    best, values = weight + gradient / diagonal, torch.empty_like(weight)
    update = hessian.float() / diagonal
    tensors = (best, weight, values, errors, *_steps(grid))
    columns = zip(*(tensor.split(1, dim=1) for tensor in tensors), strict=True)
    for i, (optimum, column, value, error, scale, zero, empty) in enumerate(columns):
        new_error = column - _round_column(optimum, scale, zero, empty, grid.scheme, value)
        best[:, i + 1 :].addmm_(new_error - error, update[i : i + 1, i + 1 :])
        error.copy_(new_error)
    codes.copy_(_as_codes(values, grid.scheme))


def _steps(grid: ColumnGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Scale f32, zero f32, and whether the scale is 0, of every column, each `[out, b]`."""
    scale, zero, _ = grid.expanded()
    scale = scale.float()
    return scale, zero.float(), scale == 0


def _round_column(column: Tensor, scale: Tensor, zero: Tensor, empty: Tensor, scheme: Scheme, values: Tensor) -> Tensor:
    """The dequantized nearest codes of one column; every argument is `[out, 1]`, and `values` gets the codes as f32.

    The numbers are those of `quantize` and `dequantize`, which would expand the groups again for every column.
    """
    ratio = torch.div(column, scale, out=values).masked_fill_(empty, 0.0)
    if scheme.grid:
        return values.copy_(scheme.grid.round(ratio)) * scale
    return (ratio.round_().add_(zero).clamp_(0, scheme.levels) - zero).mul_(scale)


def _as_codes(values: Tensor, scheme: Scheme) -> Tensor:
    """The `values` of `_round_column` as codes, uint8."""
    return scheme.grid.encode(values) if scheme.grid else values.to(torch.uint8)
