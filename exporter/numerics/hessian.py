"""The Hessian of a linear's output error: second moments of its inputs, which GPTQ and AWQ use.

With `H = mean x x^T` and `D = W - Q`, the mean squared error of the output is `tr(D H D^T)`, summed over all rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


LEAST_IMPORTANCE = 1e-4  # of a column; columns without inputs keep some influence on the range
STRIP = 4096  # columns per product, because a second [in, in] matrix would not fit into memory


class Statistics:
    """The mean of x x^T over the input rows so far: `hessian`, f32 `[in, in]`."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.hessian = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self.rows = 0

    def update(self, rows: Tensor, weights: Tensor | None = None) -> None:
        """Add input rows `[rows, in]`; `weights` `[rows]` multiply their contributions."""
        self.rows = add_rows(self.hessian, self.rows, rows, rows, weights)

    def add(self, other: Statistics) -> None:
        """Add the rows of other statistics, which may be on another device."""
        total = self.rows + other.rows
        if not other.rows:
            return
        self.hessian.mul_(self.rows / total)
        for start in range(0, len(self.hessian), STRIP):
            strip = slice(start, start + STRIP)
            self.hessian[strip].add_(other.hessian[strip].to(self.hessian.device), alpha=other.rows / total)
        self.rows = total

    def is_finite(self) -> bool:
        """Whether all inputs so far, and their squares, are finite."""
        return bool(torch.isfinite(self.hessian.diagonal()).all())

    def importance(self) -> Tensor:
        """Mean square of each input relative to the mean of all, f32 `[in]`, at least `LEAST_IMPORTANCE`."""
        squares = self.hessian.diagonal()
        return (squares / squares.mean().clamp_min(1e-30)).clamp_min(LEAST_IMPORTANCE)

    def energy(self, matrix: Tensor) -> float:
        """Mean squared norm of `matrix` f32 `[out, in]` times an input row (from 16-bit products on a GPU)."""
        total = torch.zeros((), dtype=torch.float32, device=matrix.device)
        left = matrix.to(torch.bfloat16) if matrix.is_cuda else matrix
        for start in range(0, matrix.shape[1], STRIP):
            strip = slice(start, start + STRIP)
            total += (times(left, self.hessian[:, strip]).mul_(matrix[:, strip])).sum()
        return float(total)

    def row_energies(self, matrix: Tensor) -> Tensor:
        """Mean square of each row of `matrix` f32 `[out, in]` times an input row, f32 `[out]`."""
        total = torch.zeros(len(matrix), dtype=torch.float32, device=matrix.device)
        left = matrix.to(torch.bfloat16) if matrix.is_cuda else matrix
        for start in range(0, matrix.shape[1], STRIP):
            strip = slice(start, start + STRIP)
            total += (times(left, self.hessian[:, strip]).mul_(matrix[:, strip])).sum(1)
        return total


def add_rows(mean: Tensor, count: int, left: Tensor, right: Tensor, weights: Tensor | None) -> int:
    """Add rows to `mean`, f32 `[in, in]`, the mean of left x right^T over `count` rows; the new number of rows.

    left, right: `[rows, in]`. weights `[rows]` multiply the contributions.
    """
    if not len(right):
        return count
    total = count + len(right)
    weighted = left if weights is None else (left * weights.unsqueeze(1)).to(right.dtype)
    mean.mul_(count / total)
    for start in range(0, right.shape[1], STRIP):
        strip = slice(start, start + STRIP)
        mean[strip].add_(inner_product(weighted[:, strip], right), alpha=1 / total)
    return total


def times(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32; a 16-bit `left` is multiplied in 16 bits with float32 accumulation."""
    return torch.mm(left, right.to(left.dtype), out_dtype=torch.float32) if left.itemsize == 2 else left @ right


def inner_product(left: Tensor, right: Tensor) -> Tensor:
    """left.T @ right in float32, `[in, in]`; on a GPU 16-bit rows are multiplied in 16 bits, with float32 sums."""
    if left.is_cuda and left.itemsize == 2:
        return torch.mm(left.T, right, out_dtype=torch.float32)
    return left.float().T @ right.float()
