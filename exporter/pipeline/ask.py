"""One question about one picture, answered by a model or an artifact in this process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from exporter.artifact.artifact import Artifact
from exporter.artifact.manifest import MANIFEST
from exporter.device import Device, free_bytes
from exporter.dtypes import BFLOAT16, Dtype
from exporter.errors import DataError
from exporter.evaluation.backends import opened_predictor
from exporter.evaluation.baseline import require_source
from exporter.events import Event, Listener
from exporter.model.families import Family
from exporter.model.inference.predict import Predictor
from exporter.model.processors.processor import load_processor
from exporter.model.source import open_source
from exporter.numerics.activation_rounding import EXACT
from exporter.pipeline.picture_question import OnText, PictureQuestion, answering
from exporter.planning.placement import Placement
from exporter.planning.recipe_file import load_recipe

ROOM = 1.25  # memory for a model, as a multiple of its weights: activations and cache of one short answer


def ask(model: str, request: PictureQuestion, device: Device, on_event: Listener, on_text: OnText) -> str:
    """The answer of an artifact or a model (folder, hub id, demo name), computed here; `on_text` gets its pieces."""
    with opened_model(model, request.wording, device, on_event) as predictor:
        return predictor.stream(request.sample, request.longest, on_text)


def source_of(artifact: str, baseline: str | None, on_event: Listener) -> str:
    """The full-precision model of an artifact, compared with the hashes in its manifest.

    baseline: where the source is, if not where the recipe names it. DataError if `artifact` is none, CheckpointError
    if the model is another one.
    """
    folder = Path(artifact)
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{artifact} is not an artifact: it has no source to compare with", "pass an artifact's folder")
    named = load_recipe(str(folder / "recipe.yaml")).model
    place = baseline or named.repo
    checkpoint, _ = open_source(place, None if baseline else named.revision, dtype=named.dtype, adapter=named.adapter)
    require_source(Artifact.open(folder), checkpoint, False, on_event)
    return place


@contextmanager
def opened_model(
    model: str, wording: Callable[[Family], Family], device: Device, on_event: Listener
) -> Iterator[Predictor]:
    """A predictor of an artifact (its weights dequantized, rounding as served) or of a model.

    wording: changes prompts and answer lengths of the family.
    """
    checkpoint, family = open_source(model)
    family = wording(answering(family))
    label = f"loading {Path(model).name}"
    on_event(Event("prepare", 0, 1, label))
    stored = next(info.dtype for info in checkpoint.tensors.values() if info.dtype.is_floating_point)
    if (Path(model) / MANIFEST).is_file():
        artifact = Artifact.open(Path(model), device.torch_device)
        config, names, read, rounded = artifact.source_config(), artifact.names(), artifact.read, artifact.rounded()
        parameters = artifact.parameters()
    else:
        config, names, read, rounded = checkpoint.config, list(checkpoint.tensors), checkpoint.read, EXACT
        parameters = sum(info.size for info in checkpoint.tensors.values())
    placement = placement_of(parameters, stored, device, free_bytes(device.torch_device))
    processor = partial(load_processor, checkpoint.folder)
    with opened_predictor(family, config, names, read, rounded, placement, device, processor, on_event) as predictor:
        on_event(Event("prepare", 1, 1, label))
        yield predictor


def placement_of(parameters: int, stored: Dtype, device: Device, room: int) -> Placement:
    """Whole in `device.compute_dtype`, else whole in bfloat16, else block by block, by the bytes that are free."""
    for dtype in (device.compute_dtype(stored), BFLOAT16):
        size = int(parameters * dtype.itemsize * ROOM)
        if size <= room:
            return Placement(dtype, 1, False, size)
    note = f"the model needs {size / 2**30:.1f} GiB and {room / 2**30:.1f} GiB are free: it runs block by block, slowly"
    return Placement(BFLOAT16, 1, True, size, note=note)
