"""Recipes: all shipped recipes load and plan, and an error lists every mistake."""

import re
from pathlib import Path

import pytest

from exporter.errors import RecipeError
from exporter.planning import recipe_file
from exporter.planning.overrides import adjusted
from exporter.planning.recipe import Calibration, Evaluation, Evidence, Gate, Model, Publish, Recipe, Rule
from exporter.planning.recipe_file import built_in, load_recipe, parse_recipe

ROOT = Path(__file__).parent.parent
WRONG = """
summary: wrong
model: {repo: org/name, family: lava}
quantize:
  - {component: language, method: gptq, bits: 9, group_size: 128}
  - {component: language, method: gtpq, bits: 4}
  - {component: language, metod: gptq, bits: 4}
gates: [{task: vqa, metric: acuracy, max_drop: 0.01}]
evidence: [{finding: a, figures: b, source: c}]
"""


def test_shipped_recipes_load_with_evidence_and_gates() -> None:
    names = built_in()
    assert {"llava-w4-vit8", "llava-w4-vit4", "llava-w4", "llava-w8", "llava-w3-vit4"} <= names.keys()
    for name, path in names.items():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.gates
        assert recipe.evidence
        assert recipe.summary
        assert recipe.model.repo
        assert f"mmq export --recipe {name}" in path.read_text()


MINIMAL = "quantize: [{component: vision, bits: 8}, {component: language, bits: 4}, {component: language, bits: 3}]"


def test_a_recipe_of_rules_alone_is_complete_with_a_model() -> None:
    recipe = parse_recipe(MINIMAL, "folder/mine.yaml")
    assert (recipe.name, recipe.gates, recipe.evidence) == ("mine", (), ())
    assert recipe.description() == "vision 8, language 3 to 4 bits"
    assert load_recipe("llava-w8").description() == load_recipe("llava-w8").summary
    assert adjusted(recipe, "demo-llava").model.repo == "demo-llava"
    with pytest.raises(RecipeError, match="recipe 'mine' names no model") as caught:
        adjusted(recipe)
    assert "--model llava-hf/llava-1.5-7b-hf" in str(caught.value.hint)


def test_the_page_about_recipes_lists_every_key() -> None:
    page = (ROOT / "docs" / "how-to" / "own-recipe.md").read_text()
    whole, rules = page.split("## Rules")
    missing = [key for key in Recipe.model_fields if f"| `{key}` |" not in whole]
    keys = [field.alias or key for key, field in Rule.model_fields.items()]
    missing += [key for key in keys if f"| `{key}` |" not in rules]
    sections = [Model, Calibration, Evaluation, Gate, Evidence, Publish]
    missing += [key for section in sections for key in section.model_fields if f"`{key}`" not in whole]
    assert missing == []


EVIDENCE = [(name, evidence) for name in built_in() for evidence in load_recipe(name).evidence]


@pytest.mark.parametrize(("name", "evidence"), EVIDENCE)
def test_evidence_has_a_source_that_holds_its_figures(name: str, evidence: Evidence) -> None:
    """A paper by its number, or a page of docs/measurements/ on which every decimal figure stands."""
    assert re.search(r"\d", evidence.figures)
    pages = re.findall(r"docs/[\w/-]+\.md", evidence.source)
    assert pages or re.search(r"arXiv \d{4}\.\d{5}", evidence.source)
    for page in pages:
        text = (ROOT / page).read_text()
        assert [figure for figure in re.findall(r"\d[\d,]*\.\d+", evidence.figures) if figure not in text] == []


def test_all_problems_are_listed_at_once_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(WRONG, "wrong.yaml")
    message = caught.value.message
    assert "wrong.yaml has 5 problems" in message
    assert "model.family: unknown family 'lava'. Did you mean 'llava'?" in message
    assert "quantize[0].bits: bits must be 2 to 8, or 16" in message
    assert "quantize[1].method: unknown method 'gtpq'. Did you mean 'gptq'?" in message
    assert "quantize[2].metod: unknown key. Did you mean 'method'?" in message
    assert "gates[0]: unknown metric of task vqa 'acuracy'. Did you mean 'accuracy'?" in message


