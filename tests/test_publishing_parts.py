"""Parts of publishing on summaries that are made here: differences, notes, usage, headline and size of files."""

from types import SimpleNamespace
from typing import Any

import pytest

from exporter.planning.recipe_file import load_recipe
from exporter.publishing import artifact_diff, card_usage
from exporter.publishing.artifact_diff import Change, flattened
from exporter.publishing.repository import disclosure_note


def measured(samples: int, data: str | None = "coco", seed: int | None = 0, **metrics: tuple[float, float]) -> Any:
    """A summary with metrics of a task: score of full precision, and of the artifact."""
    listed = {f"vqa {name}": scores for name, scores in metrics.items()}
    measures = [SimpleNamespace(task="vqa", metric=name, samples=samples) for name in metrics]
    report = SimpleNamespace(evaluation=SimpleNamespace(data=data, seed=seed), measures=measures, verdict="passed")
    return SimpleNamespace(metrics=lambda: listed, report=report)


def test_scores_of_the_same_samples_are_subtracted() -> None:
    first, second = measured(50, accuracy=(0.75, 0.5)), measured(50, accuracy=(0.75, 0.625))
    assert artifact_diff._metrics(first, second) == [Change("vqa accuracy", "0.5000", "0.6250", 0.125)]
    assert artifact_diff._metrics(first, first) == []
    other = measured(50, accuracy=(0.5, 0.5))
    assert artifact_diff._metrics(first, other) == [Change("vqa accuracy at full precision", "0.7500", "0.5000", -0.25)]


def test_scores_of_other_samples_are_not_compared() -> None:
    first, second = measured(50, accuracy=(0.75, 0.5)), measured(60, None, 3, accuracy=(0.75, 0.625))
    assert artifact_diff._metrics(first, second) == [
        Change(
            "vqa accuracy, not comparable: other samples",
            "0.5000 (50 samples; data coco, seed 0)",
            "0.6250 (60 samples; seed 3)",
        )
    ]
    absent = measured(50, anls=(0.5, 0.25))
    assert artifact_diff._metrics(first, absent) == [
        Change("vqa accuracy", "0.5000", "not measured"),
        Change("vqa anls", "not measured", "0.2500"),
    ]


def test_an_artifact_without_a_report_has_no_scores() -> None:
    unmeasured: Any = SimpleNamespace(report=None)
    assert artifact_diff.samples_of(unmeasured) == {}
    assert artifact_diff.verdict(unmeasured) == "never evaluated"
    assert artifact_diff.verdict(measured(1)) == "passed"


def test_differences_of_recipes_are_by_path_without_prose() -> None:
    recipe = load_recipe("llava-w4")
    other = recipe.model_copy(update={"name": "mine", "summary": "other", "evidence": None})
    assert artifact_diff._recipe(recipe, other) == [Change("recipe.name", "llava-w4", "mine")]
    assert flattened({"a": [{"b": 1}, 2], "c": {"d": None}}, "r") == {"r.a[0].b": "1", "r.a[1]": "2", "r.c.d": "None"}
    assert artifact_diff._versions({"torch": "1", "mmq": "2"}, {"torch": "1", "vllm": "3"}) == [
        Change("mmq version", "2", "absent"),
        Change("vllm version", "absent", "3"),
    ]


def test_components_are_compared_by_scheme_and_method() -> None:
    def summary(*parts: tuple[str, str, tuple[str, ...]]) -> Any:
        names = ("component", "scheme", "methods")
        return SimpleNamespace(parts=[SimpleNamespace(**dict(zip(names, part, strict=True))) for part in parts])

    first = summary(
        ("vision", "W8 row", ("rtn",)), ("language", "W4 g128", ("gptq", "awq")), ("language", "16 bits", ())
    )
    assert artifact_diff.scheme_text(first, "language") == "W4 g128 gptq/awq, 16 bits"
    assert artifact_diff._parts(first, first) == []
    assert artifact_diff._parts(first, summary(("head", "W8 row", ("rtn",)), ("vision", "W8 row", ("rtn",)))) == [
        Change("language", "W4 g128 gptq/awq, 16 bits", "16 bits"),
        Change("head", "16 bits", "W8 row rtn"),
    ]


@pytest.mark.parametrize(
    ("repo", "adapter", "paths"),
    [
        ("org/name", None, ""),
        ("demo-llava", "adapter", ""),
        ("./model", None, "./model"),
        ("/data/model", "~/lora", "/data/model and ~/lora"),
        ("models/a/b", None, "models/a/b"),
        ("org/name", "x/y/z", "x/y/z"),
    ],
)
def test_local_paths_in_a_published_recipe_are_disclosed(repo: str, adapter: str | None, paths: str) -> None:
    summary: Any = SimpleNamespace(recipe=SimpleNamespace(model=SimpleNamespace(repo=repo, adapter=adapter)))
    note = f"recipe.yaml is published unchanged and contains the local path {paths}"
    assert disclosure_note(summary) == (note if paths else "")


def test_data_sources_are_arguments_with_a_path_to_fill_in() -> None:
    assert [card_usage._source(name) for name in ("coco train2017", "folder images")] == ["coco:PATH", "PATH"]
