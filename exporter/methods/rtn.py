"""Round to nearest: every weight to the nearest value its scale allows; needs no data."""

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from exporter.quantized import QuantizedLinear, Scheme, quantize
from exporter.ranges import Range, fit_scale

VERSION = 2
SMOOTHS = False
Statistics = None


class Options(BaseModel):
    """range: "minmax" covers every weight, "mse" searches the range with the smallest squared error."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    range_: Range = Field("minmax", alias="range")


def quantize_linear(
    weight: Tensor, statistics: Any, scheme: Scheme, options: Options, scale_dtype: torch.dtype
) -> tuple[QuantizedLinear, tuple[str, ...]]:
    """Nearest codes of `weight` f32 `[out, in]`; `statistics` is not used."""
    scale, zero = fit_scale(weight, scheme, scale_dtype, options.range_)
    return QuantizedLinear(scheme, quantize(weight, scale, zero, scheme), scale, zero), ()
