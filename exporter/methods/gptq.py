"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column and compensate the error in later columns.

For inputs x, the output error of a linear layer is `tr(D H D^T)` with `D = W - Q` and `H = mean x x^T`. Rows are
independent, so linear layers that share an input may be stacked along `out` in one call.
"""

from itertools import pairwise
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from exporter.methods.options import MethodOptions
from exporter.numerics.gptq_columns import descend_columns, quantize_columns
from exporter.numerics.hessian import Statistics, times
from exporter.numerics.inverse_cholesky import PANEL, cut, inverse_factor_
from exporter.numerics.quantized import ColumnGrid, QuantizedLinear, Scheme, dequantize, quantize
from exporter.numerics.ranges import Range, fit_scale

__all__ = ["VERSION", "Options", "Statistics", "quantize_linear"]

VERSION = 4
DAMPING_TRIES = 6


class Options(MethodOptions):
    """Options of GPTQ in a recipe.

    damping: share of the mean diagonal added to the diagonal; grows tenfold while the factorization fails.
    block: columns per lazy batch update; does not change the result. A kernel holds a block in registers.
    order: "activation" starts with the columns of the largest inputs. Groups keep their columns and scales come from
        the original weight, so the artifact stores no index and vLLM accepts it.
    scales: "in_loop" fits a group's scale to its updated weights when the loop reaches it, "static" to the original
        weights.
    range: as in `ranges.fit_scale`; "mse" weights a column's error by the share that later columns cannot compensate.
    descent: number of passes that round every column again, given the errors of all others.
    """

    damping: float = Field(0.01, gt=0, le=1)
    block: int = Field(128, ge=1, le=1024)
    order: Literal["none", "activation"] = "activation"
    scales: Literal["static", "in_loop"] = "static"
    range_: Range = Field("mse", alias="range")
    descent: int = Field(1, ge=0, le=10)

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.order == "activation" and self.scales == "in_loop":
            raise ValueError(
                "scales: in_loop needs order: none (without it the order is activation, with static scales)"
            )
        return self

    @property
    def scales_in_loop(self) -> bool:
        """Whether a group's scale is computed only after the previous columns are rounded."""
        return self.scales == "in_loop"


