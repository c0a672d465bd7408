"""The column loop of GPTQ: one block of columns, each compensating for those before it.

Coordinate descent is the same loop with another factor, and with errors that are measured from the original weight.

`quantize_columns` is the definition, in torch; on a CUDA device `quantize_columns_fast` does the same in one Triton
kernel launch, where the loop would be a thousand small ones.
"""

import torch
from torch import Tensor

from exporter.quantized import Scheme, dequantize, quantize


def quantize_columns(
    weight: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme, origin: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes uint8 `[out, b]` and the scaled errors f32 `[out, b]` that later blocks must make up for.

    weight f32 `[out, b]`; upper f32 `[b, b]`, that part of the factor U; scale and zero `[out, b]`, one a column.
    origin: f32 `[out, b]`, what errors are measured from, when that is not the weight that is rounded.
    """
    if weight.is_cuda and scheme.number == "int":
        return quantize_columns_fast(weight, upper, scale, zero, scheme, origin)
    return quantize_columns_plain(weight, upper, scale, zero, scheme, origin)


def quantize_columns_plain(
    weight: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme, origin: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`quantize_columns` in torch, on any device."""
    single = Scheme(scheme.bits, 1, scheme.symmetric, scheme.number)  # one scale a column
    rest = weight.clone()
    codes = torch.empty_like(weight, dtype=torch.uint8)
    errors = torch.empty_like(weight)
    for i in range(weight.shape[1]):
        column = rest[:, i : i + 1]
        scales, zeros = scale[:, i : i + 1], zero[:, i : i + 1]
        codes[:, i : i + 1] = found = quantize(column, scales, zeros, single)
        start = column if origin is None else origin[:, i : i + 1]
        error = (start - dequantize(found, scales, zeros, single)) / upper[i, i]
        rest[:, i + 1 :].addmm_(error, upper[i : i + 1, i + 1 :], alpha=-1)
        errors[:, i : i + 1] = error
    return codes, errors


def quantize_columns_fast(
    weight: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme, origin: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`quantize_columns` as one Triton kernel; sums differ from torch's in their last bit."""
    from exporter.columns_kernel import launch

    return launch(weight, upper, scale, zero, scheme.levels, origin)
