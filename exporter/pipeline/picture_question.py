"""A question about a picture, and its answer by a server. Imports no torch, which takes longer than the answer."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from exporter.artifact.manifest import MANIFEST, Manifest, read_manifest
from exporter.artifact.recorded_prompts import with_recorded_prompts
from exporter.data.pictures import PictureError, open_picture
from exporter.data.tasks.sample import Sample
from exporter.errors import DataError
from exporter.model.families import Family
from exporter.model.inference.predict_server import ServedPredictor, Server
from exporter.model.source import open_source

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


def ask_server(model: str, request: PictureQuestion, server: Server, on_text: OnText) -> str:
    """The answer of a server that serves `model`, whose family determines the wording. DataError if it fails.

    The answer gets at most half of the server's context, because vLLM refuses requests that could exceed it.
    """
    family = answering(open_source(model, headers_only=True)[1])
    entry = server.served()
    name, context = str(entry["id"]), entry.get("max_model_len")
    longest = min(request.longest, max(1, context // 2)) if isinstance(context, int) else request.longest
    predictor = ServedPredictor(server, request.wording(family), name, server.lacks_start(name))
    return predictor.stream(request.sample, longest, on_text)


def answering(family: Family) -> Family:
    """The family; DataError if its models do not answer with text."""
    if "vqa" not in family.tasks and "captioning" not in family.tasks:
        raise DataError(f"models of the family {family.name} do not answer with text", "use a model that does")
    return family
