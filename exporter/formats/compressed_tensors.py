"""compressed-tensors format: codes as a dense little-endian bit stream along `in`, one config with several groups.

Weight-only integers are `pack-quantized`: `weight_packed` int32 `[out, ceil(in*bits/32)]` holds the code, which is the
signed value plus `2**(bits-1)`; `weight_scale` `[out, groups]`; `weight_shape` int64 `[2]`; asymmetric schemes add
`weight_zero_point` int32 `[ceil(out*bits/32), groups]`, the same stream along `out`. Read by vLLM's
`CompressedTensorsWNA16` and by compressed-tensors >= 0.18 (0.17 packs 3, 5, 6 and 7 bits in another shape).
4 bits with float8 activations are stored like weight-only 4 bits; `CompressedTensorsW4A8Fp8` reads them on Hopper.
8 bits with int8 activations are `int-quantized` (`weight` int8), float8 is `float-quantized` (`weight` float8 e4m3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from exporter.formats.group import Group
from exporter.lazy_torch import torch
from exporter.numerics.quantized import QuantizedLinear, Scheme, pack_bits, packed_words, unpack_bits

if TYPE_CHECKING:
    from torch import Tensor

NAME = "compressed_tensors"
# All scales are 1 (docs/explanation/float8.md explains when that is sufficient).
KV_CACHES: Mapping[str, Mapping[str, Any]] = {
    "fp8": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
}


def supports(scheme: Scheme, columns: int, rows: int) -> str | None:
    """Why a linear `[rows, columns]` cannot be stored, or None."""
    eight_bits = scheme.bits == 8 and scheme.symmetric and not isinstance(scheme.group_size, int)
    if scheme.number == "fp8" and (not eight_bits or scheme.activations == "int8"):
        return "float8 weights are 8 bits, symmetric, with group_size row or tensor, and activations fp8 or none"
    if scheme.mixed and (columns % 128 or rows % 128):
        return "4 bits with float8 activations need inputs and outputs in multiples of 128; remove activations: fp8"
    plain = scheme.activations is None or (eight_bits and scheme.activations == "int8")
    if scheme.number == "int" and not plain and not scheme.mixed:
        allowed = "integers with activations are 8 bits, symmetric, with group_size row or tensor, and activations int8"
        return f"{allowed}; or 4 bits, symmetric, with group_size 128, and activations fp8"
    if not 2 <= scheme.bits <= 8:
        return f"it stores 2 to 8 bits, not {scheme.bits}"
    if isinstance(scheme.group_size, int) and columns % scheme.group_size:
        return f"groups of {scheme.group_size} do not divide {columns} inputs"
    return None


def conflict(schemes: Sequence[Scheme]) -> str | None:
    """None: a config can have groups of any schemes."""
    return None


def _layout(scheme: Scheme) -> str:
    """The format's name for the layout of a scheme."""
    if scheme.number == "fp8":
        return "float-quantized"
    return "int-quantized" if scheme.activations == "int8" else "pack-quantized"


def tensor_names(name: str, scheme: Scheme) -> tuple[str, ...]:
    """Names of the tensors of the linear `name`."""
    if _layout(scheme) != "pack-quantized":
        return f"{name}.weight", f"{name}.weight_scale"
    zero = () if scheme.symmetric else (f"{name}.weight_zero_point",)
    return f"{name}.weight_packed", f"{name}.weight_scale", f"{name}.weight_shape", *zero


