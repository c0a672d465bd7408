"""Whether a quantized weight is as close to the source's as its bits explain.

Rounding to steps of size s makes errors of variance `s^2 / 12`. The range of the source's weights gives the step that
their bits allow, and the step the output error that rounding explains, row by row. A row with a much larger error was
lost on the way: to a scale that its type cannot hold, or to a fault. Methods that use calibration data make the output
error smaller and the weight error larger, so theirs is measured with their statistics.
"""

import torch
from torch import Tensor

from exporter.numerics.hessian import Statistics
from exporter.numerics.quantized import QuantizedLinear
from exporter.numerics.ranges import full_range

MOST = 8.0  # times what rounding explains; the worst row of every method stays below 3 (`tests/test_source_error.py`)
FLOAT8_VARIANCE = 2.0**-6 / 12  # of a number between 1 and 2 that is rounded to 3 bits behind the point


def source_error(weight: Tensor, quantized: QuantizedLinear, statistics: Statistics | None = None) -> float:
    """The output error of the worst row as a multiple of what rounding explains; inf for a row that became zero.

    weight: f32 `[out, in]`, the source's, with the scales of folds multiplied in. statistics: of the linear's inputs;
    None counts all inputs alike, which is right for methods without calibration data only. About 1 for rounding to
    nearest; above `MOST` something is wrong. The rows of a "tensor" scheme are judged together.
    """
    inputs = torch.ones(weight.shape[1], device=weight.device) if statistics is None else statistics.hessian.diagonal()
    explained = _explained(weight, quantized, inputs)
    there = weight.abs().amax(1) >= _smallest(quantized.scale.dtype)
    served = quantized.as_served()
    zero = (served == 0).all(1)
    lost = served.sub_(weight)
    errors = lost.square_().sum(1) if statistics is None else statistics.row_energies(lost)
    if quantized.scheme.group_size == "tensor":
        errors, explained, zero, there = errors.sum()[None], explained.sum()[None], zero.all()[None], there.any()[None]
    if (zero & there).any():
        return float("inf")
    return float((errors.clamp_min(0) / explained.clamp_min(1e-38)).max().sqrt())


def _explained(weight: Tensor, quantized: QuantizedLinear, inputs: Tensor) -> Tensor:
    """Output error of each row `[out]` that rounding alone would make. inputs: mean square of each input, `[in]`."""
    scheme, columns = quantized.scheme, weight.shape[1]
    width, groups = scheme.columns_per_group(columns), scheme.groups(columns)
    low, high = full_range(weight, scheme)
    span = 2 * torch.maximum(-low, high) if scheme.symmetric else high - low
    steps = 2**18 if scheme.number == "fp8" else scheme.levels  # float8's smallest: 2^-9 of values up to 448
    step = (span / steps).clamp_min(_smallest(quantized.scale.dtype))
    size = torch.nn.functional.pad(inputs, (0, groups * width - columns)).view(groups, width).sum(1)
    whole = weight.square() @ inputs
    floating = FLOAT8_VARIANCE * whole if scheme.number == "fp8" or scheme.mixed else 0.0
    return step.square() @ size / 12 + floating + 1e-6 * whole  # products of the statistics may have 16 bits


def _smallest(dtype: torch.dtype) -> float:
    """The smallest step that a scale of this type can be; of subnormal numbers only those of float16 are used."""
    info = torch.finfo(dtype)
    return info.smallest_normal * (info.eps if dtype == torch.float16 else 1.0)
