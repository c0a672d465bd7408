"""Triton kernels of GPTQ's column loops. Import only on a CUDA device: only CUDA builds of torch bring Triton.

A program handles `ROWS` rows and holds a block of their columns in registers. It prefetches the operands of the next
column while it computes the current one, since waiting for memory at every column would double the time.
"""

# mypy: ignore-errors
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

Steps = tuple[Tensor, Tensor, Tensor]
ROWS = 16  # rows of one program: enough programs to fill the device at 4,096 rows
WARPS = 4
COUNTS = ("rows", "groups")  # not specialized: one compilation (seconds) serves all values


@triton.jit
def _rounded(value, step, offset, levels):
    code = libdevice.rint(tl.div_rn(value, step)) + offset
    return tl.minimum(tl.maximum(code, 0.0), levels)


@triton.jit
def _grid(scale, zero, at, real):
    """Scale and zero point of one column, for every row."""
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
    rest = tl.load(weight + row[:, None] * weight_pitch + column[None, :], mask=inside, other=0.0)
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
        value = tl.sum(tl.where(current, rest, 0.0), axis=1)
        code = _rounded(value, step, offset, levels)
        error = tl.div_rn(value - (code - offset) * step, pivot)
        rest -= error[:, None] * later[None, :]
        all_codes = tl.where(current, code[:, None], all_codes)
        all_errors = tl.where(current, error[:, None], all_errors)
        step, offset, pivot, later = next_step, next_offset, next_pivot, next_later
    tl.store(codes + row[:, None] * codes_pitch + column[None, :], all_codes.to(tl.uint8), mask=inside)
    tl.store(errors + row[:, None] * columns + column[None, :], all_errors, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def _descend(
    weight,
    pull,
    hessian,
    share,
    scale,
    zero,
    group,
    codes,
    off,
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
    shares = tl.load(share + column, mask=column < columns, other=1.0)
    best = tl.load(pull + row[:, None] * columns + column[None, :], mask=inside, other=0.0)
    best = tl.div_rn(best, shares[None, :] + best * 0.0)
    best += tl.load(weight + row[:, None] * weight_pitch + column[None, :], mask=inside, other=0.0)
    all_codes, all_off = tl.zeros((R, B), tl.float32), tl.zeros((R, B), tl.float32)
    step, offset = _grid(scale, zero, row * groups + tl.load(group), real)
    own = tl.load(weight + row * weight_pitch, mask=real, other=0.0)
    before = tl.load(off + row * off_pitch, mask=real, other=0.0).to(tl.float32)
    later = tl.load(hessian + column, mask=(column > 0) & (column < columns), other=0.0).to(tl.float32)
    group_ahead = tl.load(group + tl.minimum(1, columns - 1))
    for i in range(columns):
        n = tl.minimum(i + 1, columns - 1)
        next_step, next_offset = _grid(scale, zero, row * groups + group_ahead, real)
        next_own = tl.load(weight + row * weight_pitch + n, mask=real, other=0.0)
        next_before = tl.load(off + row * off_pitch + n, mask=real, other=0.0).to(tl.float32)
        next_later = tl.load(
            hessian + n * hessian_pitch + column, mask=(column > n) & (column < columns), other=0.0
        ).to(tl.float32)
        group_ahead = tl.load(group + tl.minimum(i + 2, columns - 1))
        current = column[None, :] == i
        code = _rounded(tl.sum(tl.where(current, best, 0.0), axis=1), step, offset, levels)
        now = own - (code - offset) * step
        best += (now - before)[:, None] * tl.div_rn(later, shares)[None, :]
        all_codes = tl.where(current, code[:, None], all_codes)
        all_off = tl.where(current, now[:, None], all_off)
        step, offset, own, before, later = next_step, next_offset, next_own, next_before, next_later
    tl.store(codes + row[:, None] * codes_pitch + column[None, :], all_codes.to(tl.uint8), mask=inside)
    tl.store(off + row[:, None] * off_pitch + column[None, :], all_off.to(off.dtype.element_ty), mask=inside)


def quantize_columns_fast(weight: Tensor, upper: Tensor, steps: Steps, levels: int, codes: Tensor) -> Tensor:
    """`gptq_columns.quantize_columns`; sums may differ from torch's in the last bit.

    steps: scale, zero and group, as in `quantized.ColumnGrid`. All matrices are row-major.
    """
    errors = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    pitches = (_pitch(weight), _pitch(upper), _pitch(codes))
    _launch(_quantize, (weight, upper), steps, levels, (codes, errors), pitches)
    return errors


def descend_columns_fast(
    weight: Tensor,
    pull: Tensor,
    hessian: Tensor,
    share: Tensor,
    steps: Steps,
    levels: int,
    codes: Tensor,
    off: Tensor,
) -> None:
    """`gptq_columns.descend_columns`; sums may differ from torch's in the last bit. steps: as above."""
    pitches = (_pitch(weight), _pitch(hessian), _pitch(codes), _pitch(off))
    _launch(_descend, (weight, pull.contiguous(), hessian, share), steps, levels, (codes, off), pitches)


def _launch(kernel, inputs, steps: Steps, levels: int, outputs, pitches) -> None:
    rows, columns = inputs[0].shape
    sizes = (rows, columns, steps[0].shape[1], float(levels))
    programs = (triton.cdiv(rows, ROWS),)
    width = triton.next_power_of_2(columns)
    steps = [tensor.contiguous() for tensor in steps]
    kernel[programs](*inputs, *steps, *outputs, *sizes, *pitches, R=ROWS, B=width, num_warps=WARPS)


def _pitch(matrix: Tensor) -> int:
    """Row stride in elements. ValueError unless the columns of a row are contiguous."""
    if matrix.shape[1] > 1 and matrix.stride(1) != 1:
        raise ValueError(f"columns must be contiguous; their stride is {matrix.stride(1)} elements")
    return matrix.stride(0)
