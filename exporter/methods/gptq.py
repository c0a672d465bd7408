"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column, let later columns make up for the error.

For inputs x the output error of a linear is `tr(D H D^T)` with `D = W - Q` and `H = mean x x^T`. Rows do not
influence each other, so linears that share an input may be stacked along `out` in one call.
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
    """How the columns are walked.

    damping: share of the mean diagonal that is added to it; grows tenfold while the factorization fails.
    block: columns whose updates are gathered before they reach the rest of the matrix; does not change the result. A
        kernel holds a block in registers.
    order: "activation" starts with the columns whose inputs are largest. Groups keep their columns and scales come from
    the original weight, so no index has to be stored and vLLM accepts it.
    scales: "in_loop" takes a group's scale from its weights as they are when it is reached, "static" from the start.
    range: as in `ranges.fit_scale`; "mse" counts a column's error as much as the columns after it leave of it.
    descent: passes that look at every column again when all are rounded, and move a code where that helps.
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
        """Whether a group's scale is known only once the columns before it are rounded."""
        return self.scales == "in_loop"


def quantize_linear(
    weight: Tensor, statistics: Statistics, scheme: Scheme, options: Options, scale_dtype: torch.dtype
) -> tuple[QuantizedLinear, tuple[str, ...]]:
    """GPTQ on `weight` f32 `[out, in]`; the notes say when damping grew or rounding had to do.

    Columns whose input was always 0 are rounded to nearest and influence nothing.
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
    if options.descent and not notes:  # a Hessian that is not positive definite has no least error to go down to
        descend_(codes, weight.index_select(1, order), statistics.hessian, grid, options, order)
    return QuantizedLinear(scheme, codes.index_select(1, order.argsort()), scale, zero), notes


def importance(hessian: Tensor, upper: Tensor, damping: float, order: Tensor) -> Tensor:
    """How much an error of each column counts once the columns after it have made up for it, f32 `[in]`, mean 1.

    The output error is `sum(error^2 / U_ii^2)` over the columns of the walk. A column that was always 0 has no part in
    it, and counts as little as the damping.
    """
    found = upper.diagonal().square().reciprocal()
    found = torch.empty_like(found).index_copy_(0, order, found)
    found = torch.where(hessian.diagonal() == 0, damping * found, found)
    return found / found.mean()


def descend_(codes: Tensor, weight: Tensor, hessian: Tensor, grid: ColumnGrid, options: Options, order: Tensor) -> None:
    """Round every column again, given all others as they are rounded; `options.descent` times.

    With `D = W - Q` and H damped as in the walk, the best value of column j is `w_j + sum(D_i H_ij, i != j) / H_jj`, so
    `tr(D H D^T)` never grows but for the rounding of the products. A block of columns sees the others in one of them;
    inside it the column loop carries what changed.
    codes, rewritten, and weight f32: `[out, in]` in the order of the walk, of which hessian is not.
    """
    dtype = torch.bfloat16 if weight.is_cuda else torch.float32  # of the products; what is rounded stays float32
    share = damped(hessian.diagonal(), options.damping)[order]
    hessian = _permuted(hessian, order, dtype)
    hessian.diagonal().zero_()
    off = torch.empty_like(weight, dtype=dtype)
    for here in cut(len(order), PANEL):
        off[:, here] = weight[:, here] - dequantize(codes[:, here], *grid.part(here).spread())
    for here in [*cut(len(order), options.block)] * options.descent:
        pull = times(off, hessian[here].T)
        own = (weight[:, here], pull, hessian[here, here], share[here])
        descend_columns(*own, grid.part(here), codes[:, here], off[:, here])


def damped(diagonal: Tensor, damping: float) -> Tensor:
    """The diagonal of a Hessian with the share `damping` of its mean added; what was always 0 gets the mean first."""
    seen = diagonal != 0
    typical = torch.where(seen.any(), diagonal.sum() / seen.sum(), 1.0)
    return torch.where(seen, diagonal, typical) + damping * typical


def inverse_factor(
    hessian: Tensor, damping: float, order: Tensor | None = None
) -> tuple[Tensor | None, tuple[str, ...]]:
    """The upper triangular U with `U^T U = (H + damping)^-1`, and notes; None when no damping helps.

    order: int64 `[in]`, the columns in the order they will be walked. A column that was always 0 influences nothing: it
    gets the mean of the others on the diagonal, so that it does not change the damping either.
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
    """Rows and columns of `square` `[n, n]` in `order` int64 `[n]`.

    `square[order[:, None], order]` would say the same, but on a GPU it first writes both indices out for every element:
    1.8 GiB at the 11,008 inputs of a 7B model.
    """
    result = torch.empty_like(square, dtype=dtype)
    for here in cut(len(order), PANEL):
        result[here] = square.index_select(0, order[here]).index_select(1, order)
    return result


def _walk(rest: Tensor, upper: Tensor, grid: ColumnGrid, options: Options, counts: Tensor | None) -> Tensor:
    """Codes of all columns, in the order given; `rest` f32 `[out, in]` is used up.

    When scales are "in_loop" those of the grid are rewritten, group by group. counts: `[in]`, importance of each
    column, for those scales.
    """
    scheme, columns = grid.scheme, rest.shape[1]
    width = scheme.columns_per_group(columns)
    in_loop = options.scales_in_loop and scheme.groups(columns) > 1
    cuts = sorted({*range(0, columns, options.block), *(range(0, columns, width) if in_loop else ()), columns})
    codes = torch.empty_like(rest, dtype=torch.uint8)
    for start, end in pairwise(cuts):
        here = slice(start, end)
        if in_loop and start % width == 0:
            _fit_again(grid, start // width, rest[:, start : start + width], options.range_, counts)
        errors = quantize_columns(rest[:, here], upper[here, here], grid.part(here), codes[:, here])
        rest[:, end:].addmm_(errors, upper[here, end:], alpha=-1)
    return codes


def _fit_again(grid: ColumnGrid, group: int, now: Tensor, range_: Range, counts: Tensor | None) -> None:
    """Scale and zero of one group from its weights `now`, `[out, columns of the group]`."""
    first = group * grid.scheme.columns_per_group(len(grid.group))
    some = None if counts is None else counts[first : first + now.shape[1]]
    scale, zero = fit_scale(now, grid.scheme, grid.scale.dtype, range_, some)
    grid.scale[:, group : group + 1], grid.zero[:, group : group + 1] = scale, zero
