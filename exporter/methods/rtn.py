"""Round to nearest (RTN): rounds every weight to the nearest value of its grid, without calibration data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field

from exporter.lazy_torch import torch
from exporter.methods.options import MethodOptions
from exporter.numerics.quantized import QuantizedLinear, Scheme, quantize
from exporter.numerics.ranges import Range, fit_scale

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 2
Statistics = None


class Options(MethodOptions):
    """range: "minmax" covers every weight, "mse" searches the range with the smallest squared error, "signed" also
    among negative scales, which put the additional code of a symmetric scheme on the side of the larger weights.
    """

    model_config = ConfigDict(populate_by_name=True)

    range_: Range = Field("minmax", alias="range")

    @property
    def signed_scales(self) -> bool:
        """Whether a group may get a negative scale."""
        return self.range_ == "signed"


def quantize_linear(
    weight: Tensor, statistics: Any, scheme: Scheme, options: Options, scale_dtype: torch.dtype
) -> tuple[QuantizedLinear, tuple[str, ...]]:
    """Nearest codes of `weight` f32 `[out, in]`; `statistics` is not used."""
    scale, zero = fit_scale(weight, scheme, scale_dtype, options.range_)
    return QuantizedLinear(scheme, quantize(weight, scale, zero, scheme), scale, zero), ()
