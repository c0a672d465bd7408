"""Artifact formats: unpacking inverts packing, bytes equal those of the formats' own libraries, configs are read."""

import re
from math import lcm
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save

from exporter.errors import ArtifactError
from exporter.formats import FORMATS
from exporter.formats.config_group import ConfigGroup
from exporter.numerics.quantized import GroupSize, QuantizedLinear, Scheme, quantize
from exporter.numerics.ranges import fit_scale
from tests.oracles import naive_pack_bits

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_FORMATS = {
    "compressed-tensors": "compressed_tensors",
    "auto-gptq": "gptq",
    "gptqmodel": "gptq",
    "autoawq": "awq",
}
INTEGERS = [Scheme(b, g, s) for b in range(2, 9) for g in (8, 32, "row", "tensor") for s in (True, False)]
INT8 = [Scheme(8, g, activations="int8") for g in ("row", "tensor")]
FLOATS = [Scheme(8, g, number="fp8", activations=a) for g in ("row", "tensor") for a in (None, "fp8")]
PACKED_INT8 = [Scheme(b, g, activations="int8") for b in (2, 3, 4, 5) for g in (32, "row")]
NARROW = [Scheme(4, 16, number="nvfp4"), Scheme(4, 32, number="mxfp4"), Scheme(8, 32, number="mxfp8")]
BLOCKS = [Scheme(8, "block", number="fp8", activations=a) for a in (None, "fp8")]
MIXED_TYPES = Scheme(4, 128, activations="fp8")
SCHEMES = INTEGERS + INT8 + FLOATS + PACKED_INT8 + NARROW
CARRIED = {
    "compressed_tensors": set(SCHEMES),
    "gptq": {s for s in INTEGERS if s.bits in (2, 3, 4, 8) and s.symmetric},
    "awq": {s for s in INTEGERS if s.bits == 4},
}

WHOLE = {"compressed_tensors": 1, "gptq": 32, "awq": 8}  # both sizes of a linear are multiples of it


def random_linear(
    scheme: Scheme, rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float16
) -> QuantizedLinear:
    """Any codes and zero points that the scheme allows."""
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.groups(columns)
    scale = torch.rand(rows, groups, generator=generator) + 0.5
    scale = scale[:1, :1].expand(rows, groups).contiguous() if scheme.group_size == "tensor" else scale
    if scheme.grid:
        weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
        scale, zero = fit_scale(weight, scheme, dtype)
        return QuantizedLinear(scheme, quantize(weight, scale, zero, scheme), scale, zero)
    codes, zero = (
        torch.randint(0, scheme.levels + 1, shape, generator=generator, dtype=torch.uint8)
        for shape in ((rows, columns), (rows, groups))
    )
    zero = torch.full_like(zero, scheme.middle) if scheme.symmetric else zero
    return QuantizedLinear(scheme, codes, scale.to(dtype), zero)


def assert_equal(actual: QuantizedLinear, expected: QuantizedLinear) -> None:
    """Same scheme and, bit for bit, the same tensors."""
    assert actual.scheme == expected.scheme
    for name in ("codes", "scale", "zero"):
        first, other = getattr(actual, name), getattr(expected, name)
        assert first.dtype == other.dtype, name
        assert torch.equal(first, other), name


@pytest.mark.parametrize("name", FORMATS)
def test_name_is_the_key(name: str) -> None:
    assert name == FORMATS[name].NAME


