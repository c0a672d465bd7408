"""Column loops of GPTQ: quantize one block of columns, with error compensation between its columns.

`quantize_columns` is the first pass, `descend_columns` rounds the columns again. The `_plain` functions define the
result, in torch. On a CUDA device, one Triton kernel replaces the thousand small launches of the torch loop.
"""

import torch
from torch import Tensor

from exporter.numerics.quantized import ColumnGrid, dequantize, quantize


def quantize_columns(weight: Tensor, upper: Tensor, grid: ColumnGrid, codes: Tensor) -> Tensor:
    """Quantize columns `weight` f32 `[out, b]` left to right, propagating each rounding error into the remaining ones.

    upper: f32 `[b, b]`, the block of the factor U. codes: uint8 `[out, b]`, written.
    Returns the scaled errors f32 `[out, b]`, which the caller propagates into later blocks.
    """
    if grid.has_kernels:
        from exporter.numerics.gptq_columns_kernel import quantize_columns_fast

        return quantize_columns_fast(weight, upper, grid.steps, grid.scheme.levels, codes)
    return quantize_columns_plain(weight, upper, grid, codes)


def quantize_columns_plain(weight: Tensor, upper: Tensor, grid: ColumnGrid, codes: Tensor) -> Tensor:
    """`quantize_columns` in torch, on any device."""
    weight = weight.clone()
    errors = torch.empty_like(weight)
    scale, zero, single = grid.spread()
    for i in range(weight.shape[1]):
        column, later = slice(i, i + 1), slice(i + 1, None)
        codes[:, column] = column_codes = quantize(weight[:, column], scale[:, column], zero[:, column], single)
        errors[:, column] = (
            weight[:, column] - dequantize(column_codes, scale[:, column], zero[:, column], single)
        ) / upper[i, i]
        weight[:, later].addmm_(errors[:, column], upper[column, later], alpha=-1)
    return errors


def descend_columns(
    weight: Tensor, pull: Tensor, hessian: Tensor, share: Tensor, grid: ColumnGrid, codes: Tensor, errors: Tensor
) -> None:
    """Round columns `weight` f32 `[out, b]` again, left to right, given the current error of every column.

    pull: f32 `[out, b]`, the errors of all columns times the Hessian without its diagonal. hessian: `[b, b]`, the
    Hessian inside the block, 0 on the diagonal. share: f32 `[b]`, the diagonal. The best value of a column is
    `weight + pull / share`. codes: uint8 `[out, b]`, rewritten. errors: `[out, b]`, rewritten; `weight` minus the
    dequantized codes. A changed error changes the pull on later columns.
    """
    if grid.has_kernels:
        from exporter.numerics.gptq_columns_kernel import descend_columns_fast

        descend_columns_fast(weight, pull, hessian, share, grid.steps, grid.scheme.levels, codes, errors)
    else:
        descend_columns_plain(weight, pull, hessian, share, grid, codes, errors)


def descend_columns_plain(
    weight: Tensor, pull: Tensor, hessian: Tensor, share: Tensor, grid: ColumnGrid, codes: Tensor, errors: Tensor
) -> None:
    """`descend_columns` in torch, on any device."""
    best = weight + pull / share
    push = hessian.float() / share
    scale, zero, single = grid.spread()
    for i in range(weight.shape[1]):
        column, later = slice(i, i + 1), slice(i + 1, None)
        codes[:, column] = column_codes = quantize(best[:, column], scale[:, column], zero[:, column], single)
        error = weight[:, column] - dequantize(column_codes, scale[:, column], zero[:, column], single)
        best[:, later].addmm_(error - errors[:, column], push[column, later])
        errors[:, column] = error
