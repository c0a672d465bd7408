"""Parts of publishing on summaries that are made here: differences, notes, usage, headline and size of files."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exporter.device import Device
from exporter.errors import PublishError
from exporter.events import Event
from exporter.planning.recipe_file import load_recipe
from exporter.publishing import artifact_diff, card_usage, publication
from exporter.publishing.artifact_diff import Change, flattened
from exporter.publishing.publication import PublishRequest
from exporter.publishing.repository import disclosure_note
from exporter.publishing.upload import Target


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


class FakeHub:
    """Stand-ins for the steps of a publication; records those that need the hub."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, online: bool = True) -> None:
        self.calls: list[Any] = []
        self.recipe = SimpleNamespace(repo="org/recipe", private=True)
        summary = SimpleNamespace(recipe=SimpleNamespace(publish=self.recipe))
        for name, result in (
            ("prove", (summary, ("a problem",))),
            ("online", online),
            ("disclosure_note", "a local path"),
            ("with_source_license", "declared"),
            ("package", "packaged"),
        ):
            monkeypatch.setattr(publication, name, lambda *arguments, result=result: result)
        monkeypatch.setattr(publication, "reading", lambda folder, on_event: nullcontext())
        for name in ("require_token", "refuse_unproven"):
            monkeypatch.setattr(publication, name, lambda *arguments, name=name: self.calls.append(name))
        upload = SimpleNamespace(
            Target=Target,
            check_target=lambda target: self.calls.append(target),
            existing_repository=lambda target: self.calls.append("read") or "remote",
            publish=lambda packaged, target, remote, on_event: f"{packaged} on {remote}",
        )
        monkeypatch.setattr(publication, "upload", upload)

    def publish(self, **request: Any) -> tuple[Any, list[Any], list[Event]]:
        """The publication, the calls, and the events."""
        self.calls.clear()
        events: list[Event] = []
        result = publication.publish_artifact(
            PublishRequest(Path("out"), **request), Device("cpu", "a CPU", 2**30), events.append
        )
        return result.publication, list(self.calls), events


def test_only_a_publication_that_sends_something_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    hub, target = FakeHub(monkeypatch), Target("org/recipe", None, True, False, False)
    published, calls, events = hub.publish()
    assert published == "packaged on remote"
    assert calls == ["refuse_unproven", target, "require_token", "read"]
    assert [(event.stage, event.message) for event in events] == [("note", "a local path")]
    assert hub.publish(dry_run=True)[:2] == (None, ["refuse_unproven", target, "read"])
    assert hub.publish(force=True)[1] == [target, "require_token", "read"]
    offline = FakeHub(monkeypatch, online=False)
    assert offline.publish(dry_run=True)[:2] == (None, ["refuse_unproven", target])
    assert offline.publish()[1] == ["refuse_unproven", target, "require_token", "read"]


@pytest.mark.parametrize(
    ("public", "private_recipe", "private"),
    [(False, True, True), (True, True, False), (False, False, False), (True, False, False)],
)
def test_a_repository_is_private_unless_the_recipe_or_the_request_makes_it_public(
    public: bool, private_recipe: bool, private: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(monkeypatch)
    hub.recipe.private = private_recipe
    _, calls, _ = hub.publish(repo="me/mine", public=public, force=True, revision="v1", create_pr=True, replace=True)
    assert calls[0] == Target("me/mine", "v1", private, True, True)


def test_a_publication_needs_a_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch)
    hub.recipe.repo = None
    with pytest.raises(PublishError, match="no repository to publish to"):
        hub.publish()


@pytest.mark.parametrize("text", ["vqa", "vqa=org/data", "vqa=data:x", "vqa=a/b/c:x", "=org/data:x", "vqa=org/data:"])
def test_a_benchmark_that_is_not_understood_is_refused(text: str) -> None:
    assert publication.benchmark("vqa=org/data:x") == ("vqa", ("org/data", "x"))
    with pytest.raises(PublishError, match="not understood"):
        publication.benchmark(text)


@pytest.mark.parametrize(("token", "offline", "online"), [("t", False, True), (None, False, False), ("t", True, False)])
def test_a_dry_run_reads_from_the_hub_with_a_token(
    token: str | None, offline: bool, online: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: offline)
    assert publication.online() is online
