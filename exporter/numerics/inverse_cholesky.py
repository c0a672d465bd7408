"""In-place inverse Cholesky factor for GPTQ.

torch.linalg would copy the matrix, allocate a workspace of the same size, and write the inverse into a third matrix:
462 MiB each at the 11,008 inputs of a 7B model. The panel algorithm here needs two strips of extra memory and runs at
the speed of matrix products.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

PANEL = 512  # columns per panel, the largest matrix that torch.linalg factorizes or inverts
TALL = 4  # panels of rows per product of the inversion


def inverse_factor_(square: Tensor, panel: int = PANEL) -> bool:
    """Replace `square` by the upper triangular U with `U^T U = square^-1`; False if it is not positive definite.

    square: f32 `[n, n]`, symmetric; undefined after False. Extra memory: `2 n * panel` floats.
    The first pass factorizes `square = R R^T`, R upper triangular, from the last panel to the first. The second pass
    computes `U = R^-1`, whose diagonal panels the first pass already stored.
    """
    failed = torch.zeros((), dtype=torch.int32, device=square.device)
    panels = list(cut(len(square), panel))
    for current in reversed(panels):
        inverse, code = _inverse_of_corner(square[current, current])
        failed += code.abs()
        above = square[: current.start, current]
        above.copy_(above @ inverse.T)
        for earlier in panels:
            if earlier.stop <= current.start:
                square[: earlier.stop, earlier].addmm_(above[: earlier.stop], above[earlier].T, alpha=-1)
        square[current, current] = inverse
    square.triu_()
    for current in panels[1:]:
        strip = square[: current.start, current] @ square[current, current]
        for rows in cut(current.start, TALL * panel):  # rows above are done, rows below are not needed
            torch.mm(square[rows, rows.start : current.start], strip[rows.start :], out=square[rows, current])
        square[: current.start, current].neg_()
    sound = (failed == 0) & (square.diagonal() > 0).all() & torch.isfinite(square.sum())
    return bool(sound)


def _inverse_of_corner(corner: Tensor) -> tuple[Tensor, Tensor]:
    """Upper triangular R^-1 of `corner = R R^T`, and an int32 code that is 0 on success.

    With J the reversal of rows and columns, `J corner J = L L^T` gives `R = J L J`.
    """
    lower, code = torch.linalg.cholesky_ex(corner.flip(0, 1))
    identity = torch.eye(len(corner), dtype=corner.dtype, device=corner.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1), code


def cut(length: int, step: int) -> Iterator[slice]:
    """Slices of length `step` that cover `length`; the last may be shorter."""
    for start in range(0, length, step):
        yield slice(start, min(length, start + step))
