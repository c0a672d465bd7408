"""Quantization methods (RTN, GPTQ, AWQ): pure functions of tensors, one file per method.

Enters: the weight of a linear and the statistics of its inputs.
Leaves: codes, scales and zero points (`QuantizedLinear`).
May import: numerics.

To add a method, write `methods/NAME.py` with the functions of `Method` and add a line to `METHODS`; for a method that
folds column scales (`Smoother`) also add a line to `SMOOTHERS`.
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
    Statistics: `hessian.Statistics`, or None if the method needs no calibration data.
    VERSION: increment it when results change; part of the job's fingerprint.
    """

    VERSION: int

    @property
    def Options(self) -> type[MethodOptions]: ...

    @property
    def Statistics(self) -> type[Any] | None: ...

    def quantize_linear(
        self, weight: Tensor, statistics: Any, scheme: Scheme, options: Any, scale_dtype: torch.dtype
    ) -> tuple[QuantizedLinear, tuple[str, ...]]:
        """Quantize `weight` f32 `[out, in]`. Also returns notes for the user, empty without problems."""


class Smoother(Method, Protocol):
    """A method that also proposes column scales, which are folded into the preceding module before quantization.

    weights: f32 `[out_i, in]` of the linears that share an input. Scales: f32 `[in]`.
    """

    def find_scales(
        self, weights: Sequence[Tensor], statistics: Any, scheme: Scheme, options: Any, scale_dtype: torch.dtype
    ) -> tuple[Tensor, float, float]:
        """Scales with the smallest output error of the linears; and the output errors without and with them."""

    def candidates(self, weights: Sequence[Tensor], statistics: Any, scheme: Scheme, options: Any) -> Iterator[Tensor]:
        """Candidate scales, ones first; if `options.runs_block`, the caller runs the block for each."""

    def rounded(
        self, weights: Iterable[Tensor], scales: Tensor, scheme: Scheme, scale_dtype: torch.dtype
    ) -> Iterator[Tensor]:
        """Each weight after scaling, quantization and unscaling: `Q(W s) / s`."""

    def best(self, tried: Iterable[tuple[Tensor, float]]) -> tuple[Tensor, float, float]:
        """Of (scales, error) pairs: the scales with the smallest error, the first error, and the smallest error."""


METHODS: dict[str, Method] = {"rtn": rtn, "gptq": gptq, "awq": awq}
SMOOTHERS: dict[str, Smoother] = {"awq": awq}  # the members of METHODS that fold scales
