"""Back ends of an evaluation on a Ray cluster: each machine gets both models and the samples from the object store.

A task answers one batch, with the same samples as a batch of an evaluation in one process, so the answers are the same.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from exporter.artifact.artifact import Artifact
from exporter.data.tasks.sample import Sample, task_of
from exporter.device import Device, choose
from exporter.errors import DataError
from exporter.evaluation.answers import Answerer, Backend, digest
from exporter.evaluation.backends import local_answerers
from exporter.evaluation.cluster.packed_samples import pack_samples, packed_groups
from exporter.evaluation.cluster.ray_cluster import RayCluster
from exporter.evaluation.cluster.shipment import (
    MODEL,
    SAMPLES,
    Shipment,
    folder_files,
    model_files,
    received,
    received_adapter,
    remove_received,
    shipped,
)
from exporter.files.mapping_diff import changes
from exporter.model.checkpoint import Checkpoint
from exporter.model.source import open_source
from exporter.planning.prompts import by_recipe
from exporter.planning.recipe import Recipe

ARTIFACT = "artifact"  # name below a machine's folder
GROUP = "samples"


@dataclass(frozen=True)
class RemoteModel:
    """Which model a worker opens, and how. identity: of its answers, as JSON-like data that the worker compares.

    second: the artifact instead of the source.
    """

    recipe: str
    device: str
    second: bool
    identity: Mapping[str, Any]


def cluster_answerers(
    cluster: RayCluster, checkpoint: Checkpoint, artifact: Path, recipe: Recipe, device: Device
) -> tuple[Answerer, Answerer]:
    """Answerers of source and artifact whose batches run on the machines of a cluster."""
    opened = Artifact.open(artifact)
    family, batch = by_recipe(opened.family, recipe), recipe.evaluation.batch
    files = model_files(checkpoint.folder, recipe.model.adapter) | folder_files(artifact, ARTIFACT)

    @contextmanager
    def backend(answerer: Answerer, second: bool) -> Iterator[Backend]:
        model = RemoteModel(recipe.model_dump_json(), device.kind, second, answerer.identity)
        yield ClusterBackend(cluster, files, model, batch)

    before, after = local_answerers(checkpoint, opened, device, batch, family=family)
    return (
        replace(before, opened=partial(backend, before, False)),
        replace(after, opened=partial(backend, after, True)),
    )


class ClusterBackend:
    """Answers of one model from the machines of a cluster. files: name on the workers -> file of this machine."""

    def __init__(self, cluster: RayCluster, files: Mapping[str, Path], model: RemoteModel, batch: int) -> None:
        self._cluster = cluster
        self._files = files
        self._model = model
        self._batch = batch

    def pieces(self, samples: Sequence[Sample]) -> Iterator[dict[int, str]]:
        """Yield number of a sample -> answer, batch by batch, in the order of completion."""
        with tempfile.TemporaryDirectory(prefix="mmq-ray-") as folder:
            packed = Path(folder) / SAMPLES
            pack_samples({GROUP: samples}, packed)
            content = shipped({**self._files, SAMPLES: packed}, self._cluster.put)
        job = digest([folder, dict(self._model.identity)])
        calls = [(Shipment(job, content), self._model, numbers) for numbers in self._batches(samples)]
        try:
            for _, answers in self._cluster.results(answer_batch, calls):
                yield answers
        finally:
            self._cluster.on_every_machine(remove_received, job)

    def _batches(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Numbers of samples per task of the cluster: of one batch, or all that search the same pool."""
        by_task: dict[str, list[int]] = {}
        for i, sample in enumerate(samples):
            by_task.setdefault(task_of(sample), []).append(i)
        size = {"retrieval": len(samples)}
        return [
            numbers[start : start + size.get(task, self._batch)]
            for task, numbers in sorted(by_task.items())
            for start in range(0, len(numbers), size.get(task, self._batch))
        ]


def answer_batch(shipment: Shipment, model: RemoteModel, numbers: Sequence[int]) -> dict[int, str]:
    """Answer one batch in a worker."""
    folder = received(shipment)
    samples = _samples(folder / SAMPLES)
    backend = _OPENED.backend(folder, model)
    pieces = backend.pieces([samples[i] for i in numbers])
    return {numbers[i]: answer for piece in pieces for i, answer in piece.items()}


@lru_cache(maxsize=1)
def _samples(path: Path) -> list[Sample]:
    return packed_groups(path)[GROUP]


class _OpenedModel:
    """The model that this worker has in memory."""

    def __init__(self) -> None:
        self._key: tuple[Path, bool] | None = None
        self._stack = ExitStack()
        self._backend: Backend | None = None

    def backend(self, folder: Path, model: RemoteModel) -> Backend:
        """The back end of a model; DataError when this machine would give other answers."""
        if self._key != (folder, model.second) or self._backend is None:
            self._stack.close()
            self._key = None
            answerer = _answerer(folder, model)
            if lines := changes(dict(model.identity), dict(answerer.identity)):
                raise DataError(
                    f"this worker differs from the process that started the evaluation: {'; '.join(lines)}",
                    "install the same packages and use the same kind of device on every machine",
                )
            self._backend = self._stack.enter_context(answerer.opened())
            self._key = (folder, model.second)
        return self._backend


_OPENED = _OpenedModel()


def _answerer(folder: Path, model: RemoteModel) -> Answerer:
    recipe = Recipe.model_validate_json(model.recipe)
    adapter = received_adapter(folder, recipe.model.adapter)
    checkpoint, _ = open_source(str(folder / MODEL), dtype=recipe.model.dtype, adapter=adapter)
    device = choose(model.device)
    opened = Artifact.open(folder / ARTIFACT, device.torch_device)
    family = by_recipe(opened.family, recipe)
    return local_answerers(checkpoint, opened, device, recipe.evaluation.batch, family=family)[model.second]
