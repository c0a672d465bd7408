"""The worker pool of a study on a Ray cluster. Workers share nothing with this machine but the object store.

Model, adapter and samples are shipped once per machine, quantized units as the settings need them. New units come back
with the results and are stored in the study's folder, so that the study resumes here.
"""

import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from exporter.evaluation.answers import digest
from exporter.evaluation.cluster.packed_samples import pack_samples
from exporter.evaluation.cluster.ray_cluster import Call, Function, RayCluster, ray_cluster
from exporter.evaluation.cluster.shipment import (
    MODEL,
    SAMPLES,
    Shipment,
    model_files,
    received,
    received_adapter,
    remove_received,
    shipped,
)
from exporter.files.writing import atomic, make_folder
from exporter.planning.recipe import Recipe
from exporter.study.keys import Keys
from exporter.study.units import StudyUnit, units_of
from exporter.study.worker_pool import WorkerPool
from exporter.study.worker_tasks import (
    CALIBRATION,
    Setup,
    exam_samples,
    make_units,
    open_model,
    score_setting,
    store_of,
    study_training,
)

STUDY = "study"  # name below a machine's folder
UNITS = f"{STUDY}/units"


@contextmanager
def ray_pool(address: str | None, gpus: float = 0) -> Iterator[WorkerPool]:
    """A pool on a Ray cluster; errors as `ray_cluster`. Workers' files are removed at the end."""
    with ray_cluster(address, gpus) as cluster:
        jobs = _Jobs(cluster)
        try:
            yield jobs.run
        finally:
            jobs.close()


class _Jobs:
    """The studies of one pool, with their files in the object store."""

    def __init__(self, cluster: RayCluster) -> None:
        self._cluster = cluster
        self._name = secrets.token_hex(8)
        self._shipments: dict[tuple[Setup, Keys], Shipment] = {}
        self._units: dict[Path, tuple[Any, ...]] = {}

    def run(self, function: Function, tasks: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        """Run tasks of a study, or any other tasks without files."""
        if function not in (make_units, score_setting):
            yield from self._cluster.results(function, tasks)
            return
        calls = [(function, self._parcel(function, *task), *task) for task in tasks]
        for number, (result, units) in self._cluster.results(run_received, calls):
            for name, content in units.items():
                self._store(tasks[number][0], name, content)
            yield number, result

    def close(self) -> None:
        """Remove the workers' files."""
        for job in {shipment.job for shipment in self._shipments.values()}:
            self._cluster.on_every_machine(remove_received, job)

    def _parcel(self, function: Function, setup: Setup, subject: Any, *rest: Any) -> Shipment:
        """The files of one task: those of the study, and for a setting those of its units."""
        keys = rest[-1]
        shipment = self._shipment(setup, keys)
        if function is make_units or setup.sequential or not subject:
            return shipment
        plan, store = open_model(setup, keys.source).plan(subject), store_of(setup)
        needed = [store.workdir.path / unit.file for unit in units_of(plan, keys.model, keys.calibration)]
        for path in needed:
            if path not in self._units and path.exists():
                self._units |= {path: shipped({"unit": path}, self._cluster.put)["unit"]}
        return shipment.with_files({f"{UNITS}/{path.name}": self._units[path] for path in needed if path.exists()})

    def _shipment(self, setup: Setup, keys: Keys) -> Shipment:
        """Model, adapter and samples of a study."""
        if (setup, keys) not in self._shipments:
            model = open_model(setup, keys.source)
            files = model_files(model.checkpoint.folder, model.recipe.model.adapter)
            with tempfile.TemporaryDirectory(prefix="mmq-ray-") as folder:
                packed = Path(folder) / SAMPLES
                pack_samples({CALIBRATION: study_training(setup, model), **exam_samples(setup)}, packed)
                content = shipped({**files, SAMPLES: packed}, self._cluster.put)
            job = digest([self._name, keys.source, keys.machine, keys.calibration, keys.exam])
            self._shipments[setup, keys] = Shipment(job, content)
        return self._shipments[setup, keys]

    def _store(self, setup: Setup, name: str, content: bytes) -> None:
        """Store a unit that a worker made."""
        make_folder(setup.folder / "units")
        with atomic(setup.folder / "units" / name) as temporary:
            temporary.write_bytes(content)


def run_received(
    function: Function, shipment: Shipment, setup: Setup, subject: Any, *rest: Any
) -> tuple[Any, dict[str, bytes]]:
    """Run a task of a study in a worker, with files of its own machine; also returns the new units by file name."""
    folder = received(shipment)
    local = _here(setup, folder)
    result = function(local, subject, *rest)
    if function is not make_units:
        return result, {}
    made: Sequence[StudyUnit] = subject
    return result, {unit.file: (folder / UNITS / unit.file).read_bytes() for unit in made}


def _here(setup: Setup, folder: Path) -> Setup:
    """The setup with the folders of this machine."""
    recipe = Recipe.model_validate_json(setup.recipe)
    adapter = received_adapter(folder, recipe.model.adapter)
    model = recipe.model.model_copy(update={"repo": str(folder / MODEL), "revision": None, "adapter": adapter})
    return replace(
        setup,
        folder=folder / STUDY,
        recipe=recipe.model_copy(update={"model": model}).model_dump_json(),
        places=(),
        packed=folder / SAMPLES,
    )
