"""GPTQ's column loops over one block of columns: quantization with error propagation, and coordinate descent.

`quantize_columns` quantizes the columns, and `descend_columns` rounds them once more. The functions named `_plain` are
the reference in torch; on a CUDA device a single Triton kernel launch replaces a loop of about a thousand small ones.
"""

import torch
from torch import Tensor

from exporter.numerics.quantized import ColumnGrid, dequantize, quantize


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
    weight = weight.clone()
    errors = torch.empty_like(weight)
    scale, zero, single = grid.expanded()
    for i in range(weight.shape[1]):
        column, later = slice(i, i + 1), slice(i + 1, None)
        codes[:, column] = code = quantize(weight[:, column], scale[:, column], zero[:, column], single)
        rounded = dequantize(code, scale[:, column], zero[:, column], single)
        errors[:, column] = (weight[:, column] - rounded) / upper[i, i]
        weight[:, later].addmm_(errors[:, column], upper[column, later], alpha=-1)
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
    best = weight + gradient / diagonal
    update = hessian.float() / diagonal
    scale, zero, single = grid.expanded()
    for i in range(weight.shape[1]):
        column, later = slice(i, i + 1), slice(i + 1, None)
        codes[:, column] = code = quantize(best[:, column], scale[:, column], zero[:, column], single)
        error = weight[:, column] - dequantize(code, scale[:, column], zero[:, column], single)
        best[:, later].addmm_(error - errors[:, column], update[column, later])
        errors[:, column] = error
