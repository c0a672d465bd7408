"""Float8: 4-bit weights as Hopper's kernel holds them, keys and values of the cache, and their configs."""

import bisect
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.artifact.artifact import Artifact
from exporter.artifact.artifact_config import artifact_config, in_dtype
from exporter.device import Device, choose
from exporter.errors import PlanError, ServeError
from exporter.model.checkpoint import Checkpoint
from exporter.model.families import FAMILIES
from exporter.numerics.activation_rounding import (
    ServedRounding,
    round_as_served,
    round_rows,
    to_float8,
    truncate_to_float8,
)
from exporter.numerics.quantized import QuantizedLinear, Scheme, float8_scales, quantize
from exporter.numerics.ranges import fit_scale
from exporter.pipeline.export import Export, export
from exporter.planning.plan import make_plan
from exporter.planning.recipe import Recipe, Rule
from exporter.planning.recipe_file import load_recipe
from exporter.planning.vllm_rules import (
    Linear,
    cache_problems,
    cpu_cache_problems,
    cpu_problems,
    head_size,
    kernel_problems,
)
from exporter.publishing.card import _width
from exporter.serving.launch import dtype
from exporter.serving.preflight import refuse_plan

Rounding = Callable[[torch.Tensor], torch.Tensor]
RECIPE = "llava-w4a8-vitfp8-cache8"
H100 = Device("cuda:0", "H100", 78 * 2**30)
MIXED = Scheme(4, 128, activations="fp8")
# Every value of float8 e4m3 from 0: subnormals in steps of 2^-9, then eight to each power of two, up to 448.
VALUES = sorted({m / 512 for m in range(8)} | {(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)} - {480.0})


def nearest(x: float) -> float:
    """The float8 e4m3 value nearest to x, ties to the even one, in plain Python."""
    size = min(abs(x), 448.0)
    i = bisect.bisect_left(VALUES, size)
    around = [j for j in (i - 1, i) if 0 <= j < len(VALUES)]
    best = min(around, key=lambda j: (abs(VALUES[j] - size), j % 2))
    return VALUES[best] if x >= 0 else -VALUES[best]


def below(x: float) -> float:
    """The float8 e4m3 value next to x towards zero."""
    size = VALUES[bisect.bisect_right(VALUES, min(abs(x), 448.0)) - 1]
    return size if x >= 0 else -size


