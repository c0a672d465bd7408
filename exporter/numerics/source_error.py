"""Error of a quantized weight against its source, compared with the rounding error expected from its bits.

Rounding to steps of size s has an error variance of `s^2 / 12`. The range of the source's weights and the bits give
the step, and the step gives the expected output error of each row. A row with a much larger error is broken: its scale
overflowed or underflowed its dtype, or there is a bug. Methods with calibration data reduce the output error and
increase the weight error, so their error is measured with the input statistics.
"""

import torch
from torch import Tensor

from exporter.numerics.hessian import Statistics
from exporter.numerics.quantized import QuantizedLinear
from exporter.numerics.ranges import full_range

MOST = 8.0  # largest ratio to the expected error; every method stays below 3 (`tests/test_source_error.py`)
FLOAT8_VARIANCE = 2.0**-6 / 12  # error variance of a number between 1 and 2 rounded to 3 mantissa bits


def source_error(weight: Tensor, quantized: QuantizedLinear, statistics: Statistics | None = None) -> float:
    """Output error of the worst row divided by the expected rounding error; inf if a row was rounded to zero.

    weight: f32 `[out, in]`, the source's, multiplied by folded scales. statistics: of the layer's inputs; None weights
    all inputs equally, which is correct only for methods without calibration data. About 1 for rounding to nearest;
    above `MOST` the weight is broken. A "tensor" scheme is measured as a whole, not by row.
    """
    inputs = torch.ones(weight.shape[1], device=weight.device) if statistics is None else statistics.hessian.diagonal()
    explained = _explained(weight, quantized, inputs)
    representable = weight.abs().amax(1) >= _smallest(quantized.scale.dtype)
    served = quantized.as_served()
    zero = (served == 0).all(1)
    lost = served.sub_(weight)
    errors = lost.square_().sum(1) if statistics is None else statistics.row_energies(lost)
    if quantized.scheme.group_size == "tensor":
        errors, explained, zero, representable = (
            errors.sum()[None],
            explained.sum()[None],
            zero.all()[None],
            representable.any()[None],
        )
    if (zero & representable).any():
        return float("inf")
    return float((errors.clamp_min(0) / explained.clamp_min(1e-38)).max().sqrt())


def _explained(weight: Tensor, quantized: QuantizedLinear, inputs: Tensor) -> Tensor:
    """Expected output error `[out]` of rounding to nearest. inputs: mean square of each input, `[in]`."""
    scheme, columns = quantized.scheme, weight.shape[1]
    width, groups = scheme.columns_per_group(columns), scheme.groups(columns)
    low, high = full_range(weight, scheme)
    span = 2 * torch.maximum(-low, high) if scheme.symmetric else high - low
    steps = 2**18 if scheme.number == "fp8" else scheme.levels  # float8's smallest step is 2^-9, its range 448
    step = (span / steps).clamp_min(_smallest(quantized.scale.dtype))
    size = torch.nn.functional.pad(inputs, (0, groups * width - columns)).view(groups, width).sum(1)
    whole = weight.square() @ inputs
    floating = FLOAT8_VARIANCE * whole if scheme.number == "fp8" or scheme.mixed else 0.0
    return step.square() @ size / 12 + floating + 1e-6 * whole  # products with the statistics may be 16-bit


def _smallest(dtype: torch.dtype) -> float:
    """The smallest scale of this dtype; subnormal scales are used only in float16."""
    info = torch.finfo(dtype)
    return info.smallest_normal * (info.eps if dtype == torch.float16 else 1.0)
