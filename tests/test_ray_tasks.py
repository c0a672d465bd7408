"""Tasks and files on a Ray cluster, with a stand-in for Ray in this process."""

import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from exporter.data.tasks.sample import Pool, Sample
from exporter.device import Device
from exporter.errors import DataError, MmqError
from exporter.evaluation import cluster_answers
from exporter.evaluation.answers import Answerer, Backend
from exporter.evaluation.cluster.ray_cluster import RayCluster, ray_cluster
from exporter.evaluation.cluster.shipment import (
    Shipment,
    machine_folder,
    model_files,
    received,
    received_adapter,
    remove_received,
    shipped,
    write_missing,
)
from exporter.evaluation.cluster_answers import ClusterBackend, RemoteModel
from exporter.model.families import FAMILIES
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import load_recipe
from exporter.study import ray_workers
from exporter.study.keys import Keys
from exporter.study.worker_tasks import Setup
from tests.fake_ray import FakeRay, FakeTaskError, ray

__all__ = ["ray"]


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The machine's folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_results_come_with_their_numbers_in_the_order_of_completion(ray: FakeRay) -> None:
    cluster = RayCluster(ray, 0.5)
    assert list(cluster.results(pow, [(2, 3), (2, 4), (2, 5)])) == [(2, 32), (1, 16), (0, 8)]
    assert ray.calls == [{"num_cpus": 1, "num_gpus": 0.5}] * 3
    assert ray.waits == [1, 1, 1]
    assert not ray.cancelled
    assert ray.get(cluster.put("value")) == "value"


def fail(error: Exception | None) -> None:
    """A task that raises an error."""
    if error:
        raise error


@pytest.mark.parametrize("error", [DataError("no such picture"), MemoryError("on a worker")])
def test_an_error_of_mmq_in_a_task_is_raised_as_it_is_and_open_tasks_are_cancelled(
    error: Exception, ray: FakeRay
) -> None:
    with pytest.raises(type(error), match=str(error)) as caught:
        list(RayCluster(ray, 0).results(fail, [(None,), (error,)]))
    assert caught.value is error
    assert ray.cancelled == [0]


@pytest.mark.parametrize(
    ("error", "text"), [(ValueError("the last line"), ": the last line"), (FakeTaskError(" "), ": FakeTaskError")]
)
def test_another_failure_of_a_task_is_named_with_what_to_do(error: Exception, text: str, ray: FakeRay) -> None:
    with pytest.raises(MmqError, match=f"a task failed on the Ray cluster{text}$") as caught:
        list(RayCluster(ray, 0).results(fail, [(error,)]))
    assert "this version of mmq" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("gpus", "resources", "slots"),
    [
        (0, {"CPU": 3.0}, 3),
        (0, {"CPU": 3.0, "GPU": 8.0}, 3),
        (0, {}, 1),
        (0.25, {"CPU": 2.0, "GPU": 2.0}, 8),
        (0.25, {"CPU": 8.0}, 1),
    ],
)
def test_slots_are_the_tasks_that_fit(gpus: float, resources: dict[str, float], slots: int, ray: FakeRay) -> None:
    ray.resources = resources
    assert RayCluster(ray, gpus).slots == slots


def test_every_machine_that_is_alive_runs_a_function_once(ray: FakeRay) -> None:
    ray.machines = [{"NodeID": name, "Alive": name != "b"} for name in "abc"]
    calls: list[str] = []
    RayCluster(ray, 1).on_every_machine(calls.append, "job")
    assert calls == ["job", "job"]
    assert ray.calls == [{"num_cpus": 0, "scheduling_strategy": (name, False)} for name in "ac"]
    assert ray.waits == [2]  # both have answered
    ray.machines = []
    RayCluster(ray, 1).on_every_machine(calls.append, "job")
    assert len(calls) == 2


def test_a_cluster_is_connected_and_left(ray: FakeRay) -> None:
    with ray_cluster("here:1", 2) as cluster:
        assert ray.address == "here:1"
        assert cluster.slots == 1
    assert not ray.is_initialized()
    ray.address, ray.resources = "of the caller", {"CPU": 3, "GPU": 8}
    with ray_cluster("here:1") as cluster:
        assert cluster.slots == 3  # tasks without a GPU
    assert ray.address == "of the caller"


def test_a_cluster_that_does_not_answer_is_named(ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    ray.unreachable = ConnectionError("refused")
    with pytest.raises(DataError, match="no Ray cluster at there:6379: refused") as caught, ray_cluster("there:6379"):
        pass
    assert "RAY_AUTH_TOKEN" in str(caught.value.hint)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DataError, match="needs the package ray") as caught, ray_cluster(None):
        pass
    assert "[ray]" in str(caught.value.hint)


