"""Quantization methods: pure functions of tensors, one file per method.

Enters: the weight of a linear and the statistics of its inputs.
Leaves: codes, scales and zero points (`QuantizedLinear`).
May import: numerics.

To add one, write `methods/NAME.py` with the members of `Method` and add a line to `METHODS`; a method that moves scales
(`Smoother`) gets a line in `SMOOTHERS` too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from exporter.lazy_torch import torch
from exporter.methods import autoround, awq, gptq, rtn
from exporter.methods.options import MethodOptions
from exporter.numerics.quantized import QuantizedLinear, Scheme

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["METHODS", "SMOOTHERS", "Method", "MethodOptions", "Smoother"]


class Method(Protocol):
    """A module that turns one weight into a `QuantizedLinear`.

    Options: frozen pydantic model of the recipe's `options:`, derived from `MethodOptions`.
    Statistics: `hessian.Statistics`, or None when the method needs no calibration data.
    VERSION: incremented when a change alters results; part of the job's fingerprint.
    """

    VERSION: int

    @property
    def Options(self) -> type[MethodOptions]: ...

    @property
    def Statistics(self) -> type[Any] | None: ...

    def quantize_linear(
        self, weight: Tensor, statistics: Any, scheme: Scheme, options: Any, scale_dtype: torch.dtype
    ) -> tuple[QuantizedLinear, tuple[str, ...]]:
        """Quantize `weight` f32 `[out, in]`; also returns notes for the user (usually empty)."""


class Smoother(Method, Protocol):
    """A method that also moves scales between linears before they are quantized.

    weights: f32 `[out_i, in]` of the linears that share an input. Scales: f32 `[in]`.
    """

    def find_scales(
        self,
        weights: Sequence[Tensor],
        statistics: Any,
        scheme: Scheme,
        options: Any,
        scale_dtype: torch.dtype,
        tie: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, float, float]:
        """The best scales by the linears' own output error, and this error without and with the scales.

        tie: gives columns that need one scale the same scale; applied to every candidate.
        """

    def candidates(self, weights: Sequence[Tensor], statistics: Any, scheme: Scheme, options: Any) -> Iterator[Tensor]:
        """Candidate scales, starting with ones.

        With `options.runs_block` the caller evaluates them on the whole block.
        """

    def rounded(
        self, weights: Iterable[Tensor], scales: Tensor, scheme: Scheme, scale_dtype: torch.dtype
    ) -> Iterator[Tensor]:
        """Each weight quantized with these scales, divided by them so that it applies to unscaled inputs."""

    def best(self, tried: Iterable[tuple[Tensor, float]]) -> tuple[Tensor, float, float]:
        """From (scales, error) pairs: the best scales, the error of the first pair, and the smallest error."""


METHODS: dict[str, Method] = {"rtn": rtn, "gptq": gptq, "awq": awq, "autoround": autoround}
SMOOTHERS: dict[str, Smoother] = {"awq": awq}  # those of METHODS that move scales