def numbers(count: int = 2000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(count, generator=generator) * torch.logspace(-4, 3, count)
    halfway = torch.tensor([(a + b) / 2 for a, b in pairwise(VALUES)])
    return torch.cat([wide, torch.tensor(VALUES), -halfway, halfway])


def fitted(dtype: torch.dtype = torch.bfloat16, rows: int = 6, columns: int = 512) -> tuple[torch.Tensor, Any]:
    """A weight with groups of very different size, and its mixed linear."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.rand(rows, columns // 128, generator=generator).mul(6).exp2().repeat_interleave(128, 1)
    weight = torch.randn(rows, columns, generator=generator) * 0.004 * sizes
    scale, zero = fit_scale(weight, MIXED, dtype)
    return weight, QuantizedLinear(MIXED, quantize(weight, scale, zero, MIXED), scale, zero)


def test_both_roundings_are_those_of_a_table() -> None:
    x = numbers()
    assert len(VALUES) == 127
    assert to_float8(x).tolist() == [nearest(v) for v in x.tolist()]
    assert truncate_to_float8(x).tolist() == [below(v) for v in x.tolist()]
    assert truncate_to_float8(x.bfloat16()).dtype == torch.bfloat16


def test_mixed_weights_are_products_in_float8() -> None:
    _, linear = fitted()
    served = linear.as_served()
    for i, row in enumerate(linear.scale.float().tolist()):
        unit = max(torch.tensor(max(row)).div(448).item(), 1 / (512 * 448))
        eighths = [nearest(nearest(torch.tensor(scale).div(unit).item()) / 8) for scale in row]
        for j in range(0, linear.codes.shape[1], 7):
            product = nearest((int(linear.codes[i, j]) - 8) * eighths[j // 128])
            assert served[i, j].item() == pytest.approx(product * 8 * unit, rel=1e-6)


def test_other_schemes_are_served_as_they_are_dequantized() -> None:
    weight, _ = fitted()
    for scheme in (Scheme(4, 128), Scheme(8, "row", activations="int8")):
        scale, zero = fit_scale(weight, scheme, torch.float16)
        linear = QuantizedLinear(scheme, quantize(weight, scale, zero, scheme), scale, zero)
        assert torch.equal(linear.as_served(), linear.dequantize())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_scales_are_those_that_the_engine_will_make_of_them(stored: torch.dtype) -> None:
    weight, linear = fitted(stored)
    eighths, row = float8_scales(linear.scale)
    assert torch.allclose(8 * eighths * row, linear.scale.float(), rtol=2**-7, atol=0)
    free, zero = fit_scale(weight, Scheme(4, 128), stored)
    apart = (8 * float8_scales(free)[0] * float8_scales(free)[1] / free.float() - 1).abs().max()
    assert apart > 2**-6  # without looking ahead the engine's are others
    blind = QuantizedLinear(MIXED, quantize(weight, free, zero, MIXED), free, zero)
    assert (linear.as_served() - weight).norm() < (blind.as_served() - weight).norm()


def test_a_tensor_of_bfloat16_gives_the_engine_the_same_scales() -> None:
    _, linear = fitted(torch.float16)
    assert torch.equal(float8_scales(linear.scale)[0], float8_scales(linear.scale.bfloat16())[0])


def test_tiny_rows_have_the_smallest_scale_of_vllm() -> None:
    least = 1 / (512 * 448)
    x = torch.tensor([[1e-4, 3e-5, 0.0]])
    assert round_rows(x, "fp8")[0].tolist() == pytest.approx([nearest(v / least) * least for v in x[0].tolist()])
    assert float8_scales(torch.full((1, 2), 1e-4))[1].item() == pytest.approx(least)


def check_attention(cache: str, gpu: bool, query: Rounding, cached: Rounding) -> None:
    """Attention of a small Llama with the cache equals that with rounded queries, keys and values, written out."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

    family = FAMILIES["llava"]
    torch.manual_seed(0)
    model = family.skeleton(family.tiny_config()).float().eval()
    text = model.model.language_model
    attention, hidden = text.layers[0].self_attn, torch.randn(1, 9, text.config.hidden_size)
    turns = text.rotary_emb(hidden, torch.arange(9)[None])

    def attend() -> torch.Tensor:
        result: torch.Tensor = attention(hidden, position_embeddings=turns, attention_mask=None)[0]
        return result

    vision = model.config.vision_config._attn_implementation
    with torch.no_grad():
        before = attend()
        round_as_served(model, ServedRounding(kv_cache=cache), gpu)
        shape = (1, 9, -1, attention.head_dim)
        q, k, v = (
            part(hidden).view(shape).transpose(1, 2) for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *turns)
        q, k, v = query(q), *(repeat_kv(cached(t), attention.num_key_value_groups) for t in (k, v))
        scores = (q @ k.transpose(2, 3) * attention.scaling).masked_fill(~torch.ones(9, 9).tril().bool(), -torch.inf)
        expected = attention.o_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(1, 9, -1))
        assert torch.allclose(attend(), expected, atol=1e-6)
    assert not torch.allclose(before, expected, atol=1e-5)
    assert model.config.vision_config._attn_implementation == vision


@pytest.mark.parametrize("cuda", [True, False])
def test_attention_reads_rounded_keys_and_values_behind_the_rotation(cuda: bool) -> None:
    hold = to_float8 if cuda else truncate_to_float8
    check_attention("fp8", cuda, to_float8 if cuda else lambda q: q, hold)


