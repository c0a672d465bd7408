"""`else` of a rule: what happens to linears whose inputs groups do not divide, from the plan to the artifact."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.artifact.artifact import Artifact
from exporter.artifact.artifact_config import artifact_config
from exporter.device import Device, choose
from exporter.errors import PlanError, RecipeError
from exporter.formats import FORMATS
from exporter.methods import METHODS
from exporter.model.families import FAMILIES
from exporter.model.source import open_source
from exporter.numerics.quantized import Scheme
from exporter.pipeline.export import export
from exporter.planning.overrides import adjusted
from exporter.planning.plan import Plan, make_plan
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import load_recipe, parse_recipe
from exporter.planning.refusals import fallback_lines
from exporter.planning.rule import Rule
from exporter.publishing.artifact_summary import folder_reader, read_summary
from exporter.publishing.proof.plan import plan_problems
from exporter.study.worker_tasks import Setup, open_model
from tests.headers.read import write_sparse_shard
from tests.llava_variants import llava_config

CPU = Device("cpu", "CPU", 64 * 2**30)
# demo-llava's language linears have 128 inputs, and down_proj 384: groups of 96 divide only those of down_proj.
RULE = {"component": "language", "bits": 4, "group_size": 96}
LINE = (
    "language: self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, self_attn.o_proj, mlp.gate_proj, mlp.up_proj "
    "(12 linears): groups of 96 do not divide 128 inputs: "
)


def recipe(*rules: dict[str, Any], **more: Any) -> Recipe:
    """A recipe for the demo model."""
    return Recipe.model_validate({"name": "x", "model": {"repo": "demo-llava"}, "quantize": list(rules), **more})


def plan_of(*rules: dict[str, Any], **more: Any) -> Plan:
    """Its plan."""
    return make_plan(recipe(*rules, **more), *open_source("demo-llava"), CPU)


def test_linears_that_groups_do_not_divide_get_a_scale_per_row_and_are_listed() -> None:
    plan = plan_of(RULE | {"else": "row"})
    schemes = {row.linear: row.scheme for row in plan.of("language") if row.decision == "packed"}
    assert schemes.pop("mlp.down_proj") == Scheme(4, 96)
    assert set(schemes.values()) == {Scheme(4, "row")}
    assert plan.fallbacks == (LINE + "one scale per row (else: row)",)
    assert plan.fallbacks[0] in plan.warnings
    assert all(row.rule.fallback is None for row in plan.rows if row.rule)  # a study's unit is the same without `else`
    groups = artifact_config(plan, {})["quantization_config"]["config_groups"]
    assert {(g["weights"]["strategy"], g["weights"]["group_size"]) for g in groups.values()} == {
        ("group", 96),
        ("channel", None),
    }


def test_keep_leaves_them_in_16_bits_with_the_reason() -> None:
    plan = plan_of(RULE | {"else": "keep"})
    kept_linears = {row.linear for row in plan.of("language") if row.decision == "kept" and row.linear}
    assert kept_linears == {f"self_attn.{x}_proj" for x in "qkvo"} | {"mlp.gate_proj", "mlp.up_proj"}
    reasons = {row.reason for row in plan.of("language") if row.linear in kept_linears}
    assert reasons == {"groups of 96 do not divide its 128 inputs (else: keep)"}
    assert plan.fallbacks == (LINE + "16 bits (else: keep)",)


@pytest.mark.parametrize(("columns", "bits", "stored"), [(3420, 4, 8), (4304, 4, 4), (4304, 3, 8), (3420, 8, 8)])
def test_rows_whose_codes_fill_no_whole_words_have_8_bits(columns: int, bits: int, stored: int) -> None:
    rule = Rule.model_validate(RULE | {"bits": bits, "group_size": 128, "symmetric": False, "else": "row"})
    fitted = rule.fitted(columns)
    assert (fitted.bits, fitted.group_size, fitted.symmetric) == (stored, "row", stored != bits)
    wide = fallback_lines(parse_recipe(f"quantize: [{json.dumps(rule.model_dump())}]", "mine"), [(0, "down", columns)])
    assert wide[0].endswith(f"one scale per row{' of 8 bits' if stored != bits else ''} (else: row)")


def test_groups_that_divide_everything_leave_no_trace() -> None:
    plan, plain = plan_of(RULE | {"group_size": 64, "else": "row"}), plan_of(RULE | {"group_size": 64})
    assert plan.rows == plain.rows
    assert plan.fallbacks == ()


def test_the_error_lists_all_linears_in_groups_and_offers_what_divides() -> None:
    with pytest.raises(PlanError) as caught:
        plan_of({"component": "vision", "bits": 4, "group_size": 96}, RULE)
    message = caught.value.message
    attention = "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, self_attn.out_proj, mlp.fc1"
    lines = [line.strip() for line in message.splitlines()[1:]]
    reason = "format compressed_tensors: groups of 96 do not divide"
    assert f"quantize[0] (vision): {attention} (10 linears): {reason} 128 inputs" in lines
    assert f"quantize[0] (vision): mlp.fc2 (2 linears): {reason} 512 inputs" in lines
    offer = (
        "groups of 128 or 64 or 32 divide the inputs of all its linears (--group-size vision=128); or add `else: row`"
    )
    assert any(line.startswith(f"quantize[0] (vision): {offer}") for line in lines)
    assert sum("quantize[1] (language)" in line for line in lines) == 2
    assert len(lines) == 5
    assert lines == sorted(lines, key=lambda line: line[:11])  # by rule


def test_formats_refuse_what_they_cannot_express() -> None:
    asymmetric = RULE | {"symmetric": False, "else": "row"}
    with pytest.raises(
        PlanError, match="format awq: it has one group size for the whole model, not W4 g96 asym, W4 row"
    ):
        plan_of(asymmetric, format="awq")
    assert "multiples of 32, not 4304" in str(FORMATS["gptq"].supports(Scheme(4, "row"), 4304, 1152))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": "row"}, "else needs a group_size that is a number, not row"),
        ({"else": "column"}, "'row' or 'keep'"),
        ({"group_size": 128, "activations": "fp8", "else": "row"}, "use else: keep"),
    ],
)
def test_impossible_values_of_else(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule.model_validate(RULE | {"else": "row"} | change)


def test_else_is_a_key_of_recipes_and_absent_from_the_digest_of_others() -> None:
    text = "quantize: [{component: language, bits: 4, group_size: 96, els: row}]"
    with pytest.raises(RecipeError, match=r"quantize\[0\].els: unknown key. Did you mean 'else'"):
        parse_recipe(text, "mine.yaml")
    parsed = parse_recipe(text.replace("els:", "else:"), "mine.yaml")
    assert parsed.quantize[0].fallback == "row"
    dumped = parsed.quantize[0].model_dump(mode="json")
    assert dumped["else"] == "row"
    assert Rule.model_validate(dumped) == parsed.quantize[0]
    assert "else" not in load_recipe("llava-w4-vit8").quantize[0].model_dump()


@pytest.mark.parametrize(("fallback", "packed"), [("row", 14), ("keep", 2)])
def test_the_artifact_holds_what_the_plan_says(fallback: str, packed: int, tmp_path: Path) -> None:
    """Verified on export against compressed-tensors; its integers are those of the method with each linear's scheme."""
    with_fallback = recipe(RULE | {"else": fallback})
    result = export(
        with_fallback, out=tmp_path / "out", device=choose("cpu"), on_event=lambda _: None, skip_evaluation=True
    )
    assert result.verified.linears == packed
    artifact = Artifact.open(result.out)
    assert any(f"(else: {fallback})" in note for note in artifact.manifest.notes)
    source, _ = open_source("demo-llava")
    rtn = METHODS["rtn"]
    for module in artifact.manifest.linears:
        scheme = Scheme(4, 96 if module.endswith("down_proj") else "row")
        weight = source.read(f"{module}.weight").float()
        expected, _ = rtn.quantize_linear(weight, None, scheme, rtn.Options(), torch.bfloat16)
        linear = artifact.linear(module)
        assert linear.scheme == scheme
        assert torch.equal(linear.codes, expected.codes)
    assert plan_problems(read_summary("out", folder_reader(result.out)), artifact) == []


