"""Local back ends: source and artifact load one after the other within the free memory, with equal answers."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.artifact.artifact import Artifact
from exporter.data import samples
from exporter.data.tasks.sample import Sample
from exporter.device import choose
from exporter.dtypes import FLOAT32
from exporter.evaluation import backends
from exporter.evaluation.answers import Answerer, collect_answers
from exporter.evaluation.evaluate import picture_keys
from exporter.events import Event, ignore
from exporter.model.inference import predict
from exporter.model.source import open_source
from exporter.pipeline.export import export
from exporter.planning.placement import Placement
from exporter.planning.recipe_file import load_recipe
from exporter.planning.whole_model import ROOM_SHARE, whole_model

CPU = choose("cpu")
RECIPES = {"demo-llava": "llava-w8", "demo-blip2-itm": "blip2-retrieval-w4"}


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retrieval then scores fewer pairs."""
    monkeypatch.setattr("exporter.data.DEMO_CANDIDATES", 3)


@pytest.fixture(scope="module", params=RECIPES)
def out(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One artifact per kind of answer: texts and ranks."""
    folder = tmp_path_factory.mktemp("backends") / str(request.param)
    recipe = load_recipe(RECIPES[request.param]).adjusted(model={"repo": request.param}, calibration={"samples": 2})
    export(recipe, out=folder, device=CPU, on_event=ignore, skip_evaluation=True)
    return folder


def both(out: Path, batch: int = 8, on_event: Any = ignore) -> tuple[Answerer, Answerer]:
    """Answerers of an artifact and its source; the folder's name is the model's."""
    return backends.local_answerers(open_source(out.name)[0], Artifact.open(out), CPU, batch, on_event)


def samples_of(out: Path, count: int = 9) -> dict[str, list[Sample]]:
    """A few samples of every task of the model."""
    return {task: samples("demo", None, task, "test", count, 0) for task in Artifact.open(out).family.tasks}


def answers(models: tuple[Answerer, Answerer], samples: dict[str, list[Sample]]) -> list[Any]:
    """Answers of both models."""
    keys = picture_keys(samples)
    return [collect_answers(model, samples, keys, None, ignore) for model in models]


@pytest.mark.parametrize("loader", [pytest.param("load_whole", marks=pytest.mark.slow), "load_streamed"])
def test_a_model_is_gone_before_the_next_one_loads(out: Path, loader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    living: list[weakref.ref[Any]] = []
    load, free = getattr(backends, loader), backends.release
    released: list[int] = []

    def counted(*arguments: Any) -> Any:
        assert not any(model() for model in living), "the model before is still there"
        model = load(*arguments)
        living.append(weakref.ref(model))
        return model

    def release(device: Any) -> None:
        released.append(sum(model() is not None for model in living))
        free(device)

    held = Placement(FLOAT32, 4, loader == "load_streamed", 0)
    monkeypatch.setattr(backends, "placement_of", lambda *arguments: held)
    monkeypatch.setattr(backends, loader, counted)
    monkeypatch.setattr(backends, "release", release)
    gc.disable()  # it must not need the collector's good luck
    try:
        answers(both(out), samples_of(out, 3))
    finally:
        gc.enable()
    assert len(living) == 2
    assert released == [0, 0]  # caches are emptied once the model is gone


def test_answers_are_the_same_when_memory_runs_out(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answers(both(out), samples_of(out))
    notes: list[str] = []
    room = 3

    def scarce(run: Any, count: Any) -> Any:
        def limited(*arguments: Any, **options: Any) -> Any:
            if count(*arguments) > room:
                raise torch.OutOfMemoryError
            return run(*arguments, **options)

        return limited

    monkeypatch.setattr(predict, "encode", scarce(predict.encode, lambda p, f, some, r, side: len(some)))
    pixels = scarce(backends_pixels(), lambda processor, some: len(some))
    monkeypatch.setattr("exporter.model.inference.retrieval.pixels_of", pixels)
    actual = answers(both(out, on_event=lambda event: notes.append(event.message)), samples_of(out))
    assert actual == expected
    assert notes[0] == "out of memory with a batch of 8 samples: continuing with 4"
    assert notes[1] == "out of memory with a batch of 4 samples: continuing with 2"


def backends_pixels() -> Any:
    """The function that draws pictures for retrieval."""
    from exporter.model.inference.retrieval import pixels_of

    return pixels_of


def test_float32_that_does_not_fit_is_announced_and_recorded(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    source, family = open_source(out.name)
    held = backends.placement_of(source, family, CPU, 8)
    assert (held.dtype, held.note) == (FLOAT32, "")
    model = whole_model(source.tensors, family, source.config)
    room = (model.weight_bytes(itemsize=2) + model.sample_bytes(itemsize=2)) / ROOM_SHARE
    monkeypatch.setattr(backends, "free_bytes", lambda device: int(room) + 2)
    models = both(out, on_event=events.append)
    assert {model.identity["dtype"] for model in models} == {"bfloat16"}
    with models[0].opened():
        pass
    assert "in bfloat16" in events[0].message


def test_an_artifact_gets_the_same_prompts_as_its_source(out: Path) -> None:
    identities = [dict(model.identity) for model in both(out)]
    assert identities[0].pop("weights") != identities[1].pop("weights")
    assert identities[0] == identities[1]
    assert replace(both(out)[0], label="").identity == both(out, batch=3)[0].identity  # the batch decides nothing
