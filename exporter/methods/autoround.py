"""AutoRound (SignRound; Cheng et al., arXiv 2309.05516 and 2512.04746): learn how each weight of a block is rounded.

This file gives the start: ranges with scales of either sign, fitted to the weights that the inputs make important, and
rounding to nearest. `quantization/tuning.py` then learns the rounding of all linears of a block together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from exporter.lazy_torch import torch
from exporter.methods.options import MethodOptions
from exporter.numerics.hessian import Statistics
from exporter.numerics.quantized import QuantizedLinear, Scheme, quantize
from exporter.numerics.ranges import fit_scale

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["VERSION", "Options", "Statistics", "quantize_linear"]

VERSION = 1


class Options(MethodOptions):
    """steps: sign-gradient steps per block. rate: size of the first step, which falls to 0 linearly; None is 1 / steps.

    A rate is in steps of the grid for the rounding, and in shares of a range for the ranges.
    """

    steps: int = Field(200, ge=1, le=100_000)
    rate: float | None = Field(None, gt=0, le=1)

    @property
    def learned_steps(self) -> int:
        """Steps of learned rounding after the method."""
        return self.steps

    @property
    def learning_rate(self) -> float:
        """Size of the first step of learned rounding."""
        return self.rate or 1 / self.steps

    @property
    def signed_scales(self) -> bool:
        """Whether a group may get a negative scale."""
        return True


def quantize_linear(
    weight: Tensor, statistics: Statistics, scheme: Scheme, options: Options, scale_dtype: torch.dtype
) -> tuple[QuantizedLinear, tuple[str, ...]]:
    """The start: nearest codes of `weight` f32 `[out, in]` within ranges weighted by the squares of the inputs."""
    scale, zero = fit_scale(weight, scheme, scale_dtype, "signed", statistics.importance())
    return QuantizedLinear(scheme, quantize(weight, scale, zero, scheme), scale, zero), ()
