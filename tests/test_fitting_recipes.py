"""Errors about a recipe name those that fit: the model's family, and the hardware that serves it."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from exporter.commands import next_steps
from exporter.commands.main import cli
from exporter.errors import RecipeError
from exporter.model.embedded import MODELS
from exporter.model.families import FAMILIES
from exporter.planning.fitting_recipes import closest, fitting_hint, recipes_for
from exporter.planning.overrides import adjusted
from exporter.planning.recipe_file import built_in, load_recipe
from exporter.study.prepare import base_recipe
from exporter.study.propose import comparable

WRONG = {"demo-llava": "blip2-caption-w4", "demo-blip2": "blip2-retrieval-w4", "demo-blip2-itm": "llava-w4-vit8"}


def mmq(*words: str) -> Result:
    return CliRunner().invoke(cli, list(words))


def pasted(text: str) -> list[str]:
    """Words after the program of the one command between backticks."""
    (command,) = re.findall(rf"`{re.escape(next_steps.program())} ([^`]*)`", text)
    return shlex.split(command)


def test_every_demo_model_has_a_recipe_of_another_family() -> None:
    assert WRONG.keys() == MODELS.keys()


@pytest.mark.parametrize("model", MODELS)
def test_a_recipe_for_another_family_leads_to_the_plan_of_one_that_fits(model: str) -> None:
    refused = mmq("plan", "--recipe", WRONG[model], "--model", model)
    assert refused.exit_code == 1
    assert all(name in refused.stderr for name in recipes_for(model))
    assert WRONG[model] not in refused.stderr.partition("Hint: ")[2]
    words = pasted(refused.stderr)
    assert words[:1] == ["plan"]
    assert mmq(*words).exit_code == 0


@pytest.mark.parametrize("model", MODELS)
def test_the_listed_recipes_are_those_whose_plan_is_not_refused_for_its_parts(model: str) -> None:
    for name in built_in():
        planned = mmq("plan", "--recipe", name, "--model", model)
        foreign = "has no component" in planned.stderr or "supports" in planned.stderr
        assert (name in recipes_for(model)) != foreign, (name, planned.stderr)


def test_a_recipe_that_names_another_family_leads_to_one_that_fits(tmp_path: Path) -> None:
    recipe = adjusted(load_recipe("llava-w8"), "demo-llava").adjusted(model={"family": "blip2"})
    visual = replace(FAMILIES["llava"], components=FAMILIES["llava"].components[:1], tasks=())
    assert "no built-in recipe fits" in fitting_hint(recipe, visual)
    path = tmp_path / "named.yaml"
    path.write_text(built_in()["llava-w8"].read_text().replace("model: {", "model: {family: blip2, "))
    refused = mmq("plan", "--recipe", str(path), "--model", "demo-llava")
    assert "is for family blip2" in refused.stderr
    assert mmq(*pasted(refused.stderr)).exit_code == 0


@pytest.mark.parametrize("command", ["plan", "export"])
@pytest.mark.parametrize("model", MODELS)
def test_a_missing_recipe_lists_those_that_fit_the_model(command: str, model: str) -> None:
    refused = mmq(command, "--model", model)
    assert refused.exit_code == 2
    listed = re.findall(r"Recipes for (\S+): ([\w, -]+);", refused.stderr)
    assert listed == [(model, ", ".join(recipes_for(model)))]
    assert WRONG[model] not in refused.stderr
    for unknown in ((), ("--model", "me/hub-model")):  # the hub is not asked
        assert all(name in mmq(command, *unknown).stderr for name in built_in())


def test_an_unknown_recipe_is_corrected_to_one_that_fits_the_model() -> None:
    refused = mmq("plan", "--recipe", "blip2-w4-vit4", "--model", "demo-llava")
    assert refused.exit_code == 1
    assert "Did you mean 'llava-w4-vit4'?" in refused.stderr
    assert ", ".join(recipes_for("demo-llava")) in refused.stderr
    assert "blip2-caption" not in refused.stderr
    nothing_close = mmq("plan", "--recipe", "blip2-retrieval", "--model", "demo-blip2")
    assert "Did you mean" not in nothing_close.stderr


def test_a_recipe_to_compare_with_is_one_that_fits() -> None:
    base = base_recipe("demo-blip2-itm", None, (), 8, 0)
    with pytest.raises(RecipeError) as caught:
        comparable("llava-w4-vit8", base, FAMILIES["blip2-itm"])
    assert str(caught.value.hint).endswith("blip2-retrieval-w3, blip2-retrieval-w4")
    with pytest.raises(RecipeError, match="Did you mean 'blip2-retrieval-w3'"):
        comparable("blip2-retrieval-3", base, FAMILIES["blip2-itm"])


@pytest.mark.parametrize("flags", ["avx2", "avx2 avx512f", "avx2 avx_vnni", "avx2 avx512f avx512_vnni"])
def test_a_plan_that_the_cpu_does_not_serve_leads_to_one_that_this_cpu_runs(
    flags: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.serving.cpu_instructions.processor_flags", lambda: frozenset(flags.split()))
    refused = mmq("plan", "--recipe", "llava-w4-vit8", "--model", "demo-llava", "--serve-on", "cpu")
    assert refused.exit_code == 1
    listed = re.findall(r"vLLM serves ([\w, -]+) on this CPU", refused.stderr)[0].split(", ")
    words = pasted(refused.stderr)
    assert words[:3] == ["export", "--recipe", closest("llava-w4-vit8", listed)]
    for name in built_in():
        planned = mmq("plan", "--recipe", name, "--model", "demo-llava", "--serve-on", "cpu", "--json")
        runs = planned.exit_code == 0 and "this machine's processor cannot serve it" not in planned.stdout
        assert (name in listed) == runs, name