def quantize_linear(
    weight: Tensor, statistics: Statistics, scheme: Scheme, options: Options, scale_dtype: torch.dtype
) -> tuple[QuantizedLinear, tuple[str, ...]]:
    """Quantize `weight` f32 `[out, in]` with GPTQ. Notes report larger damping, or a fallback to rounding.

    Columns whose input is always 0 are rounded to nearest and do not influence other columns.
    """
    order = torch.arange(weight.shape[1], device=weight.device)
    if options.order == "activation":
        order = statistics.hessian.diagonal().argsort(descending=True, stable=True)
    upper, notes = inverse_factor(statistics.hessian, options.damping, order)
    counts = None if upper is None else importance(statistics.hessian, upper, options.damping, order)
    scale, zero = fit_scale(weight, scheme, scale_dtype, options.range_, counts)
    if upper is None:
        return QuantizedLinear(scheme, quantize(weight, scale, zero, scheme), scale, zero), notes
    grid = ColumnGrid(scheme, scale, zero, order // scheme.columns_per_group(len(order)))
    codes = _walk(weight.index_select(1, order), upper, grid, options, counts)
    del upper  # as large as the Hessian
    if options.descent and not notes:  # without a positive definite Hessian the error has no minimum
        descend_(codes, weight.index_select(1, order), statistics.hessian, grid, options, order)
    return QuantizedLinear(scheme, codes.index_select(1, order.argsort()), scale, zero), notes


def importance(hessian: Tensor, upper: Tensor, damping: float, order: Tensor) -> Tensor:
    """Weight of each column's error after compensation by later columns, f32 `[in]`, mean 1.

    The output error is `sum(error^2 / U_ii^2)` over the columns in processing order. A column whose input is always 0
    does not contribute; its weight is multiplied by `damping`.
    """
    counts = upper.diagonal().square().reciprocal()
    counts = torch.empty_like(counts).index_copy_(0, order, counts)
    counts = torch.where(hessian.diagonal() == 0, damping * counts, counts)
    return counts / counts.mean()


def descend_(codes: Tensor, weight: Tensor, hessian: Tensor, grid: ColumnGrid, options: Options, order: Tensor) -> None:
    """Coordinate descent: round every column again, given the rounding errors of all others; `options.descent` times.

    With `D = W - Q` and the damped H, the best value of column j is `w_j + sum(D_i H_ij, i != j) / H_jj`, so
    `tr(D H D^T)` never grows, except by rounding of the products. One product computes the influence of all columns on
    a block; inside the block, the column loop propagates changes.
    codes (rewritten) and weight f32 are `[out, in]` in processing order; hessian is in the original order.
    """
    dtype = (
        torch.bfloat16 if weight.is_cuda else torch.float32
    )  # dtype of the products; the rounded values stay float32
    share = damped(hessian.diagonal(), options.damping)[order]
    hessian = _permuted(hessian, order, dtype)
    hessian.diagonal().zero_()
    errors = torch.empty_like(weight, dtype=dtype)
    for part in cut(len(order), PANEL):
        errors[:, part] = weight[:, part] - dequantize(codes[:, part], *grid.part(part).spread())
    for part in [*cut(len(order), options.block)] * options.descent:
        pull = times(errors, hessian[part].T)
        own = (weight[:, part], pull, hessian[part, part], share[part])
        descend_columns(*own, grid.part(part), codes[:, part], errors[:, part])


def damped(diagonal: Tensor, damping: float) -> Tensor:
    """Add `damping` times the mean to the diagonal of a Hessian; zero entries are first replaced by the mean."""
    nonzero = diagonal != 0
    mean = torch.where(nonzero.any(), diagonal.sum() / nonzero.sum(), 1.0)
    return torch.where(nonzero, diagonal, mean) + damping * mean


def inverse_factor(
    hessian: Tensor, damping: float, order: Tensor | None = None
) -> tuple[Tensor | None, tuple[str, ...]]:
    """The upper triangular U with `U^T U = (H + damping)^-1`, and notes; None if every damping fails.

    order: int64 `[in]`, the columns in processing order. A column whose input is always 0 gets the mean of the others
    on the diagonal, so that it influences neither other columns nor the damping.
    """
    order = torch.arange(len(hessian), device=hessian.device) if order is None else order
    for attempt in range(DAMPING_TRIES):
        share = damping * 10**attempt
        upper = _permuted(hessian, order, torch.float32)
        upper.diagonal().copy_(damped(upper.diagonal(), share))
        if inverse_factor_(upper):
            notes = (f"damping grew to {share:g} until the Hessian could be factorized",) if attempt else ()
            return upper, notes
        del upper
    return None, ("the Hessian could not be factorized: rounded to nearest instead",)


def _permuted(square: Tensor, order: Tensor, dtype: torch.dtype) -> Tensor:
    """Permute rows and columns of `square` `[n, n]` by `order` int64 `[n]`.

    Equals `square[order[:, None], order]`, which on a GPU would first expand both indices for every element: 1.8 GiB at
    the 11,008 inputs of a 7B model.
    """
    result = torch.empty_like(square, dtype=dtype)
    for part in cut(len(order), PANEL):
        result[part] = square.index_select(0, order[part]).index_select(1, order)
    return result


def _walk(weight: Tensor, upper: Tensor, grid: ColumnGrid, options: Options, counts: Tensor | None) -> Tensor:
    """Codes of all columns, in processing order; `weight` f32 `[out, in]` is overwritten.

    With "in_loop" scales, the scales of the grid are rewritten group by group. counts: `[in]`, weight of each column's
    error in the range search.
    """
    scheme, columns = grid.scheme, weight.shape[1]
    width = scheme.columns_per_group(columns)
    in_loop = options.scales_in_loop and scheme.groups(columns) > 1
    cuts = sorted({*range(0, columns, options.block), *(range(0, columns, width) if in_loop else ()), columns})
    codes = torch.empty_like(weight, dtype=torch.uint8)
    for start, end in pairwise(cuts):
        part = slice(start, end)
        if in_loop and start % width == 0:
            _fit_again(grid, start // width, weight[:, start : start + width], options.range_, counts)
        errors = quantize_columns(weight[:, part], upper[part, part], grid.part(part), codes[:, part])
        weight[:, end:].addmm_(errors, upper[part, end:], alpha=-1)
    return codes


def _fit_again(grid: ColumnGrid, group: int, weight: Tensor, range_: Range, counts: Tensor | None) -> None:
    """Set scale and zero of one group from its current weights `weight`, `[out, columns of the group]`."""
    first = group * grid.scheme.columns_per_group(len(grid.group))
    group_counts = None if counts is None else counts[first : first + weight.shape[1]]
    scale, zero = fit_scale(weight, grid.scheme, grid.scale.dtype, range_, group_counts)
    grid.scale[:, group : group + 1], grid.zero[:, group : group + 1] = scale, zero