def test_a_job_has_a_private_folder_on_a_machine(ray: FakeRay, temporary: Path) -> None:
    folder = machine_folder("j" * 64)
    assert folder == temporary / f"mmq-ray-{os.getuid()}-{'a' * 16}-{'j' * 16}"
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "file").touch()
    assert machine_folder("j" * 64) == folder  # the next worker
    remove_received("j" * 64)
    assert not folder.exists()


def test_a_folder_of_another_user_is_refused(ray: FakeRay, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = machine_folder("job")
    folder.rename(temporary / "elsewhere")
    folder.symlink_to(temporary / "elsewhere")
    with pytest.raises(MmqError, match="belongs to another user"):
        machine_folder("job")
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(MmqError, match=r"mmq-ray-4711-.* belongs to another user"):
        machine_folder("job")


def test_files_arrive_in_the_jobs_folder_while_no_other_worker_writes(ray: FakeRay, temporary: Path) -> None:
    (temporary / "file").write_bytes(b"content")
    shipment = Shipment("job", {}).with_files(shipped({"a/b/file": temporary / "file"}, ray.put))
    assert (received(shipment) / "a" / "b" / "file").read_bytes() == b"content"
    pieces = []

    def get(reference: int) -> Any:
        with (temporary / "locked" / ".lock").open("w") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        pieces.append(reference)
        return ray.get(reference)

    (temporary / "locked").mkdir()
    write_missing(shipment, temporary / "locked", get)
    write_missing(Shipment("job", {"more": (0,), **shipment.files}), temporary / "locked", get)
    assert pieces == [0, 0]  # `more` alone was missing


def test_a_full_disk_of_a_worker_is_an_error_of_mmq(ray: FakeRay, temporary: Path) -> None:
    (temporary / "a").write_text("no folder")
    with pytest.raises(MmqError, match=r"a/file"):
        write_missing(Shipment("job", {"a/file": (0,)}), temporary, ray.get)


def test_the_files_of_an_adapter_are_sent_too(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(temporary))
    for name in ("model/config.json", "model/picture.png", "lora/adapter_config.json", "lora/w.safetensors"):
        (temporary / name).parent.mkdir(exist_ok=True)
        (temporary / name).touch()
    (temporary / "model" / "folder.json").mkdir()
    assert set(model_files(temporary / "model", None)) == {"model/config.json"}
    assert model_files(temporary / "model", "~/lora") == {
        "model/config.json": temporary / "model" / "config.json",
        "adapter/w.safetensors": temporary / "lora" / "w.safetensors",
        "adapter/adapter_config.json": temporary / "lora" / "adapter_config.json",
    }
    assert received_adapter(temporary, "~/lora") == str(temporary / "adapter")
    assert received_adapter(temporary, None) is None


class Echoing:
    """A back end that answers with the question, and counts its batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def pieces(self, samples: Sequence[Sample]) -> Iterator[dict[int, str]]:
        self.batches.append(len(samples))
        yield from ({i: f"{sample.question}!"} for i, sample in enumerate(samples))


def test_an_evaluations_batches_are_tasks_and_a_pool_is_one(
    ray: FakeRay, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[bool] = []

    def answerer(folder: Path, model: RemoteModel) -> Answerer:
        assert (folder / "model" / "config.json").read_text() == "{}"

        @contextmanager
        def entered() -> Iterator[Backend]:
            opened.append(model.second)
            yield echoing

        return Answerer("source", {"weights": "w"}, str, entered)

    echoing = Echoing()
    monkeypatch.setattr(cluster_answers, "_answerer", answerer)
    monkeypatch.setattr(cluster_answers, "_OPENED", cluster_answers._OpenedModel())
    (temporary / "config.json").write_text("{}")
    files = {"model/config.json": temporary / "config.json"}
    plain = [Sample(f"s{i}", partial(Image.new, "RGB", (4, 4), (i, 0, 0)), f"q{i}", ("x",)) for i in range(5)]
    pool = Pool(tuple(plain[:3]), 2)
    ranked = [replace(sample, identity=f"r{i}", among=pool) for i, sample in enumerate(plain[:3])]
    backend = ClusterBackend(RayCluster(ray, 0), files, RemoteModel("", "cpu", True, {"weights": "w"}), 2)
    answers: dict[int, str] = {}
    for piece in backend.pieces([*plain, *ranked]):
        answers |= piece
    assert answers == {i: f"q{i}!" for i in range(5)} | {5 + i: f"q{i}!" for i in range(3)}
    assert sorted(echoing.batches) == [1, 2, 2, 3]
    assert opened == [True]  # once for all batches
    assert not list(temporary.glob("mmq-ray-*"))  # neither the packed samples nor the machine's folder
    other = ClusterBackend(RayCluster(ray, 0), files, RemoteModel("", "cpu", True, {"weights": "other"}), 2)
    with pytest.raises(DataError, match=r"this worker differs from the process that started the evaluation: .*weights"):
        list(other.pieces(plain))


def test_both_models_of_an_evaluation_run_on_the_cluster(
    ray: FakeRay, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("llava-w4")
    for name in ("model", "artifact"):
        (temporary / name).mkdir()
        (temporary / name / "config.json").touch()
    answerers = [Answerer(name, {"weights": name}, str, nullcontext) for name in ("source", "artifact")]  # type: ignore
    monkeypatch.setattr(cluster_answers, "local_answerers", lambda *arguments, family: answerers)
    monkeypatch.setattr(cluster_answers.Artifact, "open", lambda folder: SimpleNamespace(family=FAMILIES["llava"]))
    checkpoint: Any = SimpleNamespace(folder=temporary / "model")
    device = Device("cuda:0", "a card", 1)
    models = cluster_answers.cluster_answerers(RayCluster(ray, 0), checkpoint, temporary / "artifact", recipe, device)
    for second, (model, own) in enumerate(zip(models, answerers, strict=True)):
        assert (model.label, model.identity) == (own.label, own.identity)
        with model.opened() as backend:
            assert isinstance(backend, ClusterBackend)
            assert backend._model == RemoteModel(recipe.model_dump_json(), "cuda", bool(second), own.identity)
            assert set(backend._files) == {"model/config.json", "artifact/config.json"}
            assert backend._batch == recipe.evaluation.batch


class FakeStore:
    """A study's store of units."""

    def __init__(self, folder: Path) -> None:
        self.workdir = SimpleNamespace(path=folder / "units")


def quantized(setup: Setup, units: Sequence[Any], keys: Keys) -> int:
    """A stand-in for `make_units`."""
    (setup.folder / "units").mkdir(parents=True, exist_ok=True)
    for unit in units:
        (setup.folder / "units" / unit.file).write_text(f"made from {setup.packed}")
    return len(units)


def scored(setup: Setup, rules: Sequence[str], name: str, keys: Keys) -> list[str]:
    """A stand-in for `score_setting`: the files that the worker has, and its model."""
    assert setup.packed is not None
    assert setup.packed.read_text() == "calibration, vqa"
    assert not setup.places
    model = Recipe.model_validate_json(setup.recipe).model
    assert (Path(model.repo) / "config.json").read_text() == "{}"
    assert (model.revision, model.adapter) == (None, None)
    units = setup.folder / "units"
    return sorted(path.name for path in units.glob("*")) if units.is_dir() else []


@pytest.fixture
def study(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """A study of a model without tensors, whose settings are names of units."""
    (temporary / "model").mkdir()
    (temporary / "model" / "config.json").write_text("{}")
    base = load_recipe("llava-w4")
    checkpoint = SimpleNamespace(folder=temporary / "model")
    model = SimpleNamespace(checkpoint=checkpoint, recipe=base, plan=lambda rules: rules)
    stand_ins: dict[str, Any] = {
        "open_model": lambda setup, source: model,
        "study_training": lambda setup, model: [],
        "exam_samples": lambda setup: {"vqa": []},
        "pack_samples": lambda groups, path: path.write_text(", ".join(groups)),
        "units_of": lambda plan, model, calibration: [SimpleNamespace(file=name) for name in plan],
        "store_of": lambda setup: FakeStore(setup.folder),
        "make_units": quantized,
        "score_setting": scored,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(ray_workers, name, stand_in)
    return Setup(temporary / "study", base.model_dump_json(), places=("source",), samples=8)  # type: ignore[arg-type]


def test_a_study_ships_units_as_settings_need_them_and_keeps_new_ones(ray: FakeRay, study: Setup) -> None:
    keys = Keys("source", "machine", "calibration", "exam")
    with ray_workers.ray_pool("host:1") as pool:
        assert list(pool(abs, [(-3,)])) == [(0, 3)]  # without files
        units = [SimpleNamespace(file="a"), SimpleNamespace(file="b")]
        assert list(pool(quantized, [(study, units, keys)])) == [(0, 2)]
        made = study.folder / "units" / "a"
        assert made.read_text().startswith("made from ")
        assert made.read_text().endswith("samples.zip")
        put = len(ray.values)
        shutil.rmtree(next(made.parents[2].glob("mmq-ray-*")))  # another machine has nothing yet
        results = dict(pool(scored, [(study, ("a", "absent"), "name", keys), (study, (), "full", keys)]))
        assert results == {0: ["a"], 1: ["a"]}  # one machine, which has the unit of the first setting
        again = dict(pool(scored, [(study, ("b", "a"), "name", keys)]))
        assert again == {0: ["a", "b"]}
        files = [value for value in ray.values[put:] if not isinstance(value, list | tuple)]
        assert len(files) == 2  # each unit once; model and samples came before
        sequential = replace(study, sequential=True)
        assert dict(pool(scored, [(sequential, ("b",), "name", keys)])) == {0: ["a", "b"]}
    assert not list(study.folder.parent.glob("mmq-ray-*"))
    assert ray.address == ""