def test_studies_use_rows_and_allocated_recipes_say_so(tmp_path: Path) -> None:
    model = open_model(Setup(tmp_path, recipe(RULE).model_dump_json(), device="cpu"))
    rules = [Rule.model_validate(RULE)]
    assert {row.scheme for row in model.plan(rules).of("language") if row.rule} == {Scheme(4, 96), Scheme(4, "row")}
    assert [rule.fallback for rule in model.fitted(rules)] == ["row"]
    assert model.fitted([Rule.model_validate(RULE | {"group_size": 64})])[0].fallback is None


def test_siglips_4304_inputs(tmp_path: Path) -> None:
    """A LLaVA with the tower SigLIP-so400m: no usual group divides its feed-forward."""
    tower = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "image_size": 28}
    config = llava_config(vision=tower | {"num_hidden_layers": 2, "num_attention_heads": 16, "patch_size": 14})
    shapes = FAMILIES["llava"].shapes(FAMILIES["llava"].read(config)[0])
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_sparse_shard(tmp_path / "model.safetensors", {name: ("BF16", shape) for name, shape in shapes.items()})
    checkpoint, family = open_source(str(tmp_path))
    data = load_recipe("llava-w4-vit4").model_dump()
    data["quantize"] = [dict(data["quantize"][0])]
    as_built = make_plan(
        Recipe.model_validate(data), checkpoint, family, CPU
    )  # vLLM keeps this feed-forward in 16 bits
    assert {row.linear for row in as_built.of("vision") if row.linear and row.decision == "kept"} == {
        "mlp.fc1",
        "mlp.fc2",
    }
    packable = replace(family, components=tuple(replace(c, plain=lambda *_: None) for c in family.components))
    with pytest.raises(
        PlanError, match=r"no group size of 128, 64 or 32 divides all of 1152, 4304 inputs; add `else: row`"
    ):
        make_plan(Recipe.model_validate(data), checkpoint, packable, CPU)
    data["quantize"][0]["else"] = "row"
    plan = make_plan(Recipe.model_validate(data), checkpoint, packable, CPU)
    rows = {row.linear: row.scheme for row in plan.of("vision") if row.decision == "packed"}
    assert {linear for linear, scheme in rows.items() if scheme == Scheme(4, "row")} == {"mlp.fc2"}
    assert len(plan.fallbacks) == 1
    assert make_plan(Recipe.model_validate(data), checkpoint, family, CPU).fallbacks == ()
    assert adjusted(Recipe.model_validate(data), group_size=64).quantize[0].fallback == "row"
