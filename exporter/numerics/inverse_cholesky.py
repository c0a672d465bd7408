"""The triangular factor that GPTQ walks along, computed inside one square of memory.

A solver of the library would copy the matrix into its own order, allocate as much again to work in, and write the
inverse into a third square: at the 11,008 inputs of a 7B model each is 462 MiB. Panels and matrix products need two
strips beside the square itself, and run at the speed of the products.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

PANEL = 512  # columns at a time; what the library factorizes and inverts is never larger
TALL = 4  # panels of rows that one product of the inversion covers


def inverse_factor_(square: Tensor, panel: int = PANEL) -> bool:
    """Replace `square` by the upper triangular U with `U^T U = square^-1`; False when it is not positive definite.

    square: f32 `[n, n]`, symmetric; holds nothing of use when the answer is False. Extra memory: `2 n * panel` floats.
    From the last panel to the first, `square = R R^T` with R upper triangular; then `U = R^-1`, whose diagonal panels
    the first pass has left in place.
    """
    failed = torch.zeros((), dtype=torch.int32, device=square.device)
    panels = list(cut(len(square), panel))
    for here in reversed(panels):
        inverse, code = _inverse_of_corner(square[here, here])
        failed += code.abs()
        above = square[: here.start, here]
        above.copy_(above @ inverse.T)
        for there in panels:
            if there.stop <= here.start:
                square[: there.stop, there].addmm_(above[: there.stop], above[there].T, alpha=-1)
        square[here, here] = inverse
    square.triu_()
    for here in panels[1:]:
        strip = square[: here.start, here] @ square[here, here]
        for rows in cut(here.start, TALL * panel):  # rows above are done; those below are not needed for these
            torch.mm(square[rows, rows.start : here.start], strip[rows.start :], out=square[rows, here])
        square[: here.start, here].neg_()
    sound = (failed == 0) & (square.diagonal() > 0).all() & torch.isfinite(square.sum())
    return bool(sound)


def _inverse_of_corner(corner: Tensor) -> tuple[Tensor, Tensor]:
    """R^-1 of `corner = R R^T`, upper triangular, and 0 where that exists.

    With J the reversal of rows and columns, `J corner J = L L^T` gives `R = J L J`.
    """
    lower, code = torch.linalg.cholesky_ex(corner.flip(0, 1))
    one = torch.eye(len(corner), dtype=corner.dtype, device=corner.device)
    return torch.linalg.solve_triangular(lower, one, upper=False).flip(0, 1), code


def cut(length: int, step: int) -> Iterator[slice]:
    """Slices of `step` that cover `length`; the last may be shorter."""
    for start in range(0, length, step):
        yield slice(start, min(length, start + step))
