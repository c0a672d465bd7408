"""GPTQ (Frantar et al., arXiv 2210.17323): quantize columns in order, propagating errors into the remaining columns.

For inputs x the output error of a linear is `tr(D H D^T)` with `D = W - Q` and `H = mean x x^T`. Rows are independent,
so linears that share an input can be stacked along `out` in one call.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from exporter.lazy_torch import torch
from exporter.methods.options import MethodOptions
from exporter.numerics.gptq_columns import descend_columns, quantize_columns
from exporter.numerics.hessian import Statistics, times
from exporter.numerics.inverse_cholesky import PANEL, inverse_factor_, slices
from exporter.numerics.quantized import ColumnGrid, QuantizedLinear, Scheme, dequantize, quantize
from exporter.numerics.ranges import Range, fit_scale

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["VERSION", "Options", "Statistics", "quantize_linear"]

VERSION = 4
DAMPING_TRIES = 6


class Options(MethodOptions):
    """Settings of the column loop.

    damping: share of the mean diagonal that is added to it; multiplied by ten while the factorization fails. block:
    columns whose updates are combined before they are applied to the remaining matrix; does not change the result. A
        kernel holds a block in registers.
    order: "activation" starts with the columns that have the largest inputs. Columns stay in their groups and scales
    come
        from the original weight, so no index has to be stored and vLLM accepts it.
    scales: "static" computes a group's scale from the original weights, "in_loop" from the updated weights when the
    loop
        reaches the group.
    range: as in `ranges.fit_scale`; "mse" and "signed" weight a column's error by the part that later columns cannot
        compensate.
    descent: number of passes of coordinate descent that round every column again after all are quantized.
    correct: quantize a weight that gives the full-precision outputs on the quantized model's inputs, as far as that
        fits held-out batches (`numerics/mismatch.py`).
    steps: steps of learned rounding that follow, as in `autoround`; 0 is none.
    """

    damping: float = Field(0.01, gt=0, le=1)
    block: int = Field(128, ge=1, le=1024)
    order: Literal["none", "activation"] = "activation"
    scales: Literal["static", "in_loop"] = "static"
    range_: Range = Field("mse", alias="range")
    descent: int = Field(1, ge=0, le=10)
    correct: bool = False
    steps: int = Field(0, ge=0, le=100_000)

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.order == "activation" and self.scales == "in_loop":
            raise ValueError("scales: in_loop needs order: none (the default order, activation, needs static scales)")
        return self

    @property
    def correction_damping(self) -> float | None:
        """Damping of the correction of weights for everything that was quantized before them; None without one."""
        return self.damping if self.correct else None

    @property
    def learned_steps(self) -> int:
        """Steps of learned rounding after the method."""
        return self.steps

    @property
    def learning_rate(self) -> float:
        """Size of the first step of learned rounding."""
        return 1 / max(1, self.steps)

    @property
    def signed_scales(self) -> bool:
        """Whether a group may get a negative scale."""
        return self.range_ == "signed"

    @property
    def scales_in_loop(self) -> bool:
        """Whether a group's scale is known only after the earlier columns are quantized."""
        return self.scales == "in_loop"


