"""Identities: plain data that holds everything that can change a job's numbers. Fingerprints are hashes of identities.

Work folders, units and settings of studies, and stored answers are looked up or refused by an identity made of these
parts. Every input that can change a number belongs into one of them; names of folders, data sources and machines do
not.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from exporter.data.tasks.sample import Sample, task_of
from exporter.device import Device
from exporter.distribution import PROGRAM, installed_version
from exporter.dtypes import Dtype
from exporter.events import Listener, ignore
from exporter.methods import METHODS
from exporter.model.checkpoint import Checkpoint
from exporter.model.inference.predict import calibration_text
from exporter.model.processors.files import processor_files
from exporter.planning.plan import Plan
from exporter.planning.recipe import Calibration
from exporter.quantization import calibrate

PACKAGES = (PROGRAM, "torch", "transformers", "tokenizers", "pillow", "numpy", "torchvision")
Identity = dict[str, Any]  # plain data that can be written as JSON


def package_versions() -> dict[str, str]:
    """Version of every package that takes part in the computation; `absent` when it is not installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    return installed_version(package) or "absent"


def of_source(checkpoint: Checkpoint, on_event: Listener = ignore) -> Identity:
    """Identity of a checkpoint: config, dtypes that tensors are read as, hashes of its shards and processor files."""
    files = checkpoint.shard_hashes(on_event) | processor_files(checkpoint.folder)
    return {"config.json": checkpoint.config, "tensors read as": checkpoint.dtypes(), "files": files}


def of_machine(device: Device, stored: Dtype) -> Identity:
    """Identity of the hardware and software that compute. stored: dtype of the checkpoint's linears."""
    kind: Identity = {"device": device.kind, "compute dtype": device.compute_dtype(stored).name}
    if device.others:  # sums of another number of parts round differently
        kind["devices that share calibration"] = len(device.all)
    return kind | {"versions": package_versions()}


def of_samples(
    samples: Iterable[Sample], pictures: Iterable[str], prompt: Callable[[Sample], str] | None = None
) -> list[Identity]:
    """Identity of each sample with its texts.

    pictures: `image_key` of each sample. prompt: returns a sample's text as the model reads it.
    """
    return [_of_sample(sample, picture, prompt) for sample, picture in zip(samples, pictures, strict=True)]


def _of_sample(sample: Sample, picture: str, prompt: Callable[[Sample], str] | None) -> Identity:
    references = "answers" if task_of(sample) == "vqa" else "caption"
    described: Identity = {
        "id": sample.identity,
        "picture": picture,
        "question": sample.question,
        references: list(sample.references),
        "kind": sample.kind,
    }
    if sample.among is not None:
        described["pictures and texts searched"] = sample.among.digest
    return described | ({"prompt": prompt(sample)} if prompt else {})


def of_calibration(
    settings: Calibration, samples: Sequence[Sample], pictures: Sequence[str], prompt: Callable[[Sample], str]
) -> Identity:
    """Identity of the calibration data.

    Settings that only select samples are left out, because the selected samples themselves are in `samples`.
    """
    return {
        "calibration": {name: getattr(settings, name) for name in ("seed", "batch", "vision_weight")},
        "samples": of_samples(samples, pictures, prompt),
    }


def of_job(
    plan: Plan,
    checkpoint: Checkpoint,
    processor: Any,
    samples: Sequence[Sample],
    pictures: Sequence[str],
    device: Device,
    on_event: Listener = ignore,
) -> Identity:
    """Identity of everything that determines the quantized blocks of an export; format, gates and evaluation do not.

    processor: may be None without samples. pictures: `image_key` of each sample.
    """
    methods = sorted({row.rule.method for row in plan.rows if row.rule})
    rules = [rule.model_dump(mode="json", exclude={"store"}) for rule in plan.recipe.quantize]
    stored = next(row.tensor.dtype for row in plan.rows if row.linear)

    def prompt(sample: Sample) -> str:
        return calibration_text(processor, plan.family, sample)

    return {
        **of_source(checkpoint, on_event),
        **of_machine(device, stored),
        **of_calibration(plan.recipe.calibration, samples, pictures, prompt),
        "quantize": rules,
        "methods": method_versions(methods),
    }


def method_versions(methods: Iterable[str]) -> dict[str, int]:
    """Version of every method, and of the code that runs the blocks through them."""
    versions = {name: METHODS[name].VERSION for name in methods} | {"calibrate": calibrate.VERSION}
    return {f"version of {name}": number for name, number in versions.items()}
