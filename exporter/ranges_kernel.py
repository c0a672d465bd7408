"""Triton kernel of the range search: a group's weights are read once and every range is tried in registers.

Imported only where there is a CUDA device, since Triton comes with it.
"""

# mypy: ignore-errors
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

ROWS = 16  # rows of one program


@triton.jit
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
    smallest,
    largest,
    shrink,
    steps,
    G: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TOGETHER: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    row = tl.program_id(0) * R + tl.arange(0, R)
    group = tl.program_id(1)
    offset = tl.arange(0, W)
    column = group * G + offset
    inside = (row[:, None] < rows) & ((offset < G) & (column < columns))[None, :]
    value = tl.load(weight + row[:, None].to(tl.int64) * columns + column[None, :], mask=inside, other=0.0)
    if WEIGHTED:
        counts = tl.load(importance + column, mask=(offset < G) & (column < columns), other=0.0)
    if TOGETHER:
        own = (offset < G) & (column < columns)
        at = column[:, None].to(tl.int64) * columns + column[None, :]
        block = tl.load(hessian + at, mask=own[:, None] & own[None, :], other=0.0)
    low = tl.minimum(tl.min(value, axis=1), 0.0)
    high = tl.maximum(tl.max(value, axis=1), 0.0)
    best = tl.full((R,), float("inf"), tl.float32)
    best_scale = tl.zeros((R,), tl.float32)
    best_zero = tl.zeros((R,), tl.float32)
    for step in range(steps):
        part = 1.0 - shrink * step
        if SYMMETRIC:
            size = tl.div_rn(2.0 * tl.maximum(-low, high) * part, levels)
        else:
            size = tl.div_rn((high - low) * part, levels)
        size = tl.minimum(tl.maximum(size, smallest), largest).to(scale.dtype.element_ty).to(tl.float32)
        if SYMMETRIC:
            point = tl.zeros((R,), tl.float32) + middle
        else:
            point = tl.minimum(tl.maximum(libdevice.rint(tl.div_rn(-low * part, size)), 0.0), levels)
        code = libdevice.rint(tl.div_rn(value, size[:, None] + tl.zeros((R, W), tl.float32))) + point[:, None]
        code = tl.minimum(tl.maximum(code, 0.0), levels)
        difference = (code - point[:, None]) * size[:, None] - value
        if TOGETHER:
            error = tl.sum(tl.dot(difference, block, input_precision="tf32x3") * difference, axis=1)
        elif WEIGHTED:
            error = tl.sum(difference * difference * tl.sqrt(tl.abs(difference)) * counts[None, :], axis=1)
        else:
            error = tl.sum(difference * difference, axis=1)
        better = (error < best) | (step == 0)
        best = tl.where(better, error, best)
        best_scale = tl.where(better, size, best_scale)
        best_zero = tl.where(better, point, best_zero)
    at = row.to(tl.int64) * groups + group
    tl.store(scale + at, best_scale.to(scale.dtype.element_ty), mask=row < rows)
    tl.store(zero + at, best_zero.to(tl.uint8), mask=row < rows)


def launch(
    weight: Tensor,
    width: int,
    levels: int,
    middle: int,
    symmetric: bool,
    dtype: torch.dtype,
    shrink: float,
    steps: int,
    importance: Tensor | None = None,
    hessian: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero `[out, groups]` of `weight` f32 `[out, in]` in groups of `width`; see `ranges.fit_scale`.

    shrink: how much narrower each of the `steps` ranges is than the one before, as a share of the first.
    hessian: f32 `[in, in]`; the error of a group with errors d is then `d H d^T`, H its part of the diagonal, and a
    group has from 16 to `ranges.BLOCK_WIDTH` columns. A card whose shared memory is too small for that (147 kB at 128
    columns: an H100 and an A100 have it) raises Triton's `OutOfResources`.
    """
    rows, columns = weight.shape
    groups = triton.cdiv(columns, width)
    scale = torch.empty(rows, groups, dtype=dtype, device=weight.device)
    zero = torch.empty(rows, groups, dtype=torch.uint8, device=weight.device)
    info = torch.finfo(dtype)
    sizes = (rows, columns, groups, float(levels), float(middle), info.smallest_normal, info.max, shrink, steps)
    grid = (triton.cdiv(rows, ROWS), groups)
    options = {
        "G": width,
        "SYMMETRIC": symmetric,
        "WEIGHTED": importance is not None,
        "TOGETHER": hessian is not None,
        "R": ROWS,
        "W": triton.next_power_of_2(width),
    }
    counts = weight if importance is None else importance.float().contiguous()
    second = weight if hessian is None else hessian
    _search[grid](
        weight.contiguous(), counts, second, scale, zero, *sizes, **options, num_warps=8 if hessian is not None else 4
    )
    return scale, zero
