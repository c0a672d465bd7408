"""From samples that were read to a verified artifact: quantize what is missing, write, verify."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exporter.artifact import artifact
from exporter.artifact.output import Destination
from exporter.artifact.verify import Verified, verify
from exporter.data import Trace
from exporter.device import Device, exact_math, return_freed_memory, synchronize
from exporter.errors import ArtifactError, CheckpointError, MmqError
from exporter.events import Event, Listener
from exporter.files.folder_lock import hold
from exporter.files.mapping_diff import changes
from exporter.files.strict_json import read_json
from exporter.inference.predict import batches
from exporter.model.checkpoint import Checkpoint
from exporter.pipeline.step_clock import Clock
from exporter.planning.plan import Plan
from exporter.quantization import calibrate
from exporter.quantization.identity import of_source
from exporter.quantization.workdir import JOB, LOCK, Workdir, fingerprint_of
from exporter.tasks.sample import Sample

SOURCE_ROWS = 64  # of each linear, compared with the source's; `mmq verify --source` compares all


@dataclass(frozen=True)
class Prepared:
    """What an export has read before its work begins.

    processor: None when no sample needs it. samples, traces: what is calibrated on, and what the manifest keeps of it.
    inputs: the identity of the job (`identity.of_job`).
    """

    plan: Plan
    checkpoint: Checkpoint
    processor: Any
    samples: Sequence[Sample]
    traces: Sequence[Trace]
    inputs: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """What work folder and manifest name the job by."""
        return fingerprint_of(self.inputs)


def made_already(
    job: Prepared, place: Destination, device: Device, on_event: Listener, clock: Clock
) -> Verified | None:
    """What verifying the artifact of this job shows that an earlier run wrote; None when there is none.

    A damaged one is an ArtifactError, or None where it may be replaced.
    """
    if not place.is_made(job.plan.recipe.digest(), job.fingerprint):
        return None
    on_event(Event("note", 0, 0, f"{place.out} holds this artifact already: it is verified, and not made again"))
    try:
        with clock.step("verify", f"the artifact is in {place.out}"):
            return verify(place.out, device, on_event, source=job.checkpoint, rows=SOURCE_ROWS)
    except ArtifactError as error:
        if place.overwrite:
            return None
        raise ArtifactError(error.message, "--overwrite makes it again") from None


def make_artifact(
    job: Prepared, place: Destination, source: str, device: Device, on_event: Listener, clock: Clock
) -> Verified:
    """Quantize every block that the work folder does not hold yet, and write the artifact.

    source: where the samples come from, for the manifest. The artifact gets its name once it was verified.
    """
    verified: list[Verified] = []
    kept = f"finished blocks are kept in {place.work}: the same command goes on from them"

    def check(folder: Path) -> None:
        return_freed_memory()  # of shards that are written
        with clock.step("verify", kept):
            _require_unchanged(job, workdir)
            verified.append(verify(folder, device, on_event, source=job.checkpoint, rows=SOURCE_ROWS))

    with hold(place.work / LOCK, place.work, on_event=on_event):
        with clock.step("read data", kept):
            workdir = Workdir.open(place.work, job.inputs)
            workdir.drop_damaged(job.plan.units, on_event)
            inputs = _batches(job, workdir, on_event)
        with clock.step("quantize", kept), exact_math(job.plan.recipe.calibration.seed):
            calibrate.run(job.plan, job.checkpoint, workdir, inputs, device, on_event)
            synchronize(device)
        del inputs
        return_freed_memory()
        with clock.step("write", kept):
            artifact.write(
                job.plan,
                job.checkpoint,
                workdir,
                place.out,
                _provenance(job, source, device),
                on_event,
                device.torch_device,
                check,
                overwrite=place.overwrite,
            )
    return verified[0]


def _require_unchanged(job: Prepared, workdir: Workdir) -> None:
    """CheckpointError when the model changed since its identity was taken; the finished blocks are then worthless."""
    now = of_source(job.checkpoint)
    lines = changes({key: job.inputs[key] for key in now}, now)
    if lines:
        workdir.clear()
        raise CheckpointError(
            f"{job.checkpoint.origin} changed while the job ran: {'; '.join(lines)}",
            "let whatever writes to it finish, then run the same command again",
        )


def remove_work(path: Path, fingerprint: str, on_event: Listener) -> None:
    """Delete the work folder of a job that is done; one of another job stays."""
    if not (path / JOB).exists():
        return
    try:
        with hold(path / LOCK, path, on_event=on_event):
            if fingerprint_of(read_json(path / JOB)) == fingerprint:
                Workdir(path, fingerprint).clear()
                shutil.rmtree(path)
    except MmqError as error:
        on_event(Event("note", 0, 0, f"{path} is left as it is: {error.message}"))


def _batches(job: Prepared, workdir: Workdir, on_event: Listener) -> list[dict[str, torch.Tensor]]:
    """Calibration batches; none when every unit that needs them is finished."""
    rest = job.plan.units[workdir.done(job.plan.units) :]
    if not any(unit.needs_statistics for unit in rest):
        return []
    size, found = job.plan.recipe.calibration.batch, []
    for start in range(0, len(job.samples), size):
        found += batches(job.processor, job.plan.family, job.samples[start : start + size], size)
        on_event(Event("read data", min(start + size, len(job.samples)), len(job.samples)))
    return found


def _provenance(job: Prepared, source: str, device: Device) -> dict[str, Any]:
    settings = job.plan.recipe.calibration
    return {
        "calibration": {
            "data": source,
            "seed": settings.seed,
            "batch": settings.batch,
            "vision_weight": settings.vision_weight,
            "samples": [trace.as_json() for trace in job.traces],
        },
        "device": device.name,
    }
