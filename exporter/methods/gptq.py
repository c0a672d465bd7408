"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column, let later columns make up for the error.

For inputs x the output error of a linear is `tr(D H D^T)` with `D = W - Q` and `H = mean x x^T`. Rows do not
influence each other, so linears that share an input may be stacked along `out` in one call.
"""

from itertools import pairwise
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from exporter.columns import quantize_columns
from exporter.factor import PANEL, inverse_factor_
from exporter.moments import Statistics
from exporter.quantized import QuantizedLinear, Scheme, quantize
from exporter.ranges import Range, fit_scale

__all__ = ["SMOOTHS", "VERSION", "Options", "Statistics", "quantize_linear"]

VERSION = 2
DAMPING_TRIES = 6
SMOOTHS = False


class Options(BaseModel):
    """How the columns are walked.

    damping: share of the mean diagonal that is added to it; grows tenfold while the factorization fails.
    block: columns whose updates are gathered before they reach the rest of the matrix; does not change the result.
    order: "activation" starts with the columns whose inputs are largest. Groups keep their columns and scales come from
    the original weight, so no index has to be stored and vLLM accepts it.
    scales: "in_loop" takes a group's scale from its weights as they are when it is reached, "static" from the start.
    range: as in `ranges.fit_scale`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    damping: float = Field(0.01, gt=0, le=1)
    block: int = Field(128, ge=1)
    order: Literal["none", "activation"] = "activation"
    scales: Literal["static", "in_loop"] = "static"
    range_: Range = Field("mse", alias="range")

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.order == "activation" and self.scales == "in_loop":
            raise ValueError("order: activation needs scales: static")
        return self


def quantize_linear(
    weight: Tensor, statistics: Statistics, scheme: Scheme, options: Options, scale_dtype: torch.dtype
) -> tuple[QuantizedLinear, tuple[str, ...]]:
    """GPTQ on `weight` f32 `[out, in]`; the notes say when damping grew or rounding had to do.

    Columns whose input was always 0 are rounded to nearest and influence nothing.
    """
    order = None
    if options.order == "activation":
        order = statistics.hessian.diagonal().argsort(descending=True, stable=True)
    upper, notes = inverse_factor(statistics.hessian, options.damping, order)
    scale, zero = fit_scale(weight, scheme, scale_dtype, options.range_)
    if upper is None:
        return QuantizedLinear(scheme, quantize(weight, scale, zero, scheme), scale, zero), notes
    group = torch.arange(weight.shape[1], device=weight.device) // scheme.columns_per_group(weight.shape[1])
    if order is None:
        codes = _walk(weight.clone(), upper, scheme, options, scale, zero, group)
    else:
        codes = torch.empty_like(weight, dtype=torch.uint8)
        codes[:, order] = _walk(weight[:, order], upper, scheme, options, scale, zero, group[order])
    return QuantizedLinear(scheme, codes, scale, zero), notes


def inverse_factor(
    hessian: Tensor, damping: float, order: Tensor | None = None
) -> tuple[Tensor | None, tuple[str, ...]]:
    """The upper triangular U with `U^T U = (H + damping)^-1`, and notes; None when no damping helps.

    order: int64 `[in]`, the columns in the order they will be walked. A column that was always 0 influences nothing: it
    gets the mean of the others on the diagonal, so that it does not change the damping either.
    """
    order = torch.arange(len(hessian), device=hessian.device) if order is None else order
    diagonal = hessian.diagonal()[order]
    seen = diagonal != 0
    typical = torch.where(seen.any(), diagonal.sum() / seen.sum(), 1.0)
    diagonal = torch.where(seen, diagonal, typical)
    for attempt in range(DAMPING_TRIES):
        share = damping * 10**attempt
        upper = _permuted(hessian, order)
        upper.diagonal().copy_(diagonal + share * typical)
        if inverse_factor_(upper):
            notes = (f"damping grew to {share:g} until the Hessian could be factorized",) if attempt else ()
            return upper, notes
        del upper
    return None, ("the Hessian could not be factorized: rounded to nearest instead",)


def _permuted(square: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of `square` `[n, n]` in `order` int64 `[n]`.

    `square[order[:, None], order]` would say the same, but on a GPU it first writes both indices out for every element:
    1.8 GiB at the 11,008 inputs of a 7B model.
    """
    result = torch.empty_like(square)
    for start in range(0, len(order), PANEL):
        strip = order[start : start + PANEL]
        torch.index_select(square.index_select(0, strip), 1, order, out=result[start : start + PANEL])
    return result


def _walk(
    rest: Tensor, upper: Tensor, scheme: Scheme, options: Options, scale: Tensor, zero: Tensor, group: Tensor
) -> Tensor:
    """Codes of all columns, in the order given; `rest` f32 `[out, in]` is used up.

    scale, zero: `[out, groups]`, rewritten group by group when scales are "in_loop". group: `[in]`, of each column.
    """
    columns = rest.shape[1]
    width = scheme.columns_per_group(columns)
    in_loop = options.scales == "in_loop" and scheme.groups(columns) > 1
    cuts = sorted({*range(0, columns, options.block), *(range(0, columns, width) if in_loop else ()), columns})
    codes = torch.empty_like(rest, dtype=torch.uint8)
    for start, end in pairwise(cuts):
        if in_loop and start % width == 0:
            here = slice(start // width, start // width + 1)
            scale[:, here], zero[:, here] = fit_scale(
                rest[:, start : start + width], scheme, scale.dtype, options.range_
            )
        own = group[start:end]
        codes[:, start:end], errors = quantize_columns(
            rest[:, start:end], upper[start:end, start:end], scale[:, own], zero[:, own], scheme
        )
        rest[:, end:].addmm_(errors, upper[start:end, end:], alpha=-1)
    return codes