def test_all_problems_of_options_are_listed_by_the_names_that_a_recipe_uses() -> None:
    options = "method: gptq, options: {descent: 11, block: 0, range: maxx, dampin: 1}"
    with pytest.raises(RecipeError) as caught:
        parse_recipe(built_in()["llava-w4-vit8"].read_text().replace("method: gptq", options), "wrong.yaml")
    message = caught.value.message
    assert "wrong.yaml has 4 problems" in message
    assert "quantize[2]: options.range: Input should be 'minmax', 'mse' or 'signed'" in message
    assert "quantize[2]: options.dampin: unknown option. Did you mean 'damping'? (damping, block" in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blocks": "8:4"}, "blocks must be"),
        ({"blocks": "first"}, "blocks must be"),
        ({"group_size": 100}, "multiple of 8"),
        ({"number": "fp8"}, "fp8 needs bits: 8"),
        ({"activations": "int8", "symmetric": False}, "int8 needs symmetric: true"),
        ({"number": "nvfp4", "group_size": 32}, "nvfp4 needs bits: 4, group_size: 16"),
        ({"group_size": "block"}, "block needs number: fp8"),
        ({"options": {"damp": 1}}, "options.damp"),
        ({"options": {"damping": "much"}}, "options.damping"),
        ({"group_size": "row", "else": "keep"}, "else needs a group_size that is a number, not row"),
        (
            {"bits": 8, "activations": "int8", "else": "row"},
            "else: row is possible only for integers without activations",
        ),
        ({"method": "rtn", "fold": "awq"}, "fold: awq is not possible with method: rtn; use gptq or autoround"),
        ({"method": "awq", "fold": "awq"}, "fold: awq is not possible with method: awq"),
        ({"fold": "awq", "options": {"correct": True}}, "fold needs correct: false"),
        ({"method": "autoround", "group_size": "tensor"}, "learned rounding needs number: int"),
        ({"method": "autoround", "bits": 8, "group_size": "row", "activations": "int8"}, "learned rounding needs"),
        (
            {"bits": 8, "group_size": "row", "activations": "int8", "options": {"range": "signed"}},
            "range: signed needs",
        ),
    ],
)
def test_impossible_rules_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        Rule(**{"component": "language", "method": "gptq", "bits": 4, "group_size": 128, **change})


def test_thirds_cover_every_block_once() -> None:
    for count in (1, 2, 3, 23, 32):
        thirds = [Rule(component="language", bits=4, blocks=third) for third in ("front", "middle", "end")]
        assert all(sum(rule.matches_block(i, count) for rule in thirds) == 1 for i in range(count))
    first = Rule(component="language", bits=4, blocks="0:8")
    assert [i for i in range(32) if first.matches_block(i, 32)] == list(range(8))


def test_recipes_are_those_in_the_package_or_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_file, "__file__", str(tmp_path / "exporter" / "planning" / "recipe_file.py"))
    assert recipe_file.recipe_folder() == tmp_path / "recipes"
    (tmp_path / "exporter" / "recipes").mkdir(parents=True)
    assert recipe_file.recipe_folder() == tmp_path / "exporter" / "recipes"


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'llava-w4-vit8'") as caught:
        load_recipe("llava-w4-vit9")
    assert "llava-w8" in (caught.value.hint or "")


def test_digest_ignores_comments_and_order(tmp_path: Path) -> None:
    text = built_in()["llava-w8"].read_text()
    changed = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    assert parse_recipe(changed, "llava-w8.yaml").digest() == load_recipe("llava-w8").digest()
    other = parse_recipe(changed.replace("bits: 8", "bits: 7", 1), "llava-w8.yaml")
    assert other.digest() != load_recipe("llava-w8").digest()


@pytest.mark.parametrize("text", ["- a\n- b", "quantize: [", "just text"])
def test_files_that_are_not_recipes_are_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_recipe(text, "bad.yaml")


def test_wrong_components_and_metrics_are_listed_beside_wrong_values() -> None:
    text = WRONG.replace("family: lava", "family: llava")
    text = text.replace("component: language, metod", "component: langauge, metod")
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "wrong.yaml")
    message = caught.value.message
    assert "quantize[2].component: unknown component of family llava 'langauge'. Did you mean 'language'?" in message
    assert message.count("acuracy") == 1
    assert "quantize[0].bits" in message


def test_no_shipped_recipe_names_a_family() -> None:
    assert [name for name in built_in() if load_recipe(name).model.family is not None] == []


def test_a_component_of_no_family_is_refused_when_the_recipe_is_read() -> None:
    text = built_in()["llava-w4-vit8"].read_text().replace("component: language", "component: langauge")
    with pytest.raises(RecipeError, match=r"component: unknown component 'langauge'\. Did you mean 'language'"):
        parse_recipe(text, "wrong.yaml")


def test_a_family_changes_the_digest_only_where_a_recipe_names_it() -> None:
    """Artifacts of an older mmq have recipes with a family, and manifests with its digest."""
    text = built_in()["llava-w4-vit8"].read_text()
    old = parse_recipe(text.replace("llava-1.5-7b-hf}", "llava-1.5-7b-hf, family: llava}"), "llava-w4-vit8.yaml")
    assert old.model.family == "llava"
    assert old.digest() == "803656b744b4b4757700b38afc63d29d7a12a63106e72b01d64d298217b5a4ea"
    assert load_recipe("llava-w4-vit8").digest() != old.digest()


@pytest.mark.parametrize("name", ["./none.yaml", "none.yaml", "/tmp"])
def test_a_missing_recipe_file_is_reported_as_missing(name: str) -> None:
    with pytest.raises(RecipeError, match=r"does not exist|is a folder"):
        load_recipe(name)
