"""The column loops of GPTQ: one block of columns, each compensating for those before it.

`quantize_columns` walks columns for the first time and `descend_columns` rounds them once more. What ends in `_plain`
is the definition, in torch; on a CUDA device one Triton kernel launch does the same, where the loop would be a thousand
small ones.
"""

import torch
from torch import Tensor

from exporter.quantized import Grid, dequantize, quantize


def quantize_columns(rest: Tensor, upper: Tensor, grid: Grid, codes: Tensor) -> Tensor:
    """Round columns `rest` f32 `[out, b]` one after the other; what each is off by changes those after it.

    upper: f32 `[b, b]`, that part of the factor U. codes: uint8 `[out, b]`, written.
    Returns the scaled errors f32 `[out, b]` that later blocks must make up for.
    """
    if grid.has_kernels:
        from exporter.columns_kernel import quantize_columns_fast

        return quantize_columns_fast(rest, upper, grid.steps, grid.scheme.levels, codes)
    return quantize_columns_plain(rest, upper, grid, codes)


def quantize_columns_plain(rest: Tensor, upper: Tensor, grid: Grid, codes: Tensor) -> Tensor:
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
    weight: Tensor, pull: Tensor, hessian: Tensor, share: Tensor, grid: Grid, codes: Tensor, off: Tensor
) -> None:
    """Round columns `weight` f32 `[out, b]` again, one after the other, given how far all columns are off by now.

    pull: f32 `[out, b]`, the product of all that is off with the other columns' part of the Hessian; hessian: `[b, b]`,
    that part inside the block, 0 on the diagonal; share: f32 `[b]`, the diagonal. The best value of a column is
    `weight + pull / share`. codes uint8 and off, `[out, b]`, are rewritten; off is `weight` less what its code stands
    for, and a change of it changes the pull on the columns after it.
    """
    if grid.has_kernels:
        from exporter.columns_kernel import descend_columns_fast

        descend_columns_fast(weight, pull, hessian, share, grid.steps, grid.scheme.levels, codes, off)
    else:
        descend_columns_plain(weight, pull, hessian, share, grid, codes, off)


def descend_columns_plain(
    weight: Tensor, pull: Tensor, hessian: Tensor, share: Tensor, grid: Grid, codes: Tensor, off: Tensor
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
