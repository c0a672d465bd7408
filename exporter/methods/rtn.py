"""Round to nearest (RTN): round every weight to the nearest quantization level; needs no calibration data."""

from typing import Any

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from exporter.methods.options import MethodOptions
from exporter.numerics.quantized import QuantizedLinear, Scheme, quantize
from exporter.numerics.ranges import Range, fit_scale

VERSION = 2
Statistics = None


class Options(MethodOptions):
    """range: "minmax" covers all weights, "mse" searches the range with the smallest squared error."""

    model_config = ConfigDict(populate_by_name=True)

    range_: Range = Field("minmax", alias="range")


def quantize_linear(
    weight: Tensor, statistics: Any, scheme: Scheme, options: Options, scale_dtype: torch.dtype
) -> tuple[QuantizedLinear, tuple[str, ...]]:
    """Round `weight` f32 `[out, in]` to the nearest codes; `statistics` is ignored."""
    scale, zero = fit_scale(weight, scheme, scale_dtype, options.range_)
    return QuantizedLinear(scheme, quantize(weight, scale, zero, scheme), scale, zero), ()
