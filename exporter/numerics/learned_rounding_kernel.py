"""Triton kernels of learned rounding. Imported only with a CUDA device, because Triton is installed with it.

Each program has some rows of one group. Both kernels read every weight and offset once; the same in torch reads and
writes them at each of twenty operations.
"""

# mypy: ignore-errors
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from exporter.device import current

HELD = 4096  # weights per program and pass
WIDEST = 1024  # columns per pass of a long group
COUNTS = ("rows", "groups")  # not specialized: one compilation, which takes seconds, covers all values


@triton.jit
def _grid(scale, zero, row, at, groups, real):
    """Scale and zero of one group for every row, `[rows, 1]`."""
    step = tl.load(scale + row * groups + at, mask=real, other=1.0).to(tl.float32)
    return step[:, None], tl.load(zero + row * groups + at, mask=real, other=0).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=COUNTS)
def _round(source, offset, out, scale, zero, rows, columns, groups, levels, G, R: tl.constexpr, W: tl.constexpr):
    """The rounded weights."""
    row, at = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64), tl.program_id(1)
    real = row < rows
    step, middle = _grid(scale, zero, row, at, groups, real)
    end = tl.minimum((at + 1) * G, columns)
    for start in range(at * G, end, W):
        column = start + tl.arange(0, W)
        place, inside = row[:, None] * columns + column[None, :], real[:, None] & (column[None, :] < end)
        weight = tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
        moved = weight + tl.load(offset + place, mask=inside, other=0.0) * step
        code = libdevice.rint(tl.div_rn(moved, step + moved * 0.0)) + middle
        value = (tl.minimum(tl.maximum(code, 0.0), levels) - middle) * step
        tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def _move(
    source,
    offset,
    gradient,
    scale,
    zero,
    by_scale,
    by_zero,
    rows,
    columns,
    groups,
    levels,
    rate,
    largest,
    G,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """Move the offsets, and add up the gradients of the group's scale and zero point."""
    row, at = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64), tl.program_id(1)
    real = row < rows
    step, middle = _grid(scale, zero, row, at, groups, real)
    sums, shifts = tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32)
    end = tl.minimum((at + 1) * G, columns)
    for start in range(at * G, end, W):
        column = start + tl.arange(0, W)
        place, inside = row[:, None] * columns + column[None, :], real[:, None] & (column[None, :] < end)
        weight = tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
        moved = tl.load(offset + place, mask=inside, other=0.0)
        slope = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
        slope = tl.where(slope == slope, tl.minimum(tl.maximum(slope, -largest), largest), 0.0)
        ratio = tl.div_rn(weight, step + weight * 0.0)
        code = libdevice.rint(ratio + moved) + middle
        kept = (code >= 0) & (code <= levels)
        clipped = tl.minimum(tl.maximum(code, 0.0), levels)
        sums += tl.sum(slope * (clipped - middle - tl.where(kept, ratio, 0.0)), axis=1)
        pull = slope * step
        shifts -= tl.sum(tl.where(kept, 0.0, pull), axis=1)
        sign = (pull > 0).to(tl.float32) - (pull < 0).to(tl.float32)
        tl.store(offset + place, moved - tl.where(kept, rate * sign, 0.0), mask=inside)
    tl.store(by_scale + row * groups + at, sums, mask=real)
    tl.store(by_zero + row * groups + at, shifts, mask=real)


def rounded_fast(
    source: Tensor, offset: Tensor, scale: Tensor, zero: Tensor, levels: int, width: int, dtype: torch.dtype
) -> Tensor:
    """The weights `[out, in]` in `dtype` that `LearnedLinear` rounds to, in groups of `width` columns."""
    out = torch.empty(source.shape, dtype=dtype, device=source.device)
    _launch(_round, (source, offset, out), (scale, zero), (), (float(levels),), width)
    return out


def move_fast(
    source: Tensor,
    offset: Tensor,
    gradient: Tensor,
    grid: tuple[Tensor, Tensor],
    levels: int,
    width: int,
    rate: float,
) -> tuple[Tensor, Tensor]:
    """Move `offset` f32 `[out, in]` in place by `rate`; the gradients of scales and zero points, f32 `[out, groups]`.

    gradient: `[out, in]`, of the loss with respect to the rounded weight. grid: scale and zero, `[out, groups]`.
    """
    sums = torch.empty(2, *grid[0].shape, dtype=torch.float32, device=source.device)
    numbers = (float(levels), rate, torch.finfo(torch.float32).max)
    _launch(_move, (source, offset, gradient.contiguous()), grid, (sums[0], sums[1]), numbers, width)
    return sums[0], sums[1]


def _launch(kernel, matrices, grid, sums, numbers, width: int) -> None:
    rows, columns = matrices[0].shape
    scale, zero = (tensor.contiguous() for tensor in grid)
    held = min(WIDEST, triton.next_power_of_2(width))
    at_once = max(1, HELD // held)
    programs = (triton.cdiv(rows, at_once), scale.shape[1])
    sizes = (rows, columns, scale.shape[1], *numbers, width)
    with current(scale.device):  # Triton starts kernels on the current GPU
        kernel[programs](*matrices, scale, zero, *sums, *sizes, R=at_once, W=held, num_warps=4)