@pytest.mark.parametrize("name", FORMATS)
def test_exactly_the_schemes_of_the_format_are_supported(name: str) -> None:
    reasons = {scheme: FORMATS[name].supports(scheme, 64, 32) for scheme in SCHEMES}
    assert {scheme for scheme, reason in reasons.items() if reason is None} == CARRIED[name]
    assert all(reason is None or len(reason) > 20 for reason in reasons.values())


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_unpack_inverts_pack(name: str, data: st.DataObject) -> None:
    scheme = data.draw(st.sampled_from(sorted(CARRIED[name], key=str)))
    group = scheme.group_size if isinstance(scheme.group_size, int) else 1
    rows = WHOLE[name] * data.draw(st.integers(1, 70 // WHOLE[name]))
    columns = lcm(WHOLE[name], group) * data.draw(st.integers(1, max(1, 70 // lcm(WHOLE[name], group))))
    assert FORMATS[name].supports(scheme, columns, rows) is None
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    linear = random_linear(scheme, rows, columns, data.draw(st.integers(0, 1000)), dtype)
    tensors = FORMATS[name].pack("a.b", linear)
    assert tuple(tensors) == FORMATS[name].tensor_names("a.b", scheme)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert_equal(FORMATS[name].unpack("a.b", load(save(tensors)), scheme), linear)


@pytest.mark.parametrize("name", FORMATS)
def test_packing_does_not_change_the_linear(name: str) -> None:
    for scheme in CARRIED[name]:
        linear, before = random_linear(scheme, 32, 64), random_linear(scheme, 32, 64)
        FORMATS[name].unpack("x", FORMATS[name].pack("x", linear), scheme)
        assert_equal(linear, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "columns"), [(32, 64), (96, 160), (33, 67), (1, 8)])
@pytest.mark.parametrize("name", FORMATS)
def test_stored_bytes_are_those_of_the_packed_tensors(name: str, rows: int, columns: int, dtype: torch.dtype) -> None:
    for scheme in CARRIED[name]:
        if FORMATS[name].supports(scheme, columns, rows) is None:
            tensors = FORMATS[name].pack("x", random_linear(scheme, rows, columns, dtype=dtype))
            stored = FORMATS[name].stored_bytes(scheme, columns, rows, dtype.itemsize)
            assert stored == sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()), scheme.label()


@pytest.mark.parametrize(
    ("name", "scheme", "shape", "words"),
    [
        ("compressed_tensors", Scheme(4, 48), (32, 64), "groups of 48"),
        ("compressed_tensors", Scheme(4, 128), (32, 64), "groups of 128"),
        ("compressed_tensors", Scheme(9, "row"), (32, 64), "9"),
        ("compressed_tensors", Scheme(4, "row", False, activations="int8"), (32, 64), "symmetric"),
        ("compressed_tensors", Scheme(4, "block"), (128, 128), "number: fp8"),
        ("compressed_tensors", Scheme(8, "block", number="fp8"), (192, 128), "multiples of 128"),
        ("compressed_tensors", Scheme(4, 32, number="nvfp4"), (32, 64), "group_size: 16"),
        ("compressed_tensors", Scheme(4, 32, False, number="mxfp4"), (32, 64), "symmetric"),
        ("compressed_tensors", Scheme(8, 32, number="mxfp8", activations="fp8"), (32, 64), "no activations"),
        ("compressed_tensors", NARROW[1], (32, 48), "groups of 32"),
        ("compressed_tensors", Scheme(8, "row", activations="fp8"), (32, 64), "number: fp8"),
        ("compressed_tensors", Scheme(8, "row", number="fp8", activations="int8"), (32, 64), "fp8"),
        ("compressed_tensors", Scheme(8, 32, number="fp8"), (32, 64), "group_size: row"),
        ("compressed_tensors", Scheme(4, 64, activations="fp8"), (128, 128), "group_size: 128"),
        ("compressed_tensors", Scheme(4, 128, False, activations="fp8"), (128, 128), "symmetric"),
        ("compressed_tensors", Scheme(8, 128, activations="fp8"), (128, 128), "bits: 4"),
        ("compressed_tensors", MIXED_TYPES, (96, 128), "multiples of 128"),
        ("compressed_tensors", MIXED_TYPES, (128, 192), "multiples of 128"),
        ("gptq", MIXED_TYPES, (128, 128), "weight-only"),
        ("awq", MIXED_TYPES, (128, 128), "weight-only"),
        ("gptq", Scheme(4, 48), (32, 64), "groups of 48"),
        ("gptq", Scheme(4, "row"), (40, 64), "40"),
        ("gptq", Scheme(4, "row"), (32, 40), "40"),
        ("gptq", Scheme(4, "row", symmetric=False), (32, 64), "zero point of 0"),
        ("gptq", Scheme(5, "row"), (32, 64), "not 5"),
        ("awq", Scheme(4, 48), (32, 64), "groups of 48"),
        ("awq", Scheme(4, "row"), (12, 64), "12"),
        ("awq", Scheme(4, "row"), (16, 60), "60"),
        ("awq", Scheme(8, "row"), (32, 64), "not 8"),
    ],
)
def test_unsupported_schemes_are_refused_with_a_reason(
    name: str, scheme: Scheme, shape: tuple[int, int], words: str
) -> None:
    rows, columns = shape
    assert words in (FORMATS[name].supports(scheme, columns, rows) or "")


def golden_cases() -> list[tuple[str, str]]:
    """Library and case of every golden tensor group."""
    cases = []
    for library in GOLDEN_FORMATS:
        with safe_open(GOLDEN / f"{library}.safetensors", "pt") as file:
            cases += [(library, case) for case in sorted({key.split("/")[0] for key in file.keys()})]  # noqa: SIM118
    return cases


@pytest.mark.parametrize(("library", "case"), golden_cases())
def test_tensors_equal_those_of_the_formats_own_library(library: str, case: str) -> None:
    with safe_open(GOLDEN / f"{library}.safetensors", "pt") as file:
        keys = [key for key in file.keys() if key.startswith(f"{case}/")]  # noqa: SIM118
        stored = {key.split("/")[1]: file.get_tensor(key) for key in keys}
    inputs = {name: stored.pop(f"in.{name}") for name in ("codes", "scale", "zero")}
    bits, size, symmetry, _ = case.split("-")
    group_size: GroupSize = "row" if size == "row" else int(size)
    scheme = Scheme(int(bits), group_size, symmetric=symmetry == "sym")
    linear = QuantizedLinear(scheme, inputs["codes"], inputs["scale"], inputs["zero"])
    module = FORMATS[GOLDEN_FORMATS[library]]
    packed = module.pack("x", linear)
    assert packed.keys() == {f"x.{name}" for name in stored}
    for name, tensor in stored.items():
        assert packed[f"x.{name}"].dtype == tensor.dtype, name
        assert torch.equal(packed[f"x.{name}"], tensor), name
    assert_equal(module.unpack("x", {f"x.{name}": tensor for name, tensor in stored.items()}, scheme), linear)


def test_golden_cases_cover_every_width() -> None:
    covered = {
        (GOLDEN_FORMATS[library], int(case.split("-")[0]), case.split("-")[2]) for library, case in golden_cases()
    }
    for name, schemes in CARRIED.items():
        packed = {s for s in schemes if s.number == "int" and not s.activations}
        assert {(name, s.bits, "sym" if s.symmetric else "asym") for s in packed} <= covered


def test_awq_stores_eight_for_symmetric_and_interleaves_nibbles() -> None:
    codes = torch.arange(8, dtype=torch.uint8).view(8, 1).expand(8, 8).contiguous()
    linear = QuantizedLinear(Scheme(4, "row"), codes, torch.ones(8, 1).half(), torch.full((8, 1), 8, dtype=torch.uint8))
    tensors = FORMATS["awq"].pack("x", linear)
    assert tensors["x.qweight"].tolist() == [[0x75316420]] * 8
    assert tensors["x.qzeros"].tolist() == [[0x88888888 - (1 << 32)]]


def test_gptq_stores_zero_points_minus_one() -> None:
    tensors = FORMATS["gptq"].pack("x", random_linear(Scheme(4, 32), 32, 64))
    assert tensors["x.qzeros"].tolist() == [[0x77777777] * 4] * 2
    assert tensors["x.g_idx"].tolist() == [0] * 32 + [1] * 32


def test_gptq_refuses_reordered_columns() -> None:
    scheme = Scheme(4, 32)
    tensors = FORMATS["gptq"].pack("x", random_linear(scheme, 32, 64))
    tensors["x.g_idx"] = tensors["x.g_idx"].flip(0)
    with pytest.raises(ArtifactError, match="g_idx"):
        FORMATS["gptq"].unpack("x", tensors, scheme)


def test_compressed_int8_and_float8_tensors_hold_the_values_themselves() -> None:
    module = FORMATS["compressed_tensors"]
    linear = random_linear(Scheme(8, "row", activations="int8"), 4, 10)
    weight = module.pack("x", linear)["x.weight"]
    assert weight.dtype == torch.int8
    assert torch.equal(weight.float() * linear.scale.float(), linear.dequantize())
    linear = random_linear(Scheme(8, "row", number="fp8", activations="fp8"), 4, 10)
    weight = module.pack("x", linear)["x.weight"]
    assert weight.dtype == torch.float8_e4m3fn
    assert torch.equal(weight.float() * linear.scale.float(), linear.dequantize())


def test_compressed_zero_points_are_packed_along_outputs() -> None:
    linear = random_linear(Scheme(3, 8, symmetric=False), 21, 24)
    packed = FORMATS["compressed_tensors"].pack("x", linear)["x.weight_zero_point"]
    assert packed.shape == (2, 3)
    assert packed.T.tolist() == naive_pack_bits(linear.zero.T.tolist(), 3)


MIXED = [
    ConfigGroup(Scheme(4, 128), (r"re:.*language_model.*\.(q_proj|qkv_proj)$",)),
    ConfigGroup(Scheme(3, "row", symmetric=False), (r"re:.*mlp\.down_proj$", r"re:.*mlp\.up_proj$")),
    ConfigGroup(Scheme(8, "row", activations="int8"), (r"re:.*vision_tower.*\.fc1$",)),
    ConfigGroup(Scheme(8, "row", number="fp8", activations="fp8"), (r"re:.*vision_tower.*\.fc2$",)),
    ConfigGroup(Scheme(8, "row", number="fp8"), ("multi_modal_projector.linear_1",)),
    ConfigGroup(Scheme(4, 128, activations="fp8"), (r"re:.*mlp\.gate_proj$",)),
]
UNQUANTIZED = ["language_model.lm_head", "multi_modal_projector.linear_2"]


def test_compressed_config_round_trips() -> None:
    module = FORMATS["compressed_tensors"]
    for count in range(len(MIXED) + 1):
        config = module.quantization_config(MIXED[:count], UNQUANTIZED)
        assert module.read_config(config) == MIXED[:count]
        assert config["ignore"] == UNQUANTIZED


def test_compressed_config_names_each_layout() -> None:
    module = FORMATS["compressed_tensors"]
    assert module.quantization_config(MIXED[:2], [])["format"] == "pack-quantized"
    packed = module.quantization_config(MIXED[:2], [])["config_groups"].values()
    assert all("format" not in group for group in packed), "vLLM reads the format of the whole file"
    config = module.quantization_config(MIXED, [])
    assert config["format"] == "mixed-precision"
    layouts = [group["format"] for group in config["config_groups"].values()]
    assert layouts == ["pack-quantized"] * 2 + ["int-quantized"] + ["float-quantized"] * 2 + ["pack-quantized"]
    assert module.quantization_config(MIXED[2:3], [])["format"] == "int-quantized"
    assert "actorder" not in str(config)


def test_a_scale_per_tensor_is_stored_as_equal_scales_per_row() -> None:
    module = FORMATS["compressed_tensors"]
    config = module.quantization_config([ConfigGroup(Scheme(4, "tensor"), ("re:x",))], [])
    assert config["config_groups"]["group_0"]["weights"]["strategy"] == "channel"
    assert module.read_config(config) == [ConfigGroup(Scheme(4, "row"), ("re:x",))]


def gptq_override(config: dict[str, Any], module: str) -> dict[str, Any] | None:
    """What a reader finds for a module: the first rule that matches wins; None is left in 16 bit."""
    for rule, changes in config["dynamic"].items():
        if re.match(rule[2:], module):
            return None if rule.startswith("-:") else {**config, **changes}
    return config


def test_gptq_config_gives_each_module_its_scheme() -> None:
    groups = [
        ConfigGroup(Scheme(4, 128), (r"re:language.*\.q_proj$", r"re:language.*\.o_proj$")),
        ConfigGroup(Scheme(8, "row"), (r"re:vision.*\.fc1$", "projector.linear_1")),
    ]
    config = FORMATS["gptq"].quantization_config(groups, UNQUANTIZED)
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (4, 128, True, False)
    assert config["checkpoint_format"] == "gptq"
    for module, bits, size in (
        ("language.3.q_proj", 4, 128),
        ("vision.1.fc1", 8, -1),
        ("projector.linear_1", 8, -1),
    ):
        override = gptq_override(config, module)
        assert override is not None
        assert (override["bits"], override["group_size"], override["sym"]) == (bits, size, True)
    assert all(gptq_override(config, module) is None for module in UNQUANTIZED)
    assert gptq_override(config, "projectorXlinear_1") is config  # a name is not a pattern
    patterns = [ConfigGroup(groups[1].scheme, (r"re:vision.*\.fc1$", r"re:projector\.linear_1$"))]
    assert FORMATS["gptq"].read_config(config) == groups[:1] + patterns


def test_gptq_config_without_rules_is_one_group() -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True, "desc_act": False}
    assert FORMATS["gptq"].read_config(config) == [ConfigGroup(Scheme(4, "row"), ("re:.*",))]


def test_awq_config() -> None:
    module = FORMATS["awq"]
    groups = [ConfigGroup(Scheme(4, 64), ("re:a",)), ConfigGroup(Scheme(4, 64, symmetric=False), ("re:b",))]
    config = module.quantization_config(groups, UNQUANTIZED)
    assert config == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": UNQUANTIZED,
    }
    assert module.read_config(config) == [ConfigGroup(Scheme(4, 64, symmetric=False), ("re:.*",))]
    row = module.quantization_config([ConfigGroup(Scheme(4, "tensor"), ("re:a",))], [])
    assert row["group_size"] == -1
    assert module.read_config(row)[0].scheme.group_size == "row"


def test_only_awq_needs_one_group_size_for_all() -> None:
    schemes = [Scheme(4, 64), Scheme(4, 128)]
    assert "W4 g128, W4 g64" in (FORMATS["awq"].conflict(schemes) or "")
    assert FORMATS["awq"].conflict([Scheme(4, 64), Scheme(4, 64, symmetric=False)]) is None
    assert FORMATS["gptq"].conflict(schemes) is None
    assert FORMATS["compressed_tensors"].conflict(schemes) is None
    with pytest.raises(ArtifactError, match="one group size"):
        FORMATS["awq"].quantization_config([ConfigGroup(s, ("re:x",)) for s in schemes], [])


def compressed_tensors_scheme(scheme: Scheme) -> Any:
    """The library's own reading of our config for one scheme; skips when the library is absent or too old."""
    library = pytest.importorskip("compressed_tensors")
    if tuple(int(part) for part in library.__version__.split(".")[:2]) < (0, 18):
        pytest.skip("compressed-tensors before 0.18 packs 3, 5, 6 and 7 bits in another shape than vLLM reads")
    from compressed_tensors.quantization import QuantizationConfig

    config = FORMATS["compressed_tensors"].quantization_config([ConfigGroup(scheme, ("Linear",))], [])
    return QuantizationConfig.model_validate(config).config_groups["group_0"]


def library_layout(scheme: Scheme) -> str:
    """The library's name for how a scheme is stored, written out."""
    eight = scheme.activations == "int8" and scheme.bits == 8
    integers = "int-quantized" if eight else "pack-quantized"
    floats = {"fp8": "float-quantized", "mxfp8": "mxfp8-quantized"}
    return floats.get(scheme.number, integers if scheme.number == "int" else f"{scheme.number}-pack-quantized")


@pytest.mark.parametrize("scheme", [*SCHEMES, *BLOCKS, MIXED_TYPES], ids=Scheme.label)
def test_compressed_tensors_decompresses_to_our_values(scheme: Scheme) -> None:
    library_scheme = compressed_tensors_scheme(scheme)
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry(library_layout(scheme))
    shape = (256, 128) if scheme.group_size == "block" else (20, 256 if scheme.mixed else 64)
    for dtype in (torch.float32, torch.bfloat16):
        linear = random_linear(scheme, *shape, dtype=dtype)
        tensors = FORMATS["compressed_tensors"].pack("x", linear)
        weight = compressor.decompress({key[2:]: t for key, t in tensors.items()}, library_scheme)["weight"]
        assert torch.equal(weight, linear.dequantize(weight.dtype))


@pytest.mark.parametrize("scheme", [*NARROW, *BLOCKS], ids=Scheme.label)
def test_float_grids_equal_the_librarys_own_compressor(scheme: Scheme) -> None:
    """Codes and stored scales, bit for bit, of the same weight and the same scales."""
    library_scheme = compressed_tensors_scheme(scheme)
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry(library_layout(scheme))
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(3)) * 0.02
    scale, zero = fit_scale(weight, scheme, torch.bfloat16, "mse")
    linear = QuantizedLinear(scheme, quantize(weight, scale, zero, scheme), scale, zero)
    module = FORMATS["compressed_tensors"]
    stored = {key[2:]: tensor for key, tensor in module.pack("x", linear).items()}
    given = {"weight": weight, "weight_scale": scale if scheme.powers_of_two else stored["weight_scale"].float()}
    if scheme.group_size == "block":
        given["weight_scale"] = stored["weight_scale"]
    if scheme.number == "nvfp4":
        given["weight_global_scale"] = stored["weight_global_scale"]
    expected = compressor.compress(given, library_scheme)
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == stored[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), stored[name].view(torch.uint8)), name
    packed, config = module.pack("x", linear), module.quantization_config([ConfigGroup(scheme, ("re:x",))], [])
    assert_equal(module.unpack("x", packed, scheme), linear)
    assert module.read_config(config) == [ConfigGroup(scheme, ("re:x",))]
    assert module.stored_bytes(scheme, 128, 256, 2) == sum(tensor.nbytes for tensor in packed.values())


