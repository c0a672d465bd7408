"""compressed-tensors format: one config with several groups; the layout of the tensors follows from the scheme.

- `pack-quantized`, integers: codes as a dense little-endian bit stream along `in`. `weight_packed` int32 `[out,
  ceil(in*bits/32)]` holds the code, which is the signed value plus `2**(bits-1)`; `weight_scale` `[out, groups]`;
  `weight_shape` int64 `[2]`; asymmetric schemes add `weight_zero_point` int32 `[ceil(out*bits/32), groups]`, the same
  stream along `out`. Read by compressed-tensors >= 0.19 (0.17 packs 3, 5, 6 and 7 bits in another shape; 0.18 fails on
  float8 blocks). Inputs may be 8 bits: float8 for 4 bits on Hopper, int8 where `Scheme.as_int8` is false.
- `int-quantized`: `weight` int8. `float-quantized`: `weight` float8 e4m3; with blocks of 128 x 128, `weight_scale` is
  `[out/128, in/128]`.
- `nvfp4-pack-quantized` and `mxfp4-pack-quantized`: `weight_packed` uint8 `[out, in/2]`, the earlier of two float4
  numbers in the low half. `weight_scale` is float8 e4m3 with `weight_global_scale` f32 `[1]`, by which scales are
  divided; or uint8, the exponent of a power of two plus 127. `mxfp8-quantized`: `weight` float8 and such exponents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from exporter.formats.config_group import ConfigGroup
from exporter.lazy_torch import torch
from exporter.numerics.bit_packing import pack_bits, packed_words, unpack_bits
from exporter.numerics.quantized import BLOCK, QuantizedLinear, Scheme

if TYPE_CHECKING:
    from torch import Tensor

NAME = "compressed_tensors"
# All scales are 1 (docs/explanation/float8.md explains when that is sufficient).
KV_CACHES: Mapping[str, Mapping[str, Any]] = {
    "fp8": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
}
LAYOUTS = {
    "int": "pack-quantized",
    "fp8": "float-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp8": "mxfp8-quantized",
}
NUMBERS = {layout: number for number, layout in LAYOUTS.items()}
EXPONENT_BIAS = 127  # of powers of two that are stored as one byte


def supports(scheme: Scheme, columns: int, rows: int) -> str | None:
    """Why a linear `[rows, columns]` cannot be stored, or None."""
    if problem := scheme.invalid():
        return problem
    if (scheme.mixed or scheme.group_size == "block") and (columns % BLOCK or rows % BLOCK):
        return f"{scheme.label()} needs inputs and outputs in multiples of {BLOCK}"
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
    return "int-quantized" if scheme.as_int8 else LAYOUTS[scheme.number]


def tensor_names(name: str, scheme: Scheme) -> tuple[str, ...]:
    """Names of the tensors of the linear `name`."""
    layout = _layout(scheme)
    weight = f"{name}.weight_packed" if "pack" in layout else f"{name}.weight"
    if layout == "nvfp4-pack-quantized":
        return weight, f"{name}.weight_scale", f"{name}.weight_global_scale"
    if layout != "pack-quantized":
        return weight, f"{name}.weight_scale"
    zero = () if scheme.symmetric else (f"{name}.weight_zero_point",)
    return weight, f"{name}.weight_scale", f"{name}.weight_shape", *zero


def pack(name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors of one linear."""
    return dict(zip(tensor_names(name, linear.scheme), _tensors(linear), strict=True))


def _tensors(linear: QuantizedLinear) -> list[Tensor]:
    """The tensors of one linear, in the order of `tensor_names`."""
    scheme, scale = linear.scheme, linear.scale
    if scheme.as_int8:
        return [(linear.codes ^ scheme.middle).view(torch.int8), scale]  # flipping the top bit subtracts 128
    if scheme.number == "nvfp4":
        factor = linear.scale_factor
        return [_half_bytes(linear.codes), (scale * factor).to(torch.float8_e4m3fn), torch.tensor([factor])]
    if scheme.grid:
        whole = linear.codes.view(torch.float8_e4m3fn) if scheme.bits == 8 else _half_bytes(linear.codes)
        return [whole, _stored_scale(scale, scheme)]
    shape = torch.tensor(linear.codes.shape, dtype=torch.int64)
    tensors = [pack_bits(linear.codes, scheme.bits), scale, shape]
    if not scheme.symmetric:
        tensors.append(pack_bits(linear.zero.T.contiguous(), scheme.bits).T.contiguous())
    return tensors


