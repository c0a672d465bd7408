"""Artifact formats: the bit layout in which a `QuantizedLinear` is stored.

Enters: codes, scales and zero points.
Leaves: named tensors and the `quantization_config` of config.json; and the way back.
May import: numerics.

To add one, write `formats/NAME.py` with the members of `Format` and add a line to `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from exporter.formats import autoawq, autogptq, compressed_tensors
from exporter.formats.config_group import ConfigGroup
from exporter.numerics.quantized import QuantizedLinear, Scheme

if TYPE_CHECKING:
    from torch import Tensor


class Format(Protocol):
    """A module that packs linears and writes their quantization config."""

    @property
    def NAME(self) -> str:
        """The key in `FORMATS`."""

    @property
    def KV_CACHES(self) -> Mapping[str, Mapping[str, Any]]:
        """Number type of a KV cache, other than the model's own -> its entry in the config."""

    def supports(self, scheme: Scheme, columns: int, rows: int) -> str | None:
        """Why a linear `[rows, columns]` cannot be stored under `scheme`, or None."""

    def conflict(self, schemes: Sequence[Scheme]) -> str | None:
        """Why linears of these schemes, each supported, cannot be in one artifact, or None."""

    def tensor_names(self, name: str, scheme: Scheme) -> tuple[str, ...]:
        """Names of the tensors of the linear `name` (its checkpoint name without `.weight`)."""

    def pack(self, name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
        """The tensors of one linear."""

    def stored_bytes(self, scheme: Scheme, columns: int, rows: int, scale_bytes: int) -> int:
        """Bytes of the tensors of `pack` for a linear `[rows, columns]` with `scale_bytes` per scale."""

    def unpack(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedLinear:
        """The inverse of `pack`."""

    def quantization_config(
        self, groups: Sequence[ConfigGroup], unquantized: Sequence[str], kv_cache: str | None = None
    ) -> dict[str, Any]:
        """The `quantization_config` of config.json.

        unquantized: names of linears in 16 bits. kv_cache: a key of `KV_CACHES`.
        """

    def read_config(self, config: Mapping[str, Any]) -> list[ConfigGroup]:
        """The groups of a `quantization_config`."""


FORMATS: dict[str, Format] = {
    "compressed_tensors": compressed_tensors,
    "gptq": autogptq,
    "awq": autoawq,
}


def read_groups(format_name: str, config: Mapping[str, Any]) -> list[ConfigGroup]:
    """The groups of an artifact from its config.json; none when all linears are dequantized.

    LookupError, TypeError, AttributeError or ValueError when the config does not describe groups of this format.
    """
    quantization_config = config.get("quantization_config")
    groups = FORMATS[format_name].read_config(quantization_config) if quantization_config else []
    for group in groups:
        _refuse_invalid(group)
    return groups


def _refuse_invalid(group: ConfigGroup) -> None:
    """ValueError when a group that was read from an untrusted config has values that no scheme has."""
    scheme = group.scheme
    if type(scheme.bits) is not int or not 2 <= scheme.bits <= 8:
        raise ValueError(f"{scheme.bits!r} is no number of bits")
    named = scheme.group_size in ("row", "tensor", "block")
    if not named and (type(scheme.group_size) is not int or scheme.group_size < 1):
        raise ValueError(f"{scheme.group_size!r} is no group size")
    if not isinstance(scheme.symmetric, bool):
        raise TypeError(f"symmetric is {scheme.symmetric!r}")
    if problem := scheme.invalid():
        raise ValueError(problem)
    if not all(isinstance(target, str) for target in group.targets):
        raise TypeError("targets must be texts")
