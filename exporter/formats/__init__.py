"""Artifact formats (compressed-tensors, AutoGPTQ, AutoAWQ): storage layout of a `QuantizedLinear`.

Enters: codes, scales and zero points.
Leaves: named tensors and the `quantization_config` of config.json, and the inverse.
May import: numerics.

To add a format, write `formats/NAME.py` with the functions of `Format` and add a line to `FORMATS`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from exporter.formats import autoawq, autogptq, compressed_tensors
from exporter.formats.group import Group
from exporter.numerics.quantized import QuantizedLinear, Scheme


class Format(Protocol):
    """A module that packs linear layers and writes their quantization config."""

    @property
    def NAME(self) -> str:
        """The key in `FORMATS`."""

    @property
    def KV_CACHES(self) -> Mapping[str, Mapping[str, Any]]:
        """Supported KV-cache dtype (other than the model's) -> its entry in the config."""

    def supports(self, scheme: Scheme, columns: int, rows: int) -> str | None:
        """Why a linear `[rows, columns]` cannot be stored under `scheme`, or None."""

    def conflict(self, schemes: Sequence[Scheme]) -> str | None:
        """Why linear layers of these (supported) schemes cannot share one artifact, or None."""

    def tensor_names(self, name: str, scheme: Scheme) -> tuple[str, ...]:
        """Names of the tensors of the linear `name` (its checkpoint name without `.weight`)."""

    def pack(self, name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
        """The tensors of one linear."""

    def stored_bytes(self, scheme: Scheme, columns: int, rows: int, scale_bytes: int) -> int:
        """Bytes of the tensors of a packed linear `[rows, columns]`; scale_bytes: bytes per scale."""

    def unpack(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedLinear:
        """The inverse of `pack`."""

    def quantization_config(
        self, groups: Sequence[Group], kept: Sequence[str], kv_cache: str | None = None
    ) -> dict[str, Any]:
        """The `quantization_config` of config.json. kept: names of 16-bit linears. kv_cache: a key of `KV_CACHES`."""

    def read_config(self, config: Mapping[str, Any]) -> list[Group]:
        """The groups in a `quantization_config`."""


FORMATS: dict[str, Format] = {
    "compressed_tensors": compressed_tensors,
    "gptq": autogptq,
    "awq": autoawq,
}


def read_groups(format_name: str, config: Mapping[str, Any]) -> list[Group]:
    """The groups of an artifact, from its config.json; an empty list if everything was dequantized."""
    quantization = config.get("quantization_config")
    return FORMATS[format_name].read_config(quantization) if quantization else []
