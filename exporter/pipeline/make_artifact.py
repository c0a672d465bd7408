"""Make an artifact of a prepared job: quantize the missing blocks, write the artifact, verify it."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exporter.artifact import artifact
from exporter.artifact.output_folder import Destination, refuse_foreign
from exporter.artifact.verify import Verification, verify
from exporter.data import Trace
from exporter.data.tasks.sample import Sample
from exporter.device import Device, exact_math, return_freed_memory, synchronize
from exporter.errors import ArtifactError, CheckpointError, MmqError
from exporter.events import Event, Listener, notice
from exporter.files.folder_lock import hold
from exporter.files.mapping_diff import changes
from exporter.files.strict_json import read_json
from exporter.model.checkpoint import Checkpoint
from exporter.model.inference.predict import batches
from exporter.pipeline.step_clock import Clock
from exporter.planning.plan import Plan
from exporter.quantization import calibrate
from exporter.quantization.identity import of_source
from exporter.quantization.workdir import JOB, LOCK, Workdir, fingerprint_of

SOURCE_ROWS = 64  # rows per linear to compare with the source; `mmq verify --source` compares all rows


@dataclass(frozen=True)
class ExportJob:
    """Inputs of an export, read before its work begins.

    processor: None when no sample needs it. samples: calibration samples. traces: their records in the manifest.
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
        """Identity of the job in the work folder and in the manifest."""
        return fingerprint_of(self.inputs)


def verify_existing(
    job: ExportJob, destination: Destination, device: Device, on_event: Listener, clock: Clock
) -> Verification | None:
    """Verify the artifact of this job that an earlier run wrote; None when there is no such artifact.

    A damaged artifact raises ArtifactError, or gives None where `overwrite` allows its replacement.
    """
    if not destination.is_made(job.plan.recipe.digest(), job.fingerprint):
        return None
    on_event(notice(f"{destination.out} already holds this artifact: mmq only verifies it"))
    try:
        with clock.step("verify", f"the artifact is in {destination.out}"):
            return verify(destination.out, device, on_event, source=job.checkpoint, rows=SOURCE_ROWS)
    except ArtifactError as error:
        if destination.overwrite:
            refuse_foreign(destination.out)
            return None
        raise ArtifactError(error.message, "give --overwrite to export it again") from None


def make_artifact(
    job: ExportJob, destination: Destination, source: str, device: Device, on_event: Listener, clock: Clock
) -> Verification:
    """Quantize every block that the work folder does not hold yet, write the artifact and verify it.

    source: data sources of the samples, for the manifest. The artifact gets its final name after verification.
    """
    verified: list[Verification] = []
    recovery = f"finished blocks are kept in {destination.work}: the same command resumes from them"

    def check(folder: Path) -> None:
        return_freed_memory()  # the written shards are freed, but the allocator still holds their memory
        with clock.step("verify", recovery):
            _require_unchanged(job, workdir)
            verified.append(verify(folder, device, on_event, source=job.checkpoint, rows=SOURCE_ROWS))

    with hold(destination.work / LOCK, destination.work, on_event=on_event):
        with clock.step("read data", recovery):
            workdir = Workdir.open(destination.work, job.inputs)
            workdir.drop_damaged(job.plan.units, on_event)
            inputs = _batches(job, workdir, on_event)
        with clock.step("quantize", recovery), exact_math(job.plan.recipe.calibration.seed):
            calibrate.run(job.plan, job.checkpoint, workdir, inputs, device, on_event)
            synchronize(device)
        del inputs
        return_freed_memory()
        with clock.step("write", recovery):
            artifact.write(
                job.plan,
                job.checkpoint,
                workdir,
                destination.out,
                _provenance(job, source, device),
                on_event,
                device.torch_device,
                check,
                overwrite=destination.overwrite,
            )
    return verified[0]


def _require_unchanged(job: ExportJob, workdir: Workdir) -> None:
    """Clear the work folder and raise CheckpointError when the model files changed during the job."""
    current = of_source(job.checkpoint)
    lines = changes({key: job.inputs[key] for key in current}, current)
    if lines:
        workdir.clear()
        raise CheckpointError(
            f"{job.checkpoint.origin} changed while the job ran: {'; '.join(lines)}",
            "wait until no process writes to the model, then run the same command again",
        )


def remove_work(path: Path, fingerprint: str, on_event: Listener) -> None:
    """Delete the work folder of a finished job; keep the folder when it belongs to another job."""
    if not (path / JOB).exists():
        return
    try:
        with hold(path / LOCK, path, on_event=on_event):
            if fingerprint_of(read_json(path / JOB)) == fingerprint:
                shutil.rmtree(path)
    except MmqError as error:
        on_event(notice(f"{path} was not removed: {error.message}"))


def _batches(job: ExportJob, workdir: Workdir, on_event: Listener) -> list[dict[str, torch.Tensor]]:
    """Calibration batches; empty when every unit that needs statistics is finished."""
    unfinished = job.plan.units[workdir.done(job.plan.units) :]
    if not any(unit.needs_statistics for unit in unfinished):
        return []
    size, inputs = job.plan.recipe.calibration.batch, []
    for start in range(0, len(job.samples), size):
        inputs += batches(job.processor, job.plan.family, job.samples[start : start + size], size)
        on_event(Event("read data", min(start + size, len(job.samples)), len(job.samples)))
    return inputs


def _provenance(job: ExportJob, source: str, device: Device) -> dict[str, Any]:
    """Calibration settings, calibration pictures and device, as the manifest records them."""
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
