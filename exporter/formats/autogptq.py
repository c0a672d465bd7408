"""AutoGPTQ format ("gptq", checkpoint format v1): codes packed along `in`, transposed; zero points stored minus one.

`qweight` int32 `[in*bits/32, out]` is the dense little-endian stream of each output row, as a column; `qzeros` int32
`[groups, out*bits/32]` the same stream of `zero - 1` along `out`; `scales` floating point `[groups, out]`; `g_idx`
int32 `[in]`, the group of each column. Written by auto-gptq's `qlinear_cuda_old.py` and GPTQModel (`FORMAT.GPTQ`), read
by vLLM's `AutoGPTQConfig` (4 and 8 bits) and GPTQModel (2, 3, 4 and 8). Components with other schemes are `dynamic`
rules of the config: `+:regex` changes the scheme, `-:regex` excludes a linear, and the first match applies.

Only symmetric schemes: `zero - 1` cannot represent a zero point of 0, which readers turn into a carry to the next
value, and vLLM refuses asymmetric weights in this format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from exporter.errors import ArtifactError
from exporter.formats.config_group import ConfigGroup
from exporter.lazy_torch import torch
from exporter.numerics.bit_packing import pack_bits, packed_words, unpack_bits
from exporter.numerics.quantized import QuantizedLinear, Scheme

if TYPE_CHECKING:
    from torch import Tensor

NAME = "gptq"
KV_CACHES: Mapping[str, Mapping[str, Any]] = {}  # its config has no field for it
BITS = (2, 3, 4, 8)


def supports(scheme: Scheme, columns: int, rows: int) -> str | None:
    """Why a linear `[rows, columns]` cannot be stored, or None."""
    if scheme.number != "int" or scheme.activations:
        return "it stores only weight-only integers; use compressed_tensors"
    if scheme.bits not in BITS:
        return f"it stores only 2, 3, 4 or 8 bits, not {scheme.bits}; use compressed_tensors"
    if not scheme.symmetric:
        return "it cannot store a zero point of 0; use symmetric: true or compressed_tensors"
    if isinstance(scheme.group_size, int) and columns % scheme.group_size:
        return f"groups of {scheme.group_size} do not divide {columns} inputs"
    if columns % 32 or rows % 32:
        return f"it needs inputs and outputs in multiples of 32, not {columns} and {rows}"
    return None


def conflict(schemes: Sequence[Scheme]) -> str | None:
    """None: `dynamic` rules allow all combinations of schemes in one config."""
    return None


def tensor_names(name: str, scheme: Scheme) -> tuple[str, ...]:
    """Names of the tensors of the linear `name`."""
    return f"{name}.qweight", f"{name}.qzeros", f"{name}.scales", f"{name}.g_idx"


def pack(name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors of one linear.

    scales keep the dtype of `linear.scale`, because rounding bfloat16 to the float16 of older files would change the
    weights.
    """
    scheme, columns = linear.scheme, linear.codes.shape[1]
    group = torch.arange(columns, device=linear.codes.device) // scheme.columns_per_group(columns)
    return {
        f"{name}.qweight": pack_bits(linear.codes, scheme.bits).T.contiguous(),
        f"{name}.qzeros": pack_bits(linear.zero.T - 1, scheme.bits),
        f"{name}.scales": linear.scale.T.contiguous(),
        f"{name}.g_idx": group.to(torch.int32),
    }


def stored_bytes(scheme: Scheme, columns: int, rows: int, scale_bytes: int) -> int:
    """Bytes of the tensors of `pack` for a linear `[rows, columns]` with `scale_bytes` per scale."""
    codes = rows * packed_words(columns, scheme.bits)
    zeros = scheme.groups(columns) * packed_words(rows, scheme.bits)
    return 4 * (codes + zeros + columns) + rows * scheme.groups(columns) * scale_bytes  # `columns` words are `g_idx`


def unpack(name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedLinear:
    """The inverse of `pack`; ArtifactError when `g_idx` reorders columns, which no scheme represents."""
    group, scales = tensors[f"{name}.g_idx"], tensors[f"{name}.scales"]
    columns, rows = group.numel(), scales.shape[1]
    expected = torch.arange(columns, device=group.device) // scheme.columns_per_group(columns)
    if not torch.equal(group, expected.to(torch.int32)):
        raise ArtifactError(f"{name}.g_idx does not follow groups of {scheme.columns_per_group(columns)} columns")
    codes = unpack_bits(tensors[f"{name}.qweight"].T.contiguous(), scheme.bits, columns)
    zero = unpack_bits(tensors[f"{name}.qzeros"], scheme.bits, rows) + 1
    return QuantizedLinear(scheme, codes, scales.T.contiguous(), zero.T.contiguous())


def quantization_config(
    groups: Sequence[ConfigGroup], unquantized: Sequence[str], kv_cache: str | None = None
) -> dict[str, Any]:
    """The `quantization_config` of config.json. unquantized: names of linears in 16 bits.

    The first group is also the base scheme, for readers that do not support `dynamic`.
    """
    dynamic: dict[str, dict[str, Any]] = {f"-:{_regex(name)}": {} for name in unquantized}
    for group in groups:
        dynamic |= {f"+:{_regex(target)}": _rule(group.scheme) for target in group.targets}
    base = _rule(groups[0].scheme) if groups else {"bits": 4, "group_size": 128, "sym": True}
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        **base,
        "desc_act": False,
        "lm_head": False,
        "dynamic": dynamic,
    }


def _regex(target: str) -> str:
    return target[3:] if target.startswith("re:") else re.escape(target) + "$"


def _rule(scheme: Scheme) -> dict[str, Any]:
    size = scheme.group_size if isinstance(scheme.group_size, int) else -1
    return {"bits": scheme.bits, "group_size": size, "sym": scheme.symmetric}


def read_config(config: Mapping[str, Any]) -> list[ConfigGroup]:
    """The groups of a `quantization_config`: one per scheme of its `+:` rules, or its base scheme for every linear.

    A "tensor" scheme is read as "row", because it is stored that way, and a name is read as a pattern.
    """
    targets: dict[Scheme, list[str]] = {}
    for rule, changes in (config.get("dynamic") or {}).items():
        if not rule.startswith("-:"):
            targets.setdefault(_scheme({**config, **changes}), []).append("re:" + rule.removeprefix("+:"))
    groups = targets or {_scheme(config): ["re:.*"]}
    return [ConfigGroup(scheme, tuple(patterns)) for scheme, patterns in groups.items()]


def _scheme(rule: Mapping[str, Any]) -> Scheme:
    return Scheme(rule["bits"], "row" if rule["group_size"] == -1 else rule["group_size"], rule["sym"])