def pack(name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors of one linear."""
    scheme, scale = linear.scheme, linear.scale
    if scheme.number == "fp8":
        return {f"{name}.weight": linear.codes.view(torch.float8_e4m3fn), f"{name}.weight_scale": scale}
    if _layout(scheme) == "int-quantized":
        signed = (linear.codes ^ scheme.middle).view(torch.int8)  # flipping the top bit subtracts 128
        return {f"{name}.weight": signed, f"{name}.weight_scale": scale}
    tensors = {
        f"{name}.weight_packed": pack_bits(linear.codes, scheme.bits),
        f"{name}.weight_scale": scale,
        f"{name}.weight_shape": torch.tensor(linear.codes.shape, dtype=torch.int64),
    }
    if not scheme.symmetric:
        tensors[f"{name}.weight_zero_point"] = pack_bits(linear.zero.T.contiguous(), scheme.bits).T.contiguous()
    return tensors


def stored_bytes(scheme: Scheme, columns: int, rows: int, scale_bytes: int) -> int:
    """Bytes of the tensors of `pack` for a linear `[rows, columns]` with `scale_bytes` per scale."""
    groups = scheme.groups(columns)
    scales = rows * groups * scale_bytes
    if _layout(scheme) != "pack-quantized":
        return rows * columns + scales
    zeros = 0 if scheme.symmetric else 4 * packed_words(rows, scheme.bits) * groups
    return 4 * rows * packed_words(columns, scheme.bits) + scales + 2 * 8 + zeros  # `weight_shape` is two int64


def unpack(name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedLinear:
    """The inverse of `pack`."""
    scale = tensors[f"{name}.weight_scale"]
    middle = 0 if scheme.number == "fp8" else scheme.middle
    zero = torch.full(scale.shape, middle, dtype=torch.uint8, device=scale.device)
    if scheme.number == "fp8":
        return QuantizedLinear(scheme, tensors[f"{name}.weight"].view(torch.uint8), scale, zero)
    if _layout(scheme) == "int-quantized":
        codes = tensors[f"{name}.weight"].view(torch.uint8) ^ scheme.middle
        return QuantizedLinear(scheme, codes, scale, zero)
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    codes = unpack_bits(tensors[f"{name}.weight_packed"], scheme.bits, columns)
    if not scheme.symmetric:
        packed = tensors[f"{name}.weight_zero_point"].T.contiguous()
        zero = unpack_bits(packed, scheme.bits, rows).T.contiguous()
    return QuantizedLinear(scheme, codes, scale, zero)


def quantization_config(
    groups: Sequence[Group], unquantized: Sequence[str], kv_cache: str | None = None
) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    unquantized: names of linears in 16 bits. kv_cache: a key of `KV_CACHES`.
    """
    layouts = {_layout(group.scheme) for group in groups}
    # Without a format per group, the library reads all weights with quantized inputs as int8.
    with_format = layouts != {"pack-quantized"} or any(group.scheme.activations for group in groups)
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "mixed-precision" if len(layouts) > 1 else next(iter(layouts), "pack-quantized"),
        "kv_cache_scheme": dict(KV_CACHES[kv_cache]) if kv_cache else None,
        "ignore": list(unquantized),
        "config_groups": {f"group_{i}": _group_config(group, with_format) for i, group in enumerate(groups)},
    }


def _group_config(group: Group, with_format: bool) -> dict[str, Any]:
    scheme = group.scheme
    grouped = isinstance(scheme.group_size, int)
    number = "float" if scheme.number == "fp8" else "int"
    config: dict[str, Any] = {
        "targets": list(group.targets),
        "weights": {
            "num_bits": scheme.bits,
            "type": number,
            "symmetric": scheme.symmetric,
            # A "tensor" scheme is stored with equal scales per row, because kernels support only channels and groups.
            "strategy": "group" if grouped else "channel",
            "group_size": scheme.group_size if grouped else None,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
    }
    if scheme.activations:
        kind = "float" if scheme.activations == "fp8" else "int"
        token = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
        config["input_activations"] = token
    if with_format:
        config["format"] = _layout(scheme)
    return config


def read_config(config: Mapping[str, Any]) -> list[Group]:
    """The groups of a `quantization_config`; a "tensor" scheme is read as "row", because it is stored that way."""
    return [Group(_scheme(group), tuple(group["targets"])) for group in config.get("config_groups", {}).values()]


def _scheme(group: Mapping[str, Any]) -> Scheme:
    weights, inputs = group["weights"], group.get("input_activations")
    number = "fp8" if weights["type"] == "float" else "int"
    activations = None if not inputs else ("fp8" if inputs["type"] == "float" else "int8")
    size = weights["group_size"] if weights["strategy"] == "group" else "row"
    return Scheme(weights["num_bits"], size, weights["symmetric"], number, activations)  # type: ignore[arg-type]
