"""Triton kernel of the GPTQ column loop. Imported only where there is a CUDA device, since Triton comes with it."""

# mypy: ignore-errors
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

ROWS = 16  # rows of one program: enough programs to fill the device at 4,096 rows


@triton.jit
def _columns(
    weight,
    upper,
    scale,
    zero,
    origin,
    codes,
    errors,
    rows,
    columns,
    levels,
    ORIGIN: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.arange(0, B)
    at = row[:, None] * columns + column[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    rest = tl.load(weight + at, mask=inside, other=0.0)
    all_codes = tl.zeros((R, B), tl.float32)
    all_errors = tl.zeros((R, B), tl.float32)
    first = row * columns
    step = tl.load(scale + first, mask=row < rows, other=1.0)
    offset = tl.load(zero + first, mask=row < rows, other=0).to(tl.float32)
    if ORIGIN:
        start = tl.load(origin + first, mask=row < rows, other=0.0)
    pivot = tl.load(upper)
    later = tl.load(upper + column, mask=(column > 0) & (column < columns), other=0.0)
    for i in range(columns):
        n = tl.minimum(i + 1, columns - 1)  # what the next column needs arrives while this one is done
        next_step = tl.load(scale + first + n, mask=row < rows, other=1.0)
        next_offset = tl.load(zero + first + n, mask=row < rows, other=0).to(tl.float32)
        next_pivot = tl.load(upper + n * columns + n)
        next_later = tl.load(upper + n * columns + column, mask=(column > n) & (column < columns), other=0.0)
        if ORIGIN:
            next_start = tl.load(origin + first + n, mask=row < rows, other=0.0)
        here = column[None, :] == i
        value = tl.sum(tl.where(here, rest, 0.0), axis=1)
        code = libdevice.rint(tl.div_rn(value, step)) + offset
        code = tl.minimum(tl.maximum(code, 0.0), levels)
        if ORIGIN:
            error = tl.div_rn(start - (code - offset) * step, pivot)
            start = next_start
        else:
            error = tl.div_rn(value - (code - offset) * step, pivot)
        rest -= error[:, None] * later[None, :]
        all_codes = tl.where(here, code[:, None], all_codes)
        all_errors = tl.where(here, error[:, None], all_errors)
        step, offset, pivot, later = next_step, next_offset, next_pivot, next_later
    tl.store(codes + at, all_codes.to(tl.uint8), mask=inside)
    tl.store(errors + at, all_errors, mask=inside)


def launch(
    weight: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, levels: int, origin: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `columns.quantize_columns`."""
    rows, columns = weight.shape
    inputs = (weight.contiguous(), upper.contiguous(), scale.float().contiguous(), zero.contiguous())
    inputs = (*inputs, inputs[0] if origin is None else origin.contiguous())
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    errors = torch.empty(rows, columns, dtype=torch.float32, device=weight.device)
    width = triton.next_power_of_2(columns)
    grid = (triton.cdiv(rows, ROWS),)
    _columns[grid](
        *inputs, codes, errors, rows, columns, float(levels), ORIGIN=origin is not None, R=ROWS, B=width, num_warps=4
    )
    return codes, errors
