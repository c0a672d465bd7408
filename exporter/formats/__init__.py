"""Artifact formats: the bit layout in which a `QuantizedLinear` is stored.

Enters: codes, scales and zero points.
Leaves: named tensors and the `quantization_config` of config.json; and the way back.
May import: numerics.

To add one, write `formats/NAME.py` with what `Format` requires and add a line to `FORMATS`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from exporter.formats import autoawq, autogptq, compressed_tensors
from exporter.formats.group import Group
from exporter.numerics.quantized import QuantizedLinear, Scheme


class Format(Protocol):
    """A module that packs linears and describes them."""

    @property
    def NAME(self) -> str:
        """The key in `FORMATS`."""

    @property
    def KV_CACHES(self) -> Mapping[str, Mapping[str, Any]]:
        """What the config says of each number type, other than the model's own, that a cache may be kept in."""

    def supports(self, scheme: Scheme, columns: int, rows: int) -> str | None:
        """Why a linear `[rows, columns]` cannot be stored under `scheme`, or None."""

    def conflict(self, schemes: Sequence[Scheme]) -> str | None:
        """Why linears of these schemes, each supported, cannot lie in one artifact, or None."""

    def tensor_names(self, name: str, scheme: Scheme) -> tuple[str, ...]:
        """Names of the tensors that stand for the linear `name` (its checkpoint name without `.weight`)."""

    def pack(self, name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
        """The tensors of one linear."""

    def stored_bytes(self, scheme: Scheme, columns: int, rows: int, scale_bytes: int) -> int:
        """Bytes of the tensors that `pack` makes of a linear `[rows, columns]` whose scales take `scale_bytes` each."""

    def unpack(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedLinear:
        """The inverse of `pack`."""

    def quantization_config(
        self, groups: Sequence[Group], kept: Sequence[str], kv_cache: str | None = None
    ) -> dict[str, Any]:
        """The `quantization_config` of config.json. kept: names of linears in 16 bit. kv_cache: of `KV_CACHES`."""

    def read_config(self, config: Mapping[str, Any]) -> list[Group]:
        """The groups of a `quantization_config`."""


FORMATS: dict[str, Format] = {
    "compressed_tensors": compressed_tensors,
    "gptq": autogptq,
    "awq": autoawq,
}


def read_groups(format_name: str, config: Mapping[str, Any]) -> list[Group]:
    """The groups of an artifact by its config.json; none where everything was dequantized."""
    found = config.get("quantization_config")
    return FORMATS[format_name].read_config(found) if found else []
