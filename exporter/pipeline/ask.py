"""One question about one picture, answered by a model or an artifact in this process, or by a server."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from exporter.artifact.artifact import Artifact, with_recorded_prompts
from exporter.artifact.manifest import MANIFEST, Manifest, read_manifest
from exporter.data.pictures import PictureError, open_picture
from exporter.device import Device, free_bytes
from exporter.dtypes import BFLOAT16, Dtype
from exporter.errors import DataError
from exporter.evaluation.backends import opened_predictor
from exporter.evaluation.baseline import require_source
from exporter.events import Event, Listener
from exporter.inference.predict import Predictor
from exporter.inference.predict_server import ServedPredictor, Server
from exporter.model.families import Family
from exporter.model.processor import load_processor
from exporter.model.source import open_source
from exporter.numerics.activation_rounding import EXACT
from exporter.planning.placement import Placement
from exporter.planning.recipe_file import load_recipe
from exporter.tasks.sample import Sample

ROOM = 1.25  # memory for a model, as a multiple of its weights: activations and cache of one short answer
OnText = Callable[[str], object]


@dataclass(frozen=True)
class PictureQuestion:
    """A picture and a text.

    longest: most tokens of the answer. as_is: send the text without the family's wording. manifest: of the artifact
    whose prompts all asked models get; None for the family's.
    """

    sample: Sample
    longest: int
    as_is: bool = False
    manifest: Manifest | None = None

    def wording(self, family: Family) -> Family:
        """The family, with the wording that this question gets."""
        family = with_recorded_prompts(family, self.manifest) if self.manifest else family
        return replace(family, question_prompt="{question}") if self.as_is else family


def question(picture: Path, text: str | None, longest: int, as_is: bool, model: str = "") -> PictureQuestion:
    """A question about a picture file; without text it asks for a caption. DataError if the picture cannot be used.

    model: an artifact's folder, whose prompts are used; any other model has its family's.
    """
    try:
        image = open_picture(picture)
    except PictureError as error:
        raise DataError(f"{picture} cannot be used: {error}", "pass a picture file such as photo.jpg") from None
    if text is not None and not text.strip():
        raise DataError("the question is empty", "leave it out to ask for a caption")
    manifest = read_manifest(Path(model)) if (Path(model) / MANIFEST).is_file() else None
    return PictureQuestion(Sample(str(picture), lambda: image, text, ()), longest, as_is, manifest)


def ask(model: str, request: PictureQuestion, device: Device, on_event: Listener, on_text: OnText) -> str:
    """The answer of an artifact or a model (folder, hub id, demo name), computed here; `on_text` gets its pieces."""
    with opened_model(model, request.wording, device, on_event) as predictor:
        return predictor.stream(request.sample, request.longest, on_text)


def ask_server(model: str, request: PictureQuestion, server: Server, on_text: OnText) -> str:
    """The answer of a server that serves `model`, whose family determines the wording. DataError if it fails.

    The answer gets at most half of the server's context, because vLLM refuses requests that could exceed it.
    """
    family = _answering(open_source(model, headers_only=True)[1])
    entry = server.served()
    name, context = str(entry["id"]), entry.get("max_model_len")
    longest = min(request.longest, max(1, context // 2)) if isinstance(context, int) else request.longest
    predictor = ServedPredictor(server, request.wording(family), name, server.lacks_start(name))
    return predictor.stream(request.sample, longest, on_text)


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
    family = wording(_answering(family))
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


def _answering(family: Family) -> Family:
    if "vqa" not in family.tasks and "captioning" not in family.tasks:
        raise DataError(f"models of the family {family.name} do not answer with text", "use a model that does")
    return family
