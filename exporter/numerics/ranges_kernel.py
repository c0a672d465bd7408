"""Triton kernel of the range search: reads a group's weights once, and tries every range in registers.

Imported only with a CUDA device, because Triton is installed with it.
"""

# mypy: ignore-errors
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from exporter.device import current

ROWS = 16  # largest number of rows per program
HELD = 4096  # weights that four warps hold in registers without spilling


@triton.jit
def _within(low, high, part, levels, middle, least, smallest, largest, scale, SYMMETRIC: tl.constexpr):
    """Scale, rounded like `ranges._stored`, and zero point for `part` of each row's full range."""
    if SYMMETRIC:
        size = tl.div_rn(2.0 * tl.maximum(-low, high) * part, levels)
    else:
        size = tl.div_rn((high - low) * part, levels)
    small = tl.maximum(tl.ceil(size * (1.0 / least)), 1.0) * least  # `least` is a power of two, so this does not round
    size = tl.minimum(tl.where(size < smallest, small, size), largest).to(scale.dtype.element_ty).to(tl.float32)
    if SYMMETRIC:
        point = size * 0.0 + middle
    else:
        point = tl.minimum(tl.maximum(libdevice.rint(tl.div_rn(-low * part, size)), 0.0), levels)
    return size, point


@triton.jit
def _differences(value, size, point, levels):
    """Rounding error of every weight with its row's scale and zero point."""
    code = libdevice.rint(tl.div_rn(value, size[:, None] + value * 0.0)) + point[:, None]
    code = tl.minimum(tl.maximum(code, 0.0), levels)
    return (code - point[:, None]) * size[:, None] - value


@triton.jit(do_not_specialize=("rows", "groups"))  # one compilation, which takes seconds, covers all values
def _search(
    weight,
    importance,
    hessian,
    scale,
    zero,
    rows,
    columns,
    groups,
    levels,
    middle,
    least,
    smallest,
    largest,
    shrink,
    steps,
    G: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    MEASURE: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    row, group, offset = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1), tl.arange(0, W)
    column = group * G + offset
    valid = (offset < G) & (column < columns)
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    value = tl.load(weight + at, mask=(row[:, None] < rows) & valid[None, :], other=0.0)
    if MEASURE == "weighted":
        counts = tl.load(importance + column, mask=valid, other=0.0)[None, :]
    if MEASURE == "together":
        square = column[:, None].to(tl.int64) * columns + column[None, :]
        block = tl.load(hessian + square, mask=valid[:, None] & valid[None, :], other=0.0)
    low, high = tl.minimum(tl.min(value, axis=1), 0.0), tl.maximum(tl.max(value, axis=1), 0.0)
    best, best_scale, best_zero = tl.full((R,), float("inf"), tl.float32), low * 0.0, low * 0.0
    for step in range(steps):
        part = 1.0 - shrink * step
        size, point = _within(low, high, part, levels, middle, least, smallest, largest, scale, SYMMETRIC)
        difference = _differences(value, size, point, levels)
        if MEASURE == "together":
            error = tl.sum(tl.dot(difference, block, input_precision="tf32x3") * difference, axis=1)
        elif MEASURE == "weighted":
            error = tl.sum(difference * difference * tl.sqrt(tl.abs(difference)) * counts, axis=1)
        else:
            error = tl.sum(difference * difference, axis=1)
        better = (error < best) | (step == 0)
        best = tl.where(better, error, best)
        best_scale, best_zero = tl.where(better, size, best_scale), tl.where(better, point, best_zero)
    place = row.to(tl.int64) * groups + group
    tl.store(scale + place, best_scale.to(scale.dtype.element_ty), mask=row < rows)
    tl.store(zero + place, best_zero.to(tl.uint8), mask=row < rows)


def launch(
    weight: Tensor,
    width: int,
    levels: int,
    middle: int,
    symmetric: bool,
    dtype: torch.dtype,
    least: float,
    shrink: float,
    steps: int,
    importance: Tensor | None = None,
    hessian: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero `[out, groups]` of `weight` f32 `[out, in]` in groups of `width`; see `ranges.fit_scale`.

    least: the smallest scale of `dtype`, a power of two. shrink: by how much each of the `steps` ranges is narrower
    than the previous one, as a share of the full range. hessian: f32 `[in, in]`. With it, the error of a group with
    differences d is `d H d^T`, where H is the group's diagonal block, and groups must have 16 to `ranges.BLOCK_WIDTH`
    columns. Triton raises `OutOfResources` on GPUs with too little shared memory (147 kB for 128 columns; H100 and A100
    have enough).
    """
    rows, columns = weight.shape
    groups = triton.cdiv(columns, width)
    scale = torch.empty(rows, groups, dtype=dtype, device=weight.device)
    zero = torch.empty(rows, groups, dtype=torch.uint8, device=weight.device)
    bounds = (least, torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max)
    sizes = (rows, columns, groups, float(levels), float(middle), *bounds, shrink, steps)
    held = triton.next_power_of_2(width)
    at_once = max(1, min(ROWS, HELD // held))
    grid = (triton.cdiv(rows, at_once), groups)
    options = {
        "G": width,
        "SYMMETRIC": symmetric,
        "MEASURE": "together" if hessian is not None else "squares" if importance is None else "weighted",
        "R": at_once,
        "W": held,
        "num_warps": 8 if hessian is not None or held > HELD else 4,
    }
    counts = weight if importance is None else importance.float().contiguous()
    second = weight if hessian is None else hessian
    with current(weight.device):  # Triton starts kernels on the current GPU
        _search[grid](weight.contiguous(), counts, second, scale, zero, *sizes, **options)
    return scale, zero
