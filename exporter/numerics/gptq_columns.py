"""The column loops of GPTQ: one block of columns, each compensating for those before it.

`quantize_columns` walks columns for the first time and `descend_columns` rounds them once more. What ends in `_plain`
is the definition, in torch; on a CUDA device one Triton kernel launch does the same, where the loop would be a thousand
small ones.
"""

import torch
from torch import Tensor

from exporter.numerics.quantized import ColumnGrid, dequantize, quantize


def quantize_columns(rest: Tensor, upper: Tensor, grid: ColumnGrid, codes: Tensor) -> Tensor:
    """Quantize columns `rest` f32 `[out, b]` left to right, propagating each rounding error into the rest.

    upper: f32 `[b, b]`, that part of the factor U. codes: uint8 `[out, b]`, written.
    Returns the scaled errors f32 `[out, b]`, which the caller propagates into later blocks.
    """
    if grid.has_kernels:
        from exporter.numerics.gptq_columns_kernel import quantize_columns_fast

        return quantize_columns_fast(rest, upper, grid.steps, grid.scheme.levels, codes)
    return quantize_columns_plain(rest, upper, grid, codes)


def quantize_columns_plain(rest: Tensor, upper: Tensor, grid: ColumnGrid, codes: Tensor) -> Tensor:
    """`quantize_columns` in torch, on any device."""
    rest = rest.clone()
    errors = torch.empty_like(rest)
    scale, zero, single = grid.spread()
    for i in range(rest.shape[1]):
        here, later = slice(i, i + 1), slice(i + 1, None)
        codes[:, here] = found = quantize(rest[:, here], scale[:, here], zero[:, here], single)
        errors[:, here] = (rest[:, here] - dequantize(found, scale[:, here], zero[:, here], single)) / upper[i, i]
        rest[:, later].addmm_(errors[:, here], upper[here, later], alpha=-1)
    return errors


def descend_columns(
    weight: Tensor, pull: Tensor, hessian: Tensor, share: Tensor, grid: ColumnGrid, codes: Tensor, off: Tensor
) -> None:
    """Round columns `weight` f32 `[out, b]` again, left to right, given the current error of every column.

    pull: f32 `[out, b]`, the errors of all columns times the other columns' part of the Hessian; hessian: `[b, b]`,
    that part inside the block, 0 on the diagonal; share: f32 `[b]`, the diagonal. The best value of a column is
    `weight + pull / share`. codes uint8 and off, `[out, b]`, are rewritten; off is the error, `weight` minus its
    dequantized code, and a change of it changes the pull on the later columns.
    """
    if grid.has_kernels:
        from exporter.numerics.gptq_columns_kernel import descend_columns_fast

        descend_columns_fast(weight, pull, hessian, share, grid.steps, grid.scheme.levels, codes, off)
    else:
        descend_columns_plain(weight, pull, hessian, share, grid, codes, off)


def descend_columns_plain(
    weight: Tensor, pull: Tensor, hessian: Tensor, share: Tensor, grid: ColumnGrid, codes: Tensor, off: Tensor
) -> None:
    """`descend_columns` in torch, on any device."""
    best = weight + pull / share
    push = hessian.float() / share
    scale, zero, single = grid.spread()
    for i in range(weight.shape[1]):
        here, later = slice(i, i + 1), slice(i + 1, None)
        codes[:, here] = found = quantize(best[:, here], scale[:, here], zero[:, here], single)
        now = weight[:, here] - dequantize(found, scale[:, here], zero[:, here], single)
        best[:, later].addmm_(now - off[:, here], push[here, later])
        off[:, here] = now
