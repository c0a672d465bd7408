"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column, let later columns make up for the error.

For inputs x the output error of a linear is `tr(D H D^T)` with `D = W - Q` and `H = mean x x^T`. Rows do not
influence each other, so linears that share an input may be stacked along `out` in one call.
"""

from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from exporter.quantized import QuantizedLinear, Scheme, dequantize, quantize
from exporter.ranges import Range, fit_scale

VERSION = 1
DAMPING_TRIES = 6


class Options(BaseModel):
    """How the columns are walked.

    damping: share of the mean diagonal that is added to it; grows tenfold while the factorization fails.
    block: columns whose updates are gathered before they reach the rest of the matrix; does not change the result.
    order: "activation" starts with the columns whose inputs are largest. Groups keep their columns and scales come from
    the original weight, so no index has to be stored and vLLM accepts it.
    scales: "in_loop" takes a group's scale from its weights as they are when it is reached, "static" from the start.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    damping: float = Field(0.01, gt=0, le=1)
    block: int = Field(128, ge=1)
    order: Literal["none", "activation"] = "none"
    scales: Literal["static", "in_loop"] = "in_loop"
    range_: Range = Field("minmax", alias="range")

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.order == "activation" and self.scales == "in_loop":
            raise ValueError("order: activation needs scales: static")
        return self


class Statistics:
    """The mean of x x^T over the rows seen so far, f32 `[in, in]`."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.hessian = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self.rows = 0

    def update(self, rows: Tensor, weights: Tensor | None = None) -> None:
        """Add input rows `[rows, in]`, each counted `weights` `[rows]` times."""
        if not len(rows):
            return
        x = rows.float()
        scaled = x if weights is None else x * weights.float().unsqueeze(1)
        total = self.rows + len(rows)
        self.hessian.mul_(self.rows / total).addmm_(scaled.T, x, alpha=1 / total)
        self.rows = total

    def energy(self, matrix: Tensor) -> float:
        """Mean squared size of `matrix` `[out, in]` times an input row."""
        return float(((matrix @ self.hessian) * matrix).sum())


def quantize_linear(
    weight: Tensor, statistics: Statistics, scheme: Scheme, options: Options, scale_dtype: torch.dtype
) -> tuple[QuantizedLinear, tuple[str, ...]]:
    """GPTQ on `weight` f32 `[out, in]`; the notes say when damping grew or rounding had to do.

    Columns whose input was always 0 are rounded to nearest and influence nothing.
    """
    hessian = statistics.hessian
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True) if options.order == "activation" else None
    upper, notes = inverse_factor(hessian if order is None else hessian[order][:, order], options.damping)
    scale, zero = fit_scale(weight, scheme, scale_dtype, options.range_)
    if upper is None:
        return QuantizedLinear(scheme, quantize(weight, scale, zero, scheme), scale, zero), notes
    if order is None:
        codes = _walk(weight, upper, scheme, options, scale, zero)
    else:
        group = order // scheme.columns_per_group(weight.shape[1])
        columns = scale[:, group], zero[:, group]
        codes = torch.empty_like(weight, dtype=torch.uint8)
        codes[:, order] = _walk(weight[:, order], upper, _per_column(scheme), options, *columns)
    return QuantizedLinear(scheme, codes, scale, zero), notes


def _per_column(scheme: Scheme) -> Scheme:
    """The same codes with one scale a column, for columns out of order."""
    return Scheme(scheme.bits, 1, scheme.symmetric, scheme.number)


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor | None, tuple[str, ...]]:
    """The upper triangular U with `U^T U = (H + damping)^-1`, and notes; None when no damping helps.

    A column that was always 0 gets 1 on the diagonal, so that it influences nothing.

    With J the reversal of rows and columns, `J H J = L L^T` gives `U = J L^-1 J`: one factorization and one
    triangular solve, instead of factorizing, inverting and factorizing again.
    """
    reversed_ = hessian.flip(0, 1)
    diagonal = reversed_.diagonal().clone()
    diagonal[diagonal == 0] = 1
    for attempt in range(DAMPING_TRIES):
        share = damping * 10**attempt
        reversed_.diagonal().copy_(diagonal + share * diagonal.mean())
        lower, failed = torch.linalg.cholesky_ex(reversed_)
        if not failed and torch.isfinite(lower).all():
            del reversed_  # squares of 11008 floats are half a gigabyte each
            inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower), device=lower.device), upper=False)
            del lower
            notes = (f"damping grew to {share:g} until the Hessian could be factorized",) if attempt else ()
            return inverse.flip(0, 1), notes
    return None, ("the Hessian could not be factorized: rounded to nearest instead",)


def _walk(
    weight: Tensor, upper: Tensor, scheme: Scheme, options: Options, scale: Tensor, zero: Tensor
) -> Tensor:
    """Codes of all columns. scale, zero: `[out, groups]`, rewritten group by group when scales are "in_loop"."""
    columns = weight.shape[1]
    width = scheme.columns_per_group(columns)
    in_loop = options.scales == "in_loop" and scheme.group_size != "tensor" and scheme.groups(columns) > 1
    cuts = sorted({*range(0, columns, options.block), *(range(0, columns, width) if in_loop else ()), columns})
    rest = weight.clone()
    codes = torch.empty_like(weight, dtype=torch.uint8)
    for start, end in zip(cuts, cuts[1:], strict=False):
        if in_loop and start % width == 0:
            group = start // width
            fitted = fit_scale(rest[:, start : start + width], scheme, scale.dtype, options.range_)
            scale[:, group : group + 1], zero[:, group : group + 1] = fitted
        groups = torch.arange(start, end, device=weight.device) // width
        found, errors = quantize_columns(
            rest[:, start:end], upper[start:end, start:end], scale[:, groups], zero[:, groups], scheme
        )
        codes[:, start:end] = found
        rest[:, end:].addmm_(errors, upper[start:end, end:], alpha=-1)
    return codes


def quantize_columns(
    weight: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme
) -> tuple[Tensor, Tensor]:
    """The columns of one block, each compensating for those before it.

    weight f32 `[out, b]`, upper f32 `[b, b]`, scale and zero `[out, b]`, one a column. Returns codes uint8
    `[out, b]` and the scaled errors f32 `[out, b]` that later blocks must make up for.
    """
    scheme = _per_column(scheme)
    rest = weight.clone()
    codes = torch.empty_like(weight, dtype=torch.uint8)
    errors = torch.empty_like(weight)
    for i in range(weight.shape[1]):
        column = rest[:, i : i + 1]
        scales, zeros = scale[:, i : i + 1], zero[:, i : i + 1]
        codes[:, i : i + 1] = found = quantize(column, scales, zeros, scheme)
        error = (column - dequantize(found, scales, zeros, scheme)) / upper[i, i]
        rest[:, i + 1 :].addmm_(error, upper[i : i + 1, i + 1 :], alpha=-1)
        errors[:, i : i + 1] = error
    return codes, errors