def quantize_linear(
    weight: Tensor, statistics: Statistics, scheme: Scheme, options: Options, scale_dtype: torch.dtype
) -> tuple[QuantizedLinear, tuple[str, ...]]:
    """GPTQ on `weight` f32 `[out, in]`; the notes report increased damping, or that rounding to nearest replaced GPTQ.

    Columns whose input was always 0 are rounded to nearest and have no influence on other columns.
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
    codes = _codes_of_columns(weight.index_select(1, order), upper, grid, options, counts)
    del upper  # as large as the Hessian
    if options.descent and not notes:  # with an indefinite Hessian the error has no minimum
        descend_(codes, weight.index_select(1, order), statistics.hessian, grid, options, order)
    return QuantizedLinear(scheme, codes.index_select(1, order.argsort()), scale, zero), notes


def importance(hessian: Tensor, upper: Tensor, damping: float, order: Tensor) -> Tensor:
    """Weight of each column's error after later columns have compensated it, f32 `[in]`, mean 1.

    The output error is `sum(error^2 / U_ii^2)` over the columns in order. A column whose input was always 0 does not
    affect it, and gets the share `damping` of its weight.
    """
    weights = upper.diagonal().square().reciprocal()
    weights = torch.empty_like(weights).index_copy_(0, order, weights)
    weights = torch.where(hessian.diagonal() == 0, damping * weights, weights)
    return weights / weights.mean()


def descend_(codes: Tensor, weight: Tensor, hessian: Tensor, grid: ColumnGrid, options: Options, order: Tensor) -> None:
    """Coordinate descent: round every column again, given all others as they are quantized; `options.descent` times.

    With `D = W - Q` and the damped H, the optimal value of column j is `w_j + sum(D_i H_ij, i != j) / H_jj`, so `tr(D H
    D^T)` never increases except by rounding of the products. One product per block of columns gives the gradient from
    all columns; inside the block the column loop updates it. codes (rewritten) and weight f32: `[out, in]` in the order
    of quantization; hessian: in the original order.
    """
    dtype = torch.bfloat16 if weight.is_cuda else torch.float32  # of the products; the weights stay float32
    diagonal = damped(hessian.diagonal(), options.damping)[order]
    hessian = _permuted(hessian, order, dtype)
    hessian.diagonal().zero_()
    errors = torch.empty_like(weight, dtype=dtype)
    for part in slices(len(order), PANEL):
        errors[:, part] = weight[:, part] - dequantize(codes[:, part], *grid.part(part).expanded())
    for part in [*slices(len(order), options.block)] * options.descent:
        gradient = times(errors, hessian[part].T)
        block = (weight[:, part], gradient, hessian[part, part], diagonal[part])
        descend_columns(*block, grid.part(part), codes[:, part], errors[:, part])


def damped(diagonal: Tensor, damping: float) -> Tensor:
    """The diagonal of a Hessian plus the share `damping` of its mean; entries that are 0 are first set to the mean."""
    active = diagonal != 0
    mean = torch.where(active.any(), diagonal.sum() / active.sum(), 1.0)
    return torch.where(active, diagonal, mean) + damping * mean


def inverse_factor(
    hessian: Tensor, damping: float, order: Tensor | None = None
) -> tuple[Tensor | None, tuple[str, ...]]:
    """The upper triangular U with `U^T U = (H + damping)^-1`, and notes; None when no damping makes it possible.

    order: int64 `[in]`, the columns in the order of quantization. The diagonal of a column that was always 0 is set to
    the mean of the others, so that the column has no influence and does not change the damping.
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

    `square[order[:, None], order]` is equivalent, but on a GPU it first expands both indices for every element: 1.8 GiB
    at the 11,008 inputs of a 7B model.
    """
    result = torch.empty_like(square, dtype=dtype)
    for part in slices(len(order), PANEL):
        result[part] = square.index_select(0, order[part]).index_select(1, order)
    return result


def _codes_of_columns(
    weight: Tensor, upper: Tensor, grid: ColumnGrid, options: Options, counts: Tensor | None
) -> Tensor:
    """Codes of all columns, in the given order; `weight` f32 `[out, in]` is overwritten.

    With "in_loop" scales, the grid's scales are rewritten group by group. counts: `[in]`, importance of each column,
    for these scales.
    """
    scheme, columns = grid.scheme, weight.shape[1]
    width = scheme.columns_per_group(columns)
    in_loop = options.scales_in_loop and scheme.groups(columns) > 1
    cuts = sorted({*range(0, columns, options.block), *(range(0, columns, width) if in_loop else ()), columns})
    codes = torch.empty_like(weight, dtype=torch.uint8)
    for start, end in pairwise(cuts):
        part = slice(start, end)
        if in_loop and start % width == 0:
            _refit_group(grid, start // width, weight[:, start : start + width], options.range_, counts)
        errors = quantize_columns(weight[:, part], upper[part, part], grid.part(part), codes[:, part])
        weight[:, end:].addmm_(errors, upper[part, end:], alpha=-1)
    return codes


def _refit_group(grid: ColumnGrid, group: int, weight: Tensor, range_: Range, counts: Tensor | None) -> None:
    """Compute scale and zero of one group from its updated weights `weight`, `[out, columns of the group]`."""
    first = group * grid.scheme.columns_per_group(len(grid.group))
    group_counts = None if counts is None else counts[first : first + weight.shape[1]]
    scale, zero = fit_scale(weight, grid.scheme, grid.scale.dtype, range_, group_counts)
    grid.scale[:, group : group + 1], grid.zero[:, group : group + 1] = scale, zero