def _half_bytes(codes: Tensor) -> Tensor:
    return pack_bits(codes, 4).view(torch.uint8)[:, : codes.shape[1] // 2].contiguous()


def _stored_scale(scale: Tensor, scheme: Scheme) -> Tensor:
    """Scales of a float grid as they are stored: one for a block, or the exponents of powers of two."""
    if scheme.number in ("mxfp4", "mxfp8"):
        return (torch.frexp(scale)[1] - 1 + EXPONENT_BIAS).to(torch.uint8)
    return scale[::BLOCK].contiguous() if scheme.group_size == "block" else scale


def stored_bytes(scheme: Scheme, columns: int, rows: int, scale_bytes: int) -> int:
    """Bytes of the tensors of `pack` for a linear `[rows, columns]` with `scale_bytes` per scale."""
    groups = scheme.groups(columns)
    if scheme.grid:
        scales = groups * (-(-rows // BLOCK) if scheme.group_size == "block" else rows)
        factor = 4 if scheme.number == "nvfp4" else 0
        return rows * columns * scheme.bits // 8 + scales * (scale_bytes if scheme.number == "fp8" else 1) + factor
    scales = rows * groups * scale_bytes
    if scheme.as_int8:
        return rows * columns + scales
    zeros = 0 if scheme.symmetric else 4 * packed_words(rows, scheme.bits) * groups
    return 4 * rows * packed_words(columns, scheme.bits) + scales + 2 * 8 + zeros  # `weight_shape` is two int64


def unpack(name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedLinear:
    """The inverse of `pack`."""
    weight, scale, *others = (tensors[each] for each in tensor_names(name, scheme))
    if scheme.grid:
        return _unpack_floats(weight, scale, others, scheme)
    zero = torch.full(scale.shape, scheme.middle, dtype=torch.uint8, device=scale.device)
    if scheme.as_int8:
        return QuantizedLinear(scheme, weight.view(torch.uint8) ^ scheme.middle, scale, zero)
    rows, columns = others[0].tolist()
    if not scheme.symmetric:
        zero = unpack_bits(others[1].T.contiguous(), scheme.bits, rows).T.contiguous()
    return QuantizedLinear(scheme, unpack_bits(weight, scheme.bits, columns), scale, zero)


def _unpack_floats(weight: Tensor, scale: Tensor, others: Sequence[Tensor], scheme: Scheme) -> QuantizedLinear:
    codes = weight.view(torch.uint8)
    if scheme.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)
    factor = float(others[0]) if others else 0.0
    if scheme.number == "nvfp4":
        scale = scale.float() / factor
    elif scheme.number != "fp8":
        scale = torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - EXPONENT_BIAS)
    elif scheme.group_size == "block":
        scale = scale.repeat_interleave(BLOCK, 0)
    return QuantizedLinear(scheme, codes, scale, torch.zeros_like(scale, dtype=torch.uint8), factor)


def quantization_config(
    groups: Sequence[ConfigGroup], unquantized: Sequence[str], kv_cache: str | None = None
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


def _group_config(group: ConfigGroup, with_format: bool) -> dict[str, Any]:
    scheme = group.scheme
    config: dict[str, Any] = {
        "targets": list(group.targets),
        "weights": {
            "num_bits": scheme.bits,
            "type": "float" if scheme.grid else "int",
            "symmetric": scheme.symmetric,
            **_strategy(scheme),
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
    }
    if scheme.activations:
        kind = "float" if scheme.activations == "fp8" else "int"
        token = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
        in_groups = {"strategy": "group", "group_size": BLOCK} if scheme.input_rounding == "fp8-groups" else {}
        config["input_activations"] = token | in_groups
    if with_format:
        config["format"] = _layout(scheme)
    return config


def _strategy(scheme: Scheme) -> dict[str, Any]:
    """Which weights share a scale, and the dtype of scales that are no 16-bit numbers."""
    if scheme.group_size == "block":
        return {"strategy": "block", "group_size": None, "block_structure": [BLOCK, BLOCK]}
    if not isinstance(scheme.group_size, int):
        # A "tensor" scheme is stored with equal scales per row, because kernels support only channels and groups.
        return {"strategy": "channel", "group_size": None}
    strategy = {"strategy": "group", "group_size": scheme.group_size}
    if scheme.number == "nvfp4":
        return strategy | {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
    return strategy | ({"scale_dtype": "torch.uint8"} if scheme.grid else {})


def read_config(config: Mapping[str, Any]) -> list[ConfigGroup]:
    """The groups of a `quantization_config`; a "tensor" scheme is read as "row", because it is stored that way."""
    every = config.get("format")
    return [
        ConfigGroup(_scheme(group, every), tuple(group["targets"]))
        for group in config.get("config_groups", {}).values()
    ]


def _scheme(group: Mapping[str, Any], layout: Any) -> Scheme:
    weights, inputs = group["weights"], group.get("input_activations")
    number = NUMBERS[group.get("format", layout)] if weights["type"] == "float" else "int"
    activations = None if not inputs else ("fp8" if inputs["type"] == "float" else "int8")
    named = {"channel": "row", "tensor": "row", "block": "block"}
    size = named.get(weights["strategy"]) or weights["group_size"]
    return Scheme(weights["num_bits"], size, weights["symmetric"], number, activations)  # type: ignore[arg-type]
