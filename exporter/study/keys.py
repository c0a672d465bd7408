"""Digests that identify the units and settings of a study: model, machine, calibration data, exam data."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exporter.data import image_key
from exporter.data.tasks.sample import Sample
from exporter.device import Device
from exporter.dtypes import Dtype
from exporter.errors import DataError
from exporter.evaluation.answers import digest
from exporter.events import Listener
from exporter.files.mapping_diff import changes
from exporter.model.checkpoint import Checkpoint
from exporter.model.families import Family
from exporter.model.inference.predict import calibration_text
from exporter.planning.recipe import Recipe
from exporter.quantization import identity


@dataclass(frozen=True)
class Keys:
    """Digests that all units and settings of one run share; strings, so that they can be sent to workers.

    source: digest of the model and its processor. machine: JSON of device, dtype and package versions. calibration,
    exam: digests of samples with pictures, texts and prompts; calibration includes the calibration settings.
    """

    source: str
    machine: str
    calibration: str
    exam: str

    @property
    def model(self) -> str:
        """Digest of source and machine, on which every unit depends."""
        return digest([self.source, self.machine])

    def require_machine(self, device: Device, checkpoint: Checkpoint) -> None:
        """Raise DataError if this process has another device or other packages than the one that started the study."""
        differences = changes(json.loads(self.machine), of_machine(device, checkpoint))
        if differences:
            raise DataError(
                f"this worker differs from the process that started the study: {'; '.join(differences)}",
                "install the same packages and use the same kind of device on every machine",
            )


def keys_of(
    checkpoint: Checkpoint,
    device: Device,
    calibration: str,
    exam: str,
    on_event: Listener,
) -> Keys:
    """The keys of a run. calibration, exam: results of `calibration_digest` and `exam_digest`."""
    source = digest(identity.of_source(checkpoint, on_event))
    return Keys(source, json.dumps(of_machine(device, checkpoint)), calibration, exam)


def of_machine(device: Device, checkpoint: Checkpoint) -> dict[str, Any]:
    """Device, dtype and package versions that determine the units and scores of a checkpoint."""
    return identity.of_machine(device, stored_dtype(checkpoint))


def stored_dtype(checkpoint: Checkpoint) -> Dtype:
    """Dtype of the checkpoint's first matrix."""
    return next(info.dtype for info in checkpoint.tensors.values() if len(info.shape) == 2)


def calibration_digest(recipe: Recipe, processor: Any, family: Family, samples: Sequence[Sample]) -> str:
    """Digest of the calibration settings and samples."""

    def text(sample: Sample) -> str:
        return calibration_text(processor, family, sample)

    return digest(identity.of_calibration(recipe.calibration, samples, _pictures(samples), text))


def exam_digest(processor: Any, family: Family, exam: Mapping[str, Sequence[Sample]]) -> str:
    """Digest of the exam's samples, by task."""

    def text(sample: Sample) -> str:
        return "" if sample.among is not None else calibration_text(processor, family, sample)

    tasks = {task: identity.of_samples(samples, _pictures(samples), text) for task, samples in exam.items()}
    return digest(tasks)


def _pictures(samples: Sequence[Sample]) -> list[str]:
    return [image_key(sample.image()) for sample in samples]
