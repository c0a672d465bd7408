"""GPTQ's triangular factor, the Cholesky factor of the inverse Hessian, computed in place.

A library solver would copy the matrix, allocate a workspace of the same size, and write the inverse into a third
matrix: at the 11,008 inputs of a 7B model each takes 462 MiB. Panels and matrix products need two strips of extra
memory, and run at the speed of the products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from exporter.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


PANEL = 512  # columns per panel; the library factorizes and inverts matrices of this size
TALL = 4  # panels of rows per product of the inversion


def inverse_factor_(square: Tensor, panel: int = PANEL) -> bool:
    """Replace `square` by the upper triangular U with `U^T U = square^-1`; False when it is not positive definite.

    square: f32 `[n, n]`, symmetric; its content is undefined when the result is False. Extra memory: `2 n * panel`
    floats. From the last panel to the first, `square = R R^T` with R upper triangular; then `U = R^-1`, whose diagonal
    panels the first pass already contains.
    """
    failed = torch.zeros((), dtype=torch.int32, device=square.device)
    panels = list(slices(len(square), panel))
    for current in reversed(panels):
        inverse, code = _inverse_of_corner(square[current, current])
        failed += code.abs()
        above = square[: current.start, current]
        above.copy_(above @ inverse.T)
        for target in panels:
            if target.stop <= current.start:
                square[: target.stop, target].addmm_(above[: target.stop], above[target].T, alpha=-1)
        square[current, current] = inverse
    square.triu_()
    for current in panels[1:]:
        strip = square[: current.start, current] @ square[current, current]
        for rows in slices(current.start, TALL * panel):  # each product reads only rows that are not yet overwritten
            torch.mm(square[rows, rows.start : current.start], strip[rows.start :], out=square[rows, current])
        square[: current.start, current].neg_()
    valid = (failed == 0) & (square.diagonal() > 0).all() & torch.isfinite(square.sum())
    return bool(valid)


def _inverse_of_corner(corner: Tensor) -> tuple[Tensor, Tensor]:
    """R^-1 of `corner = R R^T`, upper triangular, and an error code that is 0 when it exists.

    With J the reversal of rows and columns, `J corner J = L L^T` gives `R = J L J`.
    """
    lower, code = torch.linalg.cholesky_ex(corner.flip(0, 1))
    identity = torch.eye(len(corner), dtype=corner.dtype, device=corner.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1), code


def slices(length: int, step: int) -> Iterator[slice]:
    """Slices of length `step` that cover `length`; the last one may be shorter."""
    for start in range(0, length, step):
        yield slice(start, min(length, start + step))
