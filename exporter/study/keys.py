"""What names the units and settings of a study: digests of everything that decides their numbers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from exporter.data import image_key
from exporter.device import Device
from exporter.errors import DataError
from exporter.evaluation.answers import digest
from exporter.events import Listener
from exporter.files.mapping_diff import changes
from exporter.inference.predict import calibration_text
from exporter.model.checkpoint import Checkpoint
from exporter.model.families import Family
from exporter.planning.recipe import Recipe
from exporter.quantization import identity
from exporter.tasks.sample import Sample


@dataclass(frozen=True)
class Keys:
    """What all units and settings of one run share; plain text, so that it travels to workers.

    source: digest of the model and its processor. machine: JSON of what computes. calibration, exam: digests of samples
    with their pictures, texts and prompts; the former also of the settings of calibration.
    """

    source: str
    machine: str
    calibration: str
    exam: str

    @property
    def model(self) -> str:
        """The model as it is computed here: what every unit depends on."""
        return digest([self.source, self.machine])

    def require_machine(self, device: Device, checkpoint: Checkpoint) -> None:
        """DataError when this process computes otherwise than the one that began the study."""
        differs = changes(json.loads(self.machine), of_machine(device, checkpoint))
        if differs:
            raise DataError(
                f"this worker computes otherwise than the process that began the study: {'; '.join(differs)}",
                "every machine needs the same packages and the same kind of device",
            )


def keys_of(
    checkpoint: Checkpoint,
    device: Device,
    calibration: str,
    exam: str,
    on_event: Listener,
) -> Keys:
    """The keys of a run. calibration, exam: as `calibration_digest` and `exam_digest` give them."""
    source = digest(identity.of_source(checkpoint, on_event))
    return Keys(source, json.dumps(of_machine(device, checkpoint)), calibration, exam)


def of_machine(device: Device, checkpoint: Checkpoint) -> dict[str, Any]:
    """What computes the units and scores of a checkpoint."""
    return identity.of_machine(device, stored_dtype(checkpoint))


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Dtype of the checkpoint's matrices."""
    return next(info.dtype for info in checkpoint.tensors.values() if len(info.shape) == 2)


def calibration_digest(recipe: Recipe, processor: Any, family: Family, samples: Sequence[Sample]) -> str:
    """Of what units are calibrated on."""

    def text(sample: Sample) -> str:
        return calibration_text(processor, family, sample)

    return digest(identity.of_calibration(recipe.calibration, samples, _pictures(samples), text))


def exam_digest(processor: Any, family: Family, exam: Mapping[str, Sequence[Sample]]) -> str:
    """Of what settings are scored on, by task."""

    def text(sample: Sample) -> str:
        return "" if sample.among is not None else calibration_text(processor, family, sample)

    tasks = {task: identity.of_samples(samples, _pictures(samples), text) for task, samples in exam.items()}
    return digest(tasks)


def _pictures(samples: Sequence[Sample]) -> list[str]:
    return [image_key(sample.image()) for sample in samples]
