"""Values of a command that replace those of a recipe: the same artifact as from an edited copy, recorded everywhere."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from exporter import api
from exporter.artifact.manifest import read_manifest
from exporter.commands.main import cli
from exporter.device import choose
from exporter.errors import PlanError, RecipeError
from exporter.model.source import open_source
from exporter.numerics.quantized import Scheme
from exporter.planning.overrides import adjusted, with_prompts
from exporter.planning.plan import make_plan
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import load_recipe
from exporter.publishing.artifact_summary import read_place
from exporter.publishing.card import CardDeclarations, render
from exporter.publishing.report.content import collect


def edited(name: str, *changes: dict[str, Any]) -> Recipe:
    """A copy of a shipped recipe with changed rules, as a user would edit the file."""
    data = load_recipe(name).model_dump()
    data["quantize"] = [dict(rule) | change for rule, change in zip(data["quantize"], changes, strict=True)]
    return Recipe.model_validate(data)


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"bits": {"language": 3, "vision": 4}}, [{"bits": 4}, {}, {"bits": 3}]),
        ({"bits": {"vision": 16}}, [{"bits": 16}, {}, {}]),
        ({"group_size": 64}, [{}, {}, {"group_size": 64}]),  # the vision tower has a scale per row, and keeps it
        ({"group_size": {"vision": 32, "language": "row"}}, [{"group_size": 32}, {}, {"group_size": "row"}]),
        ({"bits": {"projector": 8}, "group_size": {"projector": 64}}, [{}, {"bits": 8, "group_size": 64}, {}]),
        ({"group_size": (64, "row")}, [{}, {}, {"group_size": 64, "else": "row"}]),
        ({"group_size": {"vision": (32, "keep")}}, [{"group_size": 32, "else": "keep"}, {}, {}]),
    ],
)
def test_overrides_equal_an_edited_copy(options: dict[str, Any], changes: list[dict[str, Any]]) -> None:
    changed, copy = adjusted(load_recipe("llava-w4-vit8"), **options), edited("llava-w4-vit8", *changes)
    assert changed.quantize == copy.quantize
    assert changed.digest() == copy.digest() != load_recipe("llava-w4-vit8").digest()
    assert copy.overrides == {}
    assert len(changed.overrides) == sum(len(value) if isinstance(value, dict) else 1 for value in options.values())


def test_a_group_size_leaves_rules_that_keep_their_linears() -> None:
    changed = adjusted(load_recipe("llava-w4-vit4"), bits={"vision": 16}, group_size=64)
    assert changed.digest() == edited("llava-w4-vit4", {"bits": 16}, {}, {"group_size": 64}).digest()


def test_bits_change_every_rule_of_a_component_and_the_description() -> None:
    changed = adjusted(load_recipe("blip2-vqa-w4-front8"), bits={"language": 3})
    assert {rule.bits for rule in changed.quantize if rule.component == "language"} == {3}
    assert changed.changes() == "bits language=3"
    assert "language 3 bits" in changed.description()
    changed_twice = adjusted(changed, bits={"language": 5}, group_size=32)
    assert changed_twice.changes() == "bits language=5, group_size=32"


@pytest.mark.parametrize(
    ("name", "options", "message", "hint"),
    [
        (
            "llava-w4-vit8",
            {"bits": {"vison": 8}},
            "no rule for component 'vison'. Did you mean 'vision'",
            "vision, proj",
        ),
        ("llava-w4", {"group_size": {"qformer": 64}}, "no rule for component 'qformer'", "it has rules for language"),
        ("llava-w4-vit8", {"bits": {"vision": 9}}, r"\(vision\), bits: 9: bits must be 2 to 8, or 16", ""),
        ("llava-w4-vit8", {"group_size": 100}, "group_size must be a multiple of 8", ""),
        ("llava-w8", {"group_size": 64}, "no rule of recipe 'llava-w8' has groups", "COMPONENT=64, with one of vision"),
        ("llava-w4a8-vitfp8-cache8", {"bits": {"language": 3}}, "activations: fp8 needs number: fp8, or bits: 4", ""),
    ],
)
def test_impossible_overrides_say_what_is_allowed(name: str, options: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        adjusted(load_recipe(name), **options)
    assert hint in (caught.value.hint or "")


def test_components_that_stay_in_16_bits_get_no_group_size() -> None:
    kept = adjusted(load_recipe("llava-w8"), bits={"vision": 16})
    with pytest.raises(RecipeError) as caught:
        adjusted(kept, group_size=64)
    assert (caught.value.hint or "").endswith("COMPONENT=64, with one of language")


def test_prompts_that_a_recipe_does_not_allow_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"recipe 'llava-w8' does not allow these values:\n  ") as caught:
        with_prompts(load_recipe("llava-w8"), {"vqa": "no question in it"}, {"vqa": 0})
    assert "max_new_tokens" in caught.value.message
    assert with_prompts(load_recipe("llava-w8"), {}, {}) == load_recipe("llava-w8")


def run(*arguments: str) -> Any:
    """The command line, in this process."""
    return CliRunner().invoke(cli, [*arguments, "--device", "cpu"])


def test_plan_shows_and_lists_overrides() -> None:
    line = ["plan", "--recipe", "llava-w4-vit8", "--model", "demo-llava", "--bits", "language=3", "--bits", "vision=4"]
    done = run(*line, "--group-size", "64", "--json")
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    assert content["overrides"] == {"bits language": "3", "bits vision": "4", "group_size": "64"}
    packed = {(part["component"], part["scheme"]) for part in content["components"] if part["decision"] == "packed"}
    assert packed == {("vision", "W4 row"), ("language", "W3 g64")}
    assert "changed in the recipe: bits language=3, bits vision=4" in " ".join(run(*line).output.split())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--bits", "3", "expected COMPONENT=BITS like language=3, not '3'"),
        ("--bits", "language=many", "not 'language=many'"),
        ("--group-size", "small", "expected a number, row, tensor, or a number with ,row or ,keep, not 'small'"),
        ("--group-size", "64,rows", "not '64,rows'"),
    ],
)
def test_malformed_options_are_wrong_usage(option: str, value: str, message: str) -> None:
    done = run("plan", "--recipe", "llava-w4-vit8", option, value)
    assert done.exit_code == 2
    assert message in done.output
    assert "given twice" in run("plan", "--recipe", "llava-w4-vit8", "--group-size", "64", "--group-size", "32").output
    both = run("plan", "--recipe", "llava-w4-vit8", "--group-size", "64", "--group-size", "language=32")
    assert "one size for the whole recipe, or COMPONENT=SIZE" in both.output


def test_an_export_makes_the_artifact_of_an_edited_copy_and_records_the_overrides(tmp_path: Path) -> None:
    options = {"model": "demo-llava", "device": "cpu", "samples": 4, "skip_evaluation": True}
    first = api.export("llava-w4-vit8", out=tmp_path / "a", bits={"vision": 4}, group_size=32, **options)
    copy = edited("llava-w4-vit8", {"bits": 4}, {}, {"group_size": 32})
    second = api.export(copy, out=tmp_path / "b", **options)
    weights = [{p.name: p.read_bytes() for p in result.out.glob("*.safetensors")} for result in (first, second)]
    assert weights[0] == weights[1]
    manifest = read_manifest(first.out)
    assert manifest.recipe.overrides == {"bits vision": "4", "group_size": "32"}
    assert read_manifest(second.out).recipe.overrides == {}
    assert {row.scheme for row in first.plan.rows if row.decision == "packed"} == {Scheme(4, "row"), Scheme(4, 32)}
    report = api.evaluate(first.out, eval_samples=4, device="cpu")
    assert report.evaluation.overrides == manifest.recipe.overrides
    summary = read_place(str(first.out))
    assert "(changed: bits vision=4, group_size=32)" in render("me/x", summary, CardDeclarations(), (), "")
    assert collect(summary, {})["recipe"]["overrides"] == "bits vision=4, group_size=32"


def test_a_row_removes_else_and_the_command_line_sets_it() -> None:
    first = adjusted(load_recipe("llava-w4-vit4"), group_size={"vision": (128, "row")})
    assert first.quantize[0].fallback == "row"
    assert adjusted(first, group_size=64).quantize[0].fallback == "row"
    assert adjusted(first, group_size={"vision": "row"}).quantize[0].fallback is None
    done = run("plan", "--recipe", "llava-w4-vit4", "--model", "demo-llava", "--group-size", "vision=96,row", "--json")
    assert json.loads(done.stdout)["overrides"] == {"group_size vision": "96,row"}
    assert "(else: row)" in " ".join(json.loads(done.stdout)["warnings"])


@pytest.mark.parametrize(
    ("header", "linear", "bits"),
    [
        ("HuggingFaceTB--SmolVLM2-2.2B-Instruct", "mlp.fc2", 4),  # 4304 inputs
        ("Qwen--Qwen2.5-VL-3B-Instruct", "mlp.down_proj", 8),  # 3420 inputs: 4 bits fill no whole 32-bit words
        ("Qwen--Qwen3-VL-8B-Instruct", "mlp.linear_fc2", 4),
    ],
)
def test_a_shipped_recipe_fits_towers_with_odd_inputs_by_the_option_that_the_error_names(
    header: str, linear: str, bits: int, sparse_checkpoint: Callable[[str], Path]
) -> None:
    checkpoint, family = open_source(str(sparse_checkpoint(header)))
    with pytest.raises(PlanError, match=r"--group-size vision=128,row") as caught:
        make_plan(load_recipe("llava-w4-vit4"), checkpoint, family, choose("cpu"))
    assert f"{linear} (" in caught.value.message
    plan = make_plan(adjusted(load_recipe("llava-w4-vit4"), group_size=(128, "row")), checkpoint, family, choose("cpu"))
    assert {row.linear for row in plan.of("vision") if row.scheme == Scheme(bits, "row")} == {linear}
    assert len(plan.fallbacks) == 1
