"""The weight that gives a linear its full-precision outputs on the quantized model's inputs.

For inputs x of the full-precision model and y of the quantized one, `W + W C (H + damping)^-1` with `C = mean (x - y)
y^T` and `H = mean y y^T` is the damped least-squares fit of `W x` from y. GPTAQ (Li et al., arXiv 2504.02692) and
Qronos (Zhang et al., arXiv 2505.11695) correct column by column inside the loop; here the weight is corrected first,
and only by the share that also fits on inputs that were held out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from exporter.lazy_torch import torch
from exporter.numerics.hessian import add_rows, times
from exporter.numerics.inverse_cholesky import slices

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 2048  # rows of a weight per product, to bound the temporaries


class Mismatch:
    """The mean of `(x - y) y^T` over the input rows so far: `moment`, f32 `[in, in]`."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.moment = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self.rows = 0

    def update(self, full: Tensor, rows: Tensor, weights: Tensor | None) -> None:
        """Add rows `[rows, in]` of the full-precision model and of the quantized one, with their weights `[rows]`."""
        self.rows = add_rows(self.moment, self.rows, full - rows, rows, weights)

    def shift(self, weight: Tensor, upper: Tensor) -> Tensor:
        """`W C (H + damping)^-1` of `weight` f32 `[out, in]`, once: it overwrites the moment.

        upper: U with `U^T U = (H + damping)^-1`, `[in, in]`. With more outputs than inputs, `C (H + damping)^-1` is
        computed first; a GPU multiplies the weight with it in 16 bits, whose errors are relative to each column's size.
        """
        shift = torch.empty_like(weight)
        if len(weight) <= weight.shape[1]:
            for part in slices(len(weight), PIECE):
                shift[part] = ((weight[part] @ self.moment) @ upper.T) @ upper
            return shift
        for part in slices(len(self.moment), PIECE):
            self.moment[part] = (self.moment[part] @ upper.T) @ upper
        solved = self.moment.to(torch.bfloat16) if weight.is_cuda else self.moment
        for part in slices(len(weight), PIECE):
            shift[part] = times(weight[part].to(solved.dtype), solved)
        return shift


def fitting_share(weight: Tensor, shift: Tensor, pairs: Iterable[tuple[Tensor, Tensor, Tensor | None]]) -> float:
    """The share of `shift`, 0 to 1, with which `weight + share * shift` fits best on other rows.

    weight, shift: f32 `[out, in]`. pairs: rows `[rows, in]` of the full-precision model and of the quantized one, and
    their weights `[rows]`. The squared error is a parabola of the share, so its minimum needs two sums.
    """
    along = length = 0.0
    for full, rows, weights in pairs:
        differences = full - rows
        for part in slices(len(weight), PIECE):
            sums = _sums(_outputs(rows, shift[part]), _outputs(differences, weight[part]), weights)
            along, length = along + sums[0], length + sums[1]
    return min(1.0, max(0.0, along / length)) if length > 0 else 0.0


def _sums(moved: Tensor, missing: Tensor, weights: Tensor | None) -> tuple[float, float]:
    """Weighted sums of `missing * moved` and of `moved^2`, which are overwritten."""
    counts = 1.0 if weights is None else weights.unsqueeze(1)
    return float(missing.mul_(moved).mul_(counts).sum()), float(moved.square_().mul_(counts).sum())


def _outputs(rows: Tensor, weight: Tensor) -> Tensor:
    """`rows @ weight.T` in float32; a GPU multiplies in 16 bits, which is exact enough to choose a share."""
    return times(rows.to(torch.bfloat16) if rows.is_cuda else rows.float(), weight.T)