def test_fused_linears_share_the_factor_of_their_scales() -> None:
    """vLLM uses the largest of the factors for all of them."""
    weight = torch.cat([torch.full((8, 32), 0.001), torch.full((8, 32), 0.9)])
    scale, zero = fit_scale(weight, NARROW[0], torch.bfloat16)
    whole = QuantizedLinear(NARROW[0], quantize(weight, scale, zero, NARROW[0]), scale, zero)
    parts = whole.split([8, 8])
    packed = [FORMATS["compressed_tensors"].pack("x", part)["x.weight_global_scale"] for part in parts]
    assert torch.equal(*packed)
    assert 224 < float((scale * packed[0]).max()) <= 448
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), whole.dequantize())


def test_float8_inputs_do_not_change_how_four_bits_are_stored() -> None:
    module = FORMATS["compressed_tensors"]
    assert module.supports(MIXED_TYPES, 256, 128) is None
    linear = random_linear(MIXED_TYPES, 128, 256)
    alone = QuantizedLinear(Scheme(4, 128), linear.codes, linear.scale, linear.zero)
    packed, expected = module.pack("x", linear), module.pack("x", alone)
    assert packed.keys() == expected.keys() == set(module.tensor_names("x", MIXED_TYPES))
    assert all(torch.equal(packed[name], expected[name]) for name in expected)
    assert_equal(module.unpack("x", packed, MIXED_TYPES), linear)


