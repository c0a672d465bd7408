"""Triton kernels of GPTQ's column loops. Imported only with a CUDA device, because Triton is installed with it.

Each program has a few rows and holds one block of their columns in registers. It loads the data of the next column
while it computes the current one, because waiting for memory at every column would take as long as the arithmetic.
"""

# mypy: ignore-errors
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from exporter.device import current

Steps = tuple[Tensor, Tensor, Tensor]
ROWS = 16  # rows per program: 4,096 rows give enough programs to fill the device
WARPS = 4
COUNTS = ("rows", "groups")  # not specialized: one compilation, which takes seconds, covers all values


@triton.jit
def _rounded(value, step, offset, levels):
    code = libdevice.rint(tl.div_rn(value, step)) + offset
    return tl.minimum(tl.maximum(code, 0.0), levels)


@triton.jit
def _grid(scale, zero, at, real):
    """Scale and zero of one column for every row."""
    step = tl.load(scale + at, mask=real, other=1.0).to(tl.float32)
    return step, tl.load(zero + at, mask=real, other=0).to(tl.float32)


@triton.jit(do_not_specialize=COUNTS)
def _quantize(
    weight,
    upper,
    scale,
    zero,
    group,
    codes,
    errors,
    rows,
    columns,
    groups,
    levels,
    weight_pitch,
    upper_pitch,
    codes_pitch,
    R: tl.constexpr,
    B: tl.constexpr,
):
    row, column = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64), tl.arange(0, B)
    real, inside = row < rows, (row[:, None] < rows) & (column[None, :] < columns)
    remaining = tl.load(weight + row[:, None] * weight_pitch + column[None, :], mask=inside, other=0.0)
    all_codes, all_errors = tl.zeros((R, B), tl.float32), tl.zeros((R, B), tl.float32)
    step, offset = _grid(scale, zero, row * groups + tl.load(group), real)
    pivot = tl.load(upper)
    later = tl.load(upper + column, mask=(column > 0) & (column < columns), other=0.0)
    group_ahead = tl.load(group + tl.minimum(1, columns - 1))
    for i in range(columns):
        n = tl.minimum(i + 1, columns - 1)
        next_step, next_offset = _grid(scale, zero, row * groups + group_ahead, real)
        next_pivot = tl.load(upper + n * upper_pitch + n)
        next_later = tl.load(upper + n * upper_pitch + column, mask=(column > n) & (column < columns), other=0.0)
        group_ahead = tl.load(group + tl.minimum(i + 2, columns - 1))
        current = column[None, :] == i
        value = tl.sum(tl.where(current, remaining, 0.0), axis=1)
        code = _rounded(value, step, offset, levels)
        error = tl.div_rn(value - (code - offset) * step, pivot)
        remaining -= error[:, None] * later[None, :]
        all_codes = tl.where(current, code[:, None], all_codes)
        all_errors = tl.where(current, error[:, None], all_errors)
        step, offset, pivot, later = next_step, next_offset, next_pivot, next_later
    tl.store(codes + row[:, None] * codes_pitch + column[None, :], all_codes.to(tl.uint8), mask=inside)
    tl.store(errors + row[:, None] * columns + column[None, :], all_errors, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def _descend(
    weight,
    gradient,
    hessian,
    diagonal,
    scale,
    zero,
    group,
    codes,
    errors,
    rows,
    columns,
    groups,
    levels,
    weight_pitch,
    hessian_pitch,
    codes_pitch,
    off_pitch,
    R: tl.constexpr,
    B: tl.constexpr,
):
    row, column = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64), tl.arange(0, B)
    real, inside = row < rows, (row[:, None] < rows) & (column[None, :] < columns)
    diagonals = tl.load(diagonal + column, mask=column < columns, other=1.0)
    best = tl.load(gradient + row[:, None] * columns + column[None, :], mask=inside, other=0.0)
    best = tl.div_rn(best, diagonals[None, :] + best * 0.0)
    best += tl.load(weight + row[:, None] * weight_pitch + column[None, :], mask=inside, other=0.0)
    all_codes, all_errors = tl.zeros((R, B), tl.float32), tl.zeros((R, B), tl.float32)
    step, offset = _grid(scale, zero, row * groups + tl.load(group), real)
    value = tl.load(weight + row * weight_pitch, mask=real, other=0.0)
    old_error = tl.load(errors + row * off_pitch, mask=real, other=0.0).to(tl.float32)
    later = tl.load(hessian + column, mask=(column > 0) & (column < columns), other=0.0).to(tl.float32)
    group_ahead = tl.load(group + tl.minimum(1, columns - 1))
    for i in range(columns):
        n = tl.minimum(i + 1, columns - 1)
        next_step, next_offset = _grid(scale, zero, row * groups + group_ahead, real)
        next_value = tl.load(weight + row * weight_pitch + n, mask=real, other=0.0)
        next_old_error = tl.load(errors + row * off_pitch + n, mask=real, other=0.0).to(tl.float32)
        next_later = tl.load(
            hessian + n * hessian_pitch + column, mask=(column > n) & (column < columns), other=0.0
        ).to(tl.float32)
        group_ahead = tl.load(group + tl.minimum(i + 2, columns - 1))
        current = column[None, :] == i
        code = _rounded(tl.sum(tl.where(current, best, 0.0), axis=1), step, offset, levels)
        error = value - (code - offset) * step
        best += (error - old_error)[:, None] * tl.div_rn(later, diagonals)[None, :]
        all_codes = tl.where(current, code[:, None], all_codes)
        all_errors = tl.where(current, error[:, None], all_errors)
        step, offset, value, old_error, later = next_step, next_offset, next_value, next_old_error, next_later
    tl.store(codes + row[:, None] * codes_pitch + column[None, :], all_codes.to(tl.uint8), mask=inside)
    tl.store(errors + row[:, None] * off_pitch + column[None, :], all_errors.to(errors.dtype.element_ty), mask=inside)


