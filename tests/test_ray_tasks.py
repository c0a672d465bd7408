"""Tasks and files on a Ray cluster, with a stand-in for Ray in this process."""

import fcntl
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from exporter.cluster.ray_cluster import RayCluster, ray_cluster
from exporter.cluster.shipment import (
    Shipment,
    machine_folder,
    model_files,
    received,
    received_adapter,
    remove_received,
    shipped,
    write_missing,
)
from exporter.errors import DataError, MmqError
from exporter.evaluation import cluster_answers
from exporter.evaluation.answers import Answerer, Backend
from exporter.evaluation.cluster_answers import ClusterBackend, RemoteModel
from exporter.tasks.sample import Pool, Sample
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
