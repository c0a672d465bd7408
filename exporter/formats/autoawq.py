"""AutoAWQ format ("awq", version GEMM): 4 bits, packed along `out` with interleaved nibbles; zero points unchanged.

`qweight` int32 `[in, out/8]`, where nibble i of a word holds output `ORDER[i]` of its eight; `qzeros` int32
`[groups, out/8]` in the same order; `scales` floating point `[groups, out]`. Written by AutoAWQ's `WQLinear_GEMM`, read
by vLLM's `AutoAWQConfig` and GPTQModel. The format has no symmetric schemes: their zero point 8 is stored explicitly.
One scheme for the whole model: the config has no per-component rules, only `modules_to_not_convert`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from exporter.errors import ArtifactError
from exporter.formats.config_group import ConfigGroup
from exporter.numerics.bit_packing import pack_bits, packed_words, unpack_bits
from exporter.numerics.quantized import GroupSize, QuantizedLinear, Scheme

if TYPE_CHECKING:
    from torch import Tensor

NAME = "awq"
KV_CACHES: Mapping[str, Mapping[str, Any]] = {}  # its config has no field for it
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
NATURAL = [0, 4, 1, 5, 2, 6, 3, 7]  # the inverse of ORDER


def supports(scheme: Scheme, columns: int, rows: int) -> str | None:
    """Why a linear `[rows, columns]` cannot be stored, or None."""
    if scheme.number != "int" or scheme.activations:
        return "it stores only weight-only integers; use compressed_tensors"
    if scheme.bits != 4:
        return f"it stores only 4 bits, not {scheme.bits}; use compressed_tensors"
    if isinstance(scheme.group_size, int) and columns % scheme.group_size:
        return f"groups of {scheme.group_size} do not divide {columns} inputs"
    if columns % 8 or rows % 8:
        return f"it needs inputs and outputs in multiples of 8, not {columns} and {rows}"
    return None


def conflict(schemes: Sequence[Scheme]) -> str | None:
    """Why these schemes cannot share one config, or None: their group sizes must be equal."""
    sizes = {_size(scheme) for scheme in schemes}
    if len(sizes) < 2:
        return None
    names = ", ".join(sorted({scheme.label() for scheme in schemes}))
    return f"it has one group size for the whole model, not {names}; use compressed_tensors"


def tensor_names(name: str, scheme: Scheme) -> tuple[str, ...]:
    """Names of the tensors of the linear `name`."""
    return f"{name}.qweight", f"{name}.qzeros", f"{name}.scales"


def pack(name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors of one linear.

    scales keep the dtype of `linear.scale`, because rounding bfloat16 to the float16 of older files would change the
    weights.
    """
    return {
        f"{name}.qweight": pack_bits(_reordered(linear.codes.T, ORDER), 4),
        f"{name}.qzeros": pack_bits(_reordered(linear.zero.T, ORDER), 4),
        f"{name}.scales": linear.scale.T.contiguous(),
    }


def stored_bytes(scheme: Scheme, columns: int, rows: int, scale_bytes: int) -> int:
    """Bytes of the tensors of `pack` for a linear `[rows, columns]` with `scale_bytes` per scale."""
    groups = scheme.groups(columns)
    return 4 * (columns + groups) * packed_words(rows, 4) + rows * groups * scale_bytes


def unpack(name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedLinear:
    """The inverse of `pack`."""
    scales = tensors[f"{name}.scales"]
    codes, zero = (
        _reordered(unpack_bits(tensors[f"{name}.{part}"], 4, scales.shape[1]), NATURAL).T.contiguous()
        for part in ("qweight", "qzeros")
    )
    return QuantizedLinear(scheme, codes, scales.T.contiguous(), zero)


def _reordered(values: Tensor, order: list[int]) -> Tensor:
    """`[n, out]` with every eight columns in another order."""
    return values.reshape(values.shape[0], -1, 8)[:, :, order].flatten(1)


def quantization_config(
    groups: Sequence[ConfigGroup], unquantized: Sequence[str], kv_cache: str | None = None
) -> dict[str, Any]:
    """The `quantization_config` of config.json. unquantized: exact names (no patterns) of linears in 16 bits.

    ArtifactError when the groups differ in more than symmetry; `conflict` reports this before.
    """
    problem = conflict([group.scheme for group in groups])
    if problem:
        raise ArtifactError(f"format {NAME}: {problem}")
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": _size(groups[0].scheme) if groups else 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(unquantized),
    }


def _size(scheme: Scheme) -> int:
    return scheme.group_size if isinstance(scheme.group_size, int) else -1


def read_config(config: Mapping[str, Any]) -> list[ConfigGroup]:
    """The single group of a `quantization_config`: every linear, asymmetric (the format has no symmetric schemes)."""
    size: GroupSize = "row" if config["group_size"] == -1 else int(config["group_size"])
    return [ConfigGroup(Scheme(4, size, symmetric=False), ("re:.*",))]