def quantize_columns_fast(weight: Tensor, upper: Tensor, steps: Steps, levels: int, codes: Tensor) -> Tensor:
    """`gptq_columns.quantize_columns`; sums differ from torch's in the last bit.

    steps: scale, zero and group, as in `quantized.ColumnGrid`. All matrices must be contiguous along a row.
    """
    errors = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    pitches = (_pitch(weight), _pitch(upper), _pitch(codes))
    _launch(_quantize, (weight, upper), steps, levels, (codes, errors), pitches)
    return errors


def descend_columns_fast(
    weight: Tensor,
    gradient: Tensor,
    hessian: Tensor,
    diagonal: Tensor,
    steps: Steps,
    levels: int,
    codes: Tensor,
    errors: Tensor,
) -> None:
    """`gptq_columns.descend_columns`; sums differ from torch's in the last bit. steps: as above."""
    pitches = (_pitch(weight), _pitch(hessian), _pitch(codes), _pitch(errors))
    _launch(_descend, (weight, gradient.contiguous(), hessian, diagonal), steps, levels, (codes, errors), pitches)


def _launch(kernel, inputs, steps: Steps, levels: int, outputs, pitches) -> None:
    rows, columns = inputs[0].shape
    sizes = (rows, columns, steps[0].shape[1], float(levels))
    programs = (triton.cdiv(rows, ROWS),)
    width = triton.next_power_of_2(columns)
    steps = [tensor.contiguous() for tensor in steps]
    with current(inputs[0].device):  # Triton starts kernels on the current GPU
        kernel[programs](*inputs, *steps, *outputs, *sizes, *pitches, R=ROWS, B=width, num_warps=WARPS)


def _pitch(matrix: Tensor) -> int:
    """Distance between the starts of two rows, in elements (ValueError unless rows are contiguous)."""
    if matrix.shape[1] > 1 and matrix.stride(1) != 1:
        raise ValueError(f"the columns are {matrix.stride(1)} elements apart, expected 1")
    return matrix.stride(0)
