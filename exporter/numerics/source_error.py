"""Checks that a quantized weight approximates the source weight as well as rounding explains.

Rounding with steps of size s causes errors of variance `s^2 / 12`. The range of the source weights and the bits give
the step, and the step gives the output error that rounding explains, per row. A row with a much larger error was
damaged: by a scale that overflows its dtype, or by a bug. Methods with calibration data reduce the output error but
increase the weight error, so their error is measured with their statistics.
"""

import torch
from torch import Tensor

from exporter.numerics.float_grids import FLOAT8
from exporter.numerics.hessian import Statistics
from exporter.numerics.quantized import QuantizedLinear
from exporter.numerics.ranges import full_range

MAX_RATIO = 8.0  # largest error relative to rounding; all methods stay below 3 (`tests/test_source_error.py`)


def source_error(weight: Tensor, quantized: QuantizedLinear, statistics: Statistics | None = None) -> float:
    """The output error of the worst row, relative to the error that rounding explains; inf for a row that became zero.

    weight: f32 `[out, in]`, the source's, with folded scales multiplied in. statistics: of the linear's inputs; None
    weights all inputs equally, which is right only for methods without calibration data. About 1 for rounding to
    nearest; above `MAX_RATIO` the weight is damaged. The rows of a "tensor" scheme are judged together.
    """
    inputs = torch.ones(weight.shape[1], device=weight.device) if statistics is None else statistics.hessian.diagonal()
    explained = _explained(weight, quantized, inputs)
    nonzero = weight.abs().amax(1) >= _smallest(quantized.scale.dtype)
    served = quantized.as_served()
    zero = (served == 0).all(1)
    difference = served.sub_(weight)
    errors = difference.square_().sum(1) if statistics is None else statistics.row_energies(difference)
    if quantized.scheme.group_size == "tensor":
        errors, explained, zero, nonzero = (
            errors.sum()[None],
            explained.sum()[None],
            zero.all()[None],
            nonzero.any()[None],
        )
    if (zero & nonzero).any():
        return float("inf")
    return float((errors.clamp_min(0) / explained.clamp_min(1e-38)).max().sqrt())


def _explained(weight: Tensor, quantized: QuantizedLinear, inputs: Tensor) -> Tensor:
    """Output error of each row `[out]` from rounding alone. inputs: mean square of each input, `[in]`."""
    scheme, columns = quantized.scheme, weight.shape[1]
    width, groups = scheme.columns_per_group(columns), scheme.groups(columns)
    low, high = full_range(weight, scheme)
    span = 2 * torch.maximum(-low, high) if scheme.symmetric else high - low
    grid = FLOAT8 if scheme.mixed else scheme.grid
    steps = scheme.grid.steps if scheme.grid else scheme.levels
    step = (span / steps).clamp_min(_smallest(quantized.scale.dtype))
    size = torch.nn.functional.pad(inputs, (0, groups * width - columns)).view(groups, width).sum(1)
    energy = weight.square() @ inputs
    floating = grid.variance * energy if grid else 0.0
    return step.square() @ size / 12 + floating + 1e-6 * energy  # products of the statistics may have 16 bits


def _smallest(dtype: torch.dtype) -> float:
    """The smallest scale in this dtype; subnormal numbers are used only in float16."""
    info = torch.finfo(dtype)
    return info.smallest_normal * (info.eps if dtype == torch.float16 else 1.0)
