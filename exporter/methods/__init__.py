"""Quantization methods: pure functions of tensors, one file each.

Enters: the weight of a linear and the statistics of its inputs.
Leaves: codes, scales and zero points (`QuantizedLinear`).
May import: numerics.

To add one, write `methods/NAME.py` with what `Method` requires and add a line to `METHODS`; a method that moves scales
(`Smoother`) gets a line in `SMOOTHERS` too.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from exporter.methods import awq, gptq, rtn
from exporter.methods.options import MethodOptions
from exporter.numerics.quantized import QuantizedLinear, Scheme

__all__ = ["METHODS", "SMOOTHERS", "Method", "MethodOptions", "Smoother"]


class Method(Protocol):
    """A module that turns one weight into a `QuantizedLinear`.

    Options: frozen pydantic model of the recipe's `options:`, derived from `MethodOptions`.
    Statistics: `moments.Statistics`, or None when the method needs no calibration data.
    VERSION: raised whenever results change; part of the job's fingerprint.
    """

    VERSION: int

    @property
    def Options(self) -> type[MethodOptions]: ...

    @property
    def Statistics(self) -> type[Any] | None: ...

    def quantize_linear(
        self, weight: Tensor, statistics: Any, scheme: Scheme, options: Any, scale_dtype: torch.dtype
    ) -> tuple[QuantizedLinear, tuple[str, ...]]:
        """Quantize `weight` f32 `[out, in]`; also returns notes the user should read (empty when all went well)."""


class Smoother(Method, Protocol):
    """A method that moves scales between linears before they are quantized: it also proposes column scales.

    weights: f32 `[out_i, in]` of the linears that share an input. Scales: f32 `[in]`.
    """

    def find_scales(
        self, weights: Sequence[Tensor], statistics: Any, scheme: Scheme, options: Any, scale_dtype: torch.dtype
    ) -> tuple[Tensor, float, float]:
        """The best scales by the linears' own outputs; errors without and with them."""

    def candidates(self, weights: Sequence[Tensor], statistics: Any, scheme: Scheme, options: Any) -> Iterator[Tensor]:
        """Scales worth trying, ones first; tried on the whole block where `options.runs_block`."""

    def rounded(
        self, weights: Iterable[Tensor], scales: Tensor, scheme: Scheme, scale_dtype: torch.dtype
    ) -> Iterator[Tensor]:
        """What each weight becomes with these scales, for inputs as they are without them."""

    def best(self, tried: Iterable[tuple[Tensor, float]]) -> tuple[Tensor, float, float]:
        """Of (scales, error) pairs: the best scales, the error of the first pair, and the least."""


METHODS: dict[str, Method] = {"rtn": rtn, "gptq": gptq, "awq": awq}
SMOOTHERS: dict[str, Smoother] = {"awq": awq}  # those of METHODS that move scales