def test_only_compressed_tensors_stores_the_cache_dtype() -> None:
    module = FORMATS["compressed_tensors"]
    assert module.quantization_config(MIXED, UNQUANTIZED)["kv_cache_scheme"] is None
    written = module.quantization_config(MIXED, UNQUANTIZED, "fp8")
    assert (written["kv_cache_scheme"]["num_bits"], written["kv_cache_scheme"]["type"]) == (8, "float")
    assert not FORMATS["gptq"].KV_CACHES
    assert not FORMATS["awq"].KV_CACHES
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig

    assert QuantizationConfig.model_validate(written).kv_cache_scheme.num_bits == 8


def test_compressed_tensors_accepts_a_mixed_config() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig

    config = FORMATS["compressed_tensors"].quantization_config(MIXED, UNQUANTIZED)
    parsed = QuantizationConfig.model_validate(config)
    assert parsed.ignore == UNQUANTIZED
    assert [group.format for group in parsed.config_groups.values()] == [
        group["format"] for group in config["config_groups"].values()
    ]
    for group, expected in zip(parsed.config_groups.values(), MIXED, strict=True):
        assert (group.weights.num_bits, group.weights.symmetric) == (expected.scheme.bits, expected.scheme.symmetric)
        assert (group.input_activations is not None) == bool(expected.scheme.activations)


def test_a_gptq_config_without_packed_linears_names_a_supported_scheme() -> None:
    """Every linear is in a `-:` rule, and readers still ask for the base scheme."""
    config = FORMATS["gptq"].quantization_config([], UNQUANTIZED)
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 128, True)
    assert set(config["dynamic"]) == {
        f"-:{re.escape(name)}$" if not name.startswith("re:") else f"-:{name[3:]}" for name in UNQUANTIZED
    }
