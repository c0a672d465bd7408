"""`mmq_manifest.json` as typed data: what an artifact holds, where it came from, and the hashes that prove both.

Anybody may have written the file, so every value is checked when it is read: numbers are finite and in bounds, hashes
are hashes, names are plain file names. A key that no version of mmq writes is ignored; a key that an older version did
not write is None or empty, never invented.
"""

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from exporter.errors import ArtifactError, CheckpointError, did_you_mean, wording
from exporter.files.strict_json import parse_object, read_small
from exporter.files.writing import write_text
from exporter.formats import FORMATS
from exporter.model.families import FAMILIES

MANIFEST = "mmq_manifest.json"
VERSION = 1  # of this file's layout; a larger one is of a newer mmq
PROBLEMS_SHOWN = 8
AGAIN = "export or evaluate the artifact again"

D = TypeVar("D", bound="Document")


class Document(BaseModel):
    """A part of a file that anybody may have written: frozen, no conversions between types, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


def _plain_file_name(name: str) -> str:
    if not name or name in (".", "..") or any(c in "/\\" or not c.isprintable() for c in name):
        raise ValueError(f"{name!r} is not the plain name of a file of this folder")
    return name


def _line(text: str) -> str:
    if as_line(text) != text:
        raise ValueError("line breaks and control characters are not allowed")
    return text


def as_line(text: str) -> str:
    """A text without line breaks and control characters: what a `Line` may hold."""
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else " " for c in text)


def _known(registry: Any, what: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in registry:
            raise ValueError(f"unknown {what}.{did_you_mean(value, registry)} ({', '.join(sorted(registry))})")
        return value

    return check


Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, StringConstraints(max_length=255), AfterValidator(_plain_file_name)]
TensorName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\-]{1,500}$")]  # of a tensor, a module or a block
Line = Annotated[str, StringConstraints(max_length=4000), AfterValidator(_line)]
Count = Annotated[int, Field(ge=0, lt=2**53)]


class RecipeIdentity(Document):
    """The recipe that made the artifact. sha256: `Recipe.digest` of its content."""

    sha256: Sha256
    name: Line = ""


class SourceRecord(Document):
    """The full-precision model: `org/name@commit` or a local name.

    digest: `Checkpoint.digest`, over configuration and shards. shards, processor: file -> sha256, of the weights and of
    everything that a processor is made from. adapter: the LoRA adapter that was merged; its files are among `shards`.
    """

    model: Line
    adapter: Line | None = None
    digest: Sha256 | None = None
    shards: dict[FileName, Sha256] = {}
    processor: dict[Line, Sha256] = {}


class SizeRecord(Document):
    """Bytes of all tensors, of the source and of the artifact."""

    before: Annotated[int, Field(gt=0, lt=2**53)]
    after: Annotated[int, Field(gt=0, lt=2**53)]


class CalibrationSample(Document):
    """A picture that was calibrated on. image: sha256 of size and pixels. look: see `data.overlap.Trace`."""

    id: str
    image: Sha256
    look: Annotated[str, StringConstraints(max_length=4000)] | None = None


class CalibrationRecord(Document):
    """What the statistics were measured on; no samples when no method needed any."""

    data: Line
    seed: int
    samples: tuple[CalibrationSample, ...]
    batch: Annotated[int, Field(ge=1)] | None = None
    vision_weight: Annotated[float, Field(ge=0)] | None = None


class Provenance(Document):
    """How the artifact was made."""

    calibration: CalibrationRecord
    device: Line


class ServingVerdict(Document):
    """The verdict of the last `mmq check`."""

    engine: Line
    build: Line
    passed: bool


class Manifest(Document):
    """The whole file.

    files: every file of the artifact but manifest, report and card -> sha256. linears: packed linears -> `digest` of
    their integers. errors: every quantized linear -> relative error. units: blocks that were quantized, in order.
    shards: files of weights, in order. fingerprint: of the job that wrote it. notes: what happened on the way.
    """

    family: Annotated[str, AfterValidator(_known(FAMILIES, "family"))]
    format: Annotated[str, AfterValidator(_known(FORMATS, "format"))]
    recipe: RecipeIdentity
    source: SourceRecord
    provenance: Provenance
    files: dict[FileName, Sha256]
    linears: dict[TensorName, Sha256]
    errors: dict[TensorName, Annotated[float, Field(ge=0)]]
    units: tuple[TensorName, ...]
    bytes: SizeRecord
    bits_per_weight: Annotated[float, Field(gt=0, le=64)]
    versions: dict[Line, Line]
    format_version: Annotated[int, Field(ge=1, le=VERSION)] = 1
    shards: tuple[FileName, ...] = ()
    fingerprint: Line | None = None
    notes: tuple[Line, ...] = ()
    serving: ServingVerdict | None = None


def parse_manifest(content: bytes, where: str) -> Manifest:
    """A manifest from a file's bytes. ArtifactError lists the problems; `where` names the file in it."""
    return parse_document(Manifest, parse_json(content, where), where)


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """The JSON object in a file's bytes, in which no key occurs twice (ArtifactError)."""
    try:
        return parse_object(content, where, unique=True)
    except CheckpointError as error:
        raise ArtifactError(f"{where} is damaged:\n  {error.message.removeprefix(f'{where}: ')}", AGAIN) from None


def parse_document(kind: type[D], plain: Any, where: str) -> D:
    """Plain data to a document, or an ArtifactError with every problem (the first few where there are many)."""
    try:
        return kind.model_validate_json(json.dumps(plain))  # from JSON, where lists may become tuples
    except ValidationError as error:
        problems = [f"  {_path(problem['loc'])}{wording(problem, ())}" for problem in error.errors(include_url=False)]
    rest = [f"  and {len(problems) - PROBLEMS_SHOWN} more"] if len(problems) > PROBLEMS_SHOWN else []
    lines = "\n".join([*problems[:PROBLEMS_SHOWN], *rest])
    raise ArtifactError(f"{where} is damaged, or of a newer mmq:\n{lines}", AGAIN)


def _path(location: tuple[int | str, ...]) -> str:
    parts = [part for part in location if part != "[key]"]  # pydantic's mark of a key that is wrong itself
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
    return f"{text}: " if text else ""


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact's folder (ArtifactError when there is none or it is damaged)."""
    path = folder / MANIFEST
    if not path.exists():
        raise ArtifactError(f"{folder} has no {MANIFEST}: not an artifact of mmq", "`mmq export` writes one")
    return parse_manifest(read_document(path), str(path))


def read_document(path: Path) -> bytes:
    """The bytes of a manifest or report on disk (ArtifactError when it is no readable file, or too large)."""
    try:
        return read_small(path)
    except CheckpointError as error:
        raise ArtifactError(error.message, AGAIN) from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put the manifest into an artifact's folder, atomically."""
    plain = manifest.model_dump(mode="json", exclude_none=True)
    write_text(folder / MANIFEST, json.dumps(plain, indent=1, sort_keys=True) + "\n")