def test_padding_is_still_masked_with_a_float8_cache() -> None:
    family = FAMILIES["llava"]
    torch.manual_seed(0)
    model = family.skeleton(family.tiny_config()).float().eval()
    round_as_served(model, ServedRounding(kv_cache="fp8"), gpu=True)
    words = torch.randint(3, 60, (1, 6))
    padded = torch.cat([torch.full((1, 3), 1), words], 1)
    mask = torch.cat([torch.zeros(1, 3), torch.ones(1, 6)], 1).long()
    with torch.no_grad():
        alone = model(input_ids=words, attention_mask=torch.ones_like(words)).logits[:, -1]
        beside = model(input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits[
            :, -1
        ]
    assert torch.allclose(alone, beside, atol=1e-4)


def test_recipes_list_the_possible_pairs_of_types() -> None:
    rule = {"component": "language", "method": "gptq", "bits": 4, "group_size": 128, "activations": "fp8"}
    assert Rule.model_validate(rule).scheme() == MIXED
    assert MIXED.label() == "W4 g128 A-FP8"
    for change in ({"group_size": 64}, {"symmetric": False}, {"bits": 3}):
        with pytest.raises(ValueError, match="number: fp8, or bits: 4, symmetric: true and group_size: 128"):
            Rule.model_validate(rule | change)
    with pytest.raises(ValueError, match="in_loop is not possible with bits: 4 and activations: fp8"):
        Rule.model_validate(rule | {"options": {"scales": "in_loop", "order": "none"}})


def test_a_cache_in_16_bits_leaves_a_recipes_digest_alone() -> None:
    recipe = load_recipe("llava-w4")
    gates = tuple(
        gate.model_copy(update={"decide": "point"}) for gate in recipe.gates
    )  # as all were when there was none
    model = recipe.model.model_copy(update={"family": "llava"})  # as all recipes named it
    recipe = recipe.model_copy(update={"gates": gates, "model": model})
    assert recipe.digest() != recipe.model_copy(update={"kv_cache": "fp8"}).digest()
    assert recipe.digest() == "8514ee5f98aa01be576530433cc8ad67146457959f4ed39ccb6278dede9fbd6c"


def test_the_plan_names_schemes_that_cannot_be_served(sparse_checkpoint: Callable[[str], Path]) -> None:
    family = FAMILIES["llava"]
    big = Checkpoint.open(sparse_checkpoint("llava-hf--llava-1.5-7b-hf"), family.canonical_name)
    plan = make_plan(load_recipe(RECIPE), big, family, H100)
    assert plan.warnings[-1].endswith("needs a Hopper GPU, compute capability 9.0 to be served")
    refuse_plan(make_plan(load_recipe("llava-fp8-vit16-cache8"), big, family, H100), {}, "cpu")
    opt = {"text_config": {"hidden_size": 2560, "num_attention_heads": 32}}
    with pytest.raises(ServeError, match="rule kv-cache: attention heads of 80"):
        refuse_plan(make_plan(load_recipe("llava-fp8-vit16-cache8"), big, family, H100), opt, "cpu")
    data = load_recipe("llava-w4").model_dump() | {"kv_cache": "fp8"}
    for change, message in (
        ({"format": "gptq"}, "rule kv-cache: kv_cache: fp8: format gptq has no field for the KV-cache dtype"),
        ({"quantize": [{"component": "language", "bits": 4, "store": "dequantized"}]}, "without packed linears"),
    ):
        with pytest.raises(PlanError, match=message):
            make_plan(Recipe.model_validate(data | change), big, family, H100)


def test_rules_of_float8_are_plain_data() -> None:
    assert cache_problems(None, "gptq", (), True) == []
    assert cache_problems("fp8", "compressed_tensors", ("fp8",), True) == []
    linear = Linear("language_model.model.layers.0.mlp.up_proj", "x", (256, 128), MIXED)
    assert kernel_problems([linear], "compressed_tensors") == []
    assert "needs a Hopper GPU" in cpu_problems([linear], "compressed_tensors")[0]
    opt = {"text_config": {"hidden_size": 2560, "num_attention_heads": 32}}
    assert "heads of 80" in cpu_cache_problems("fp8", head_size(opt))[0]
    assert "heads of 48" in cpu_cache_problems("fp8", head_size({"text_config": {"head_dim": 48}}))[0]
    assert cpu_cache_problems(None, head_size(opt)) == cpu_cache_problems("fp8", 128) == []
    assert cpu_cache_problems("fp8", head_size({"text_config": {}})) == []  # a default that the config leaves out


def test_a_config_asks_for_one_dtype_everywhere() -> None:
    named = {"architectures": ["X"], "torch_dtype": "float16", "text_config": {"dtype": "float16", "a": 1}}
    converted = in_dtype(named, "bfloat16")
    assert converted == named | {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "a": 1}}
    assert in_dtype({"architectures": ["X"]}, "bfloat16")["dtype"] == "bfloat16"
    assert dtype(converted, cpu=False) == "bfloat16"


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("llava-fp8-vit16-cache8", "bfloat16"),
        (RECIPE, "bfloat16"),
        ("llava-w4-vit8", "float16"),
        ("llava-w8", "float16"),
    ],
)
def test_kernels_that_write_bfloat16_alone_are_asked_for_it(
    name: str, asked: str, sparse_checkpoint: Callable[[str], Path]
) -> None:
    """LLaVA-1.5-7B is float16: FlashAttention 3 refuses that beside a float8 cache, and vLLM does not start."""
    family = FAMILIES["llava"]
    big = Checkpoint.open(sparse_checkpoint("llava-hf--llava-1.5-7b-hf"), family.canonical_name)
    config = artifact_config(make_plan(load_recipe(name), big, family, H100), big.config)
    assert dtype(big.config, cpu=False) == "float16"
    assert dtype(config, cpu=False) == asked
    assert config.keys() - big.config.keys() == {"quantization_config"}


def test_tags_tell_inputs() -> None:
    labels = ["W4 g128", "W8 row A8", "W4 g128 A-FP8", "FP8 row A-FP8", "FP8 row"]
    assert [_width(label) for label in labels] == ["w4a16", "w8a8", "w4a8", "fp8", "fp8"]


def test_transformers_finds_the_scales_of_the_cache(tmp_path: Path) -> None:
    """Without them it computes with whatever memory held."""
    pytest.importorskip("compressed_tensors")
    from transformers import LlavaForConditionalGeneration

    recipe = load_recipe("llava-w4").adjusted(model={"repo": "demo-llava"}, calibration={"samples": 8})
    recipe = recipe.model_copy(update={"kv_cache": "fp8"})
    export(recipe, out=tmp_path / "a", device=choose("cpu"), on_event=lambda event: None, skip_evaluation=True)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "a")
    scales = {name: p.tolist() for name, p in model.named_parameters() if name.endswith(("k_scale", "v_scale"))}
    assert len(scales) == 4
    assert set(map(tuple, scales.values())) == {(1.0,)}


def test_transformers_loads_4_bit_weights_whose_inputs_are_rounded(tmp_path: Path) -> None:
    """With every layout `pack-quantized`: each group must say so."""
    pytest.importorskip("compressed_tensors")
    data = load_recipe("llava-w4").adjusted(model={"repo": "demo-llava"}, calibration={"samples": 8}).model_dump()
    data["quantize"] = [rule | {"activations": "fp8"} for rule in data["quantize"] if rule["component"] == "language"]
    recipe, place = Recipe.model_validate(data), tmp_path / "a"
    done = export(recipe, out=place, device=choose("cpu"), on_event=lambda event: None, skip_evaluation=True)
    assert done.verified.block_difference == 0.0


def throughput(out: Path, measured: bool) -> Export:
    """The demo model by the recipe for throughput."""
    recipe = load_recipe(RECIPE)
    recipe = recipe.adjusted(model={"repo": "demo-llava"}, evaluation={"samples": 160}, calibration={"samples": 16})
    return export(recipe, out=out, device=choose("cpu"), on_event=lambda event: None, skip_evaluation=not measured)


@pytest.mark.slow  # gates of other recipes: `make demo`, test_cli.py
def test_the_recipe_for_throughput_passes_its_gates_on_the_demo(tmp_path: Path) -> None:
    report = throughput(tmp_path / "a", measured=True).report
    assert report is not None
    assert report.passed


def test_an_artifact_of_the_recipe_for_throughput_names_its_cache_and_its_inputs(tmp_path: Path) -> None:
    throughput(tmp_path / "a", measured=False)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    described = config["quantization_config"]
    assert described["kv_cache_scheme"]["type"] == "float"
    assert dtype(config, cpu=False) == "bfloat16"
    (group,) = [g for g in described["config_groups"].values() if g["weights"]["num_bits"] == 4]
    assert (group["format"], group["input_activations"]["type"]) == ("pack-quantized", "float")
    artifact = Artifact.open(tmp_path / "a")
    scales = [name for name in artifact.checkpoint.tensors if name.endswith((".k_scale", ".v_scale"))]
    assert len(scales) == 4  # two blocks of the language model, none of the tower's
    assert all(name.startswith("language_model.model.layers.") for name in scales)
    assert all(artifact.checkpoint.read(name).tolist() == [1.0] for name in scales)
    assert not set(scales) & set(artifact.names())
    rounded = artifact.rounded()
    assert rounded.kv_cache == "fp8"
    assert set(rounded.linears.values()) == {"fp8"}
    assert len(rounded.linears) == 26
    module = next(name for name in artifact.manifest.linears if artifact.scheme_of(name) == MIXED)
    assert torch.equal(artifact.read(f"{module}.weight"), artifact.linear(module).as_served())
    assert not torch.equal(artifact.read(f"{module}.weight"), artifact.linear(module).dequantize())
