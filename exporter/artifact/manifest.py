"""Schema of `mmq_manifest.json`: contents of an artifact, its source, and the hashes of both.

Files from the hub are untrusted, so every value is validated on reading: numbers are finite and in bounds, hashes are
64 hexadecimal digits, names are plain file names. Unknown keys are ignored; keys that an older mmq did not write are
None or empty.
"""

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
)

from exporter.errors import ArtifactError, CheckpointError, did_you_mean, validation_message
from exporter.files.strict_json import parse_object, read_small
from exporter.files.writing import write_text
from exporter.formats import FORMATS
from exporter.model.families import FAMILIES
from exporter.numerics.kv_caches import BY_FLAG
from exporter.planning.recipe import check_prompts

MANIFEST = "mmq_manifest.json"
VERSION = 1  # layout of this file; a newer mmq writes a larger number
PROBLEMS_SHOWN = 8
AGAIN = "export or evaluate the artifact again"

D = TypeVar("D", bound="Document")


class Document(BaseModel):
    """Base of all records in untrusted files: frozen, no type conversions, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


def _plain_file_name(name: str) -> str:
    if not name or name in (".", "..") or any(c in "/\\" or not c.isprintable() for c in name):
        raise ValueError(f"{name!r} is not a plain file name without folders")
    return name


def _line(text: str) -> str:
    if as_line(text) != text:
        raise ValueError("line breaks and control characters are not allowed")
    return text


def as_line(text: str) -> str:
    """Replace line breaks and control characters by spaces, so that the text is a valid `Line`."""
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else " " for c in text)


def _known(registry: Any, what: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in registry:
            raise ValueError(f"unknown {what}.{did_you_mean(value, registry)} ({', '.join(sorted(registry))})")
        return value

    return check


Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, StringConstraints(max_length=255), AfterValidator(_plain_file_name)]
TensorName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\-]{1,500}$")]  # name of a tensor, module or block
Line = Annotated[str, StringConstraints(max_length=4000), AfterValidator(_line)]
Count = Annotated[int, Field(ge=0, lt=2**53)]


class PromptRecord(Document):
    """The prompt of a task, without chat template, and the longest answer in tokens."""

    prompt: Annotated[str, StringConstraints(max_length=10_000)]
    max_new_tokens: Annotated[int, Field(ge=1, lt=2**31)]


class RecipeIdentity(Document):
    """The recipe that made the artifact. sha256: `Recipe.digest` of its content. overrides: `Recipe.overrides`."""

    sha256: Sha256
    name: Line = ""
    overrides: dict[Line, Line] = {}


class SourceRecord(Document):
    """The full-precision model: `org/name@commit` or a local name.

    digest: `Checkpoint.digest`, over configuration and shards. shards, processor: file -> sha256, of the weights and of
    the files that the processor is loaded from. adapter: the merged LoRA adapter; its files are among `shards`.
    """

    model: Line
    adapter: Line | None = None
    digest: Sha256 | None = None
    shards: dict[FileName, Sha256] = {}
    processor: dict[Line, Sha256] = {}


Bytes = Annotated[int, Field(ge=0, lt=2**53)]


class ComponentSize(Document):
    """Bytes of a component in the source and in the artifact; kept: of its tensors that are copied unchanged."""

    before: Bytes
    after: Bytes
    kept: Bytes


class SizeRecord(Document):
    """Size of all tensors in bytes. before: of the source. after: of the artifact.

    components: component -> its size, in the order of the data, last those of no component; empty in older manifests.
    """

    before: Annotated[int, Field(gt=0, lt=2**53)]
    after: Annotated[int, Field(gt=0, lt=2**53)]
    components: dict[Line, ComponentSize] = {}


class CalibrationSample(Document):
    """One calibration picture. image: sha256 of size and pixels. look: see `data.overlap.Trace`."""

    id: str
    image: Sha256
    look: Annotated[str, StringConstraints(max_length=9000)] | None = None


class CalibrationRecord(Document):
    """The calibration set; `samples` is empty when no method needs data."""

    data: Line
    seed: int
    samples: tuple[CalibrationSample, ...]
    batch: Annotated[int, Field(ge=1)] | None = None
    vision_weight: Annotated[float, Field(ge=0)] | None = None


class Provenance(Document):
    """Calibration set and device of the export."""

    calibration: CalibrationRecord
    device: Line


class ServingVerdict(Document):
    """The verdict of the last `mmq check`."""

    engine: Line
    build: Line
    passed: bool


class Manifest(Document):
    """Content of an artifact's `mmq_manifest.json`.

    files: every file of the artifact except manifest, report and card -> sha256. linears: packed linear -> `digest` of
    its integers. errors: quantized linear -> relative error. units: quantized blocks, in order. shards: weight files,
    in order. fingerprint: identity of the export job. notes: notes of the quantization. prompts: of every task that is
    answered in text, as calibration used them. kv_cache: the value of vLLM's --kv-cache-dtype that the artifact was
    evaluated with and needs; None where config.json says everything.
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
    prompts: dict[TensorName, PromptRecord] = {}
    kv_cache: Annotated[str, AfterValidator(_known(BY_FLAG, "KV cache"))] | None = None
    serving: ServingVerdict | None = None

    @field_validator("prompts")
    @classmethod
    def _prompts(cls, value: dict[str, PromptRecord]) -> dict[str, PromptRecord]:
        check_prompts({task: record.prompt for task, record in value.items()})
        return value


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Parse a manifest from a file's bytes. ArtifactError lists the problems; `where` is the file's name in it."""
    return parse_document(Manifest, parse_json(content, where), where)


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """Parse the JSON object in a file's bytes; ArtifactError for invalid JSON or a duplicate key."""
    try:
        return parse_object(content, where, unique=True)
    except CheckpointError as error:
        raise ArtifactError(f"{where} is damaged:\n  {error.message.removeprefix(f'{where}: ')}", AGAIN) from None


def parse_document(kind: type[D], plain: Any, where: str) -> D:
    """Validate plain data as a document; ArtifactError lists the first `PROBLEMS_SHOWN` problems."""
    try:
        return kind.model_validate_json(json.dumps(plain))  # JSON mode converts lists to tuples in spite of strict
    except ValidationError as error:
        problems = [
            f"  {_path(problem['loc'])}{validation_message(problem, ())}" for problem in error.errors(include_url=False)
        ]
    omitted = [f"  and {len(problems) - PROBLEMS_SHOWN} more"] if len(problems) > PROBLEMS_SHOWN else []
    lines = "\n".join([*problems[:PROBLEMS_SHOWN], *omitted])
    raise ArtifactError(f"{where} is damaged, or a newer mmq wrote it:\n{lines}", AGAIN)


def _path(location: tuple[int | str, ...]) -> str:
    parts = [
        part for part in location if part != "[key]"
    ]  # pydantic appends "[key]" when the key is invalid, not the value
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
    return f"{text}: " if text else ""


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an artifact's folder; ArtifactError when it is missing or damaged."""
    path = folder / MANIFEST
    if not path.exists():
        raise ArtifactError(f"{folder} has no {MANIFEST}: it is not an mmq artifact", "`mmq export` writes an artifact")
    return parse_manifest(read_document(path), str(path))


def read_document(path: Path) -> bytes:
    """Read the bytes of a manifest or report; ArtifactError when the file is unreadable or too large."""
    try:
        return read_small(path)
    except CheckpointError as error:
        raise ArtifactError(error.message, AGAIN) from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into an artifact's folder, atomically."""
    plain = manifest.model_dump(mode="json", exclude_none=True)
    write_text(folder / MANIFEST, json.dumps(plain, indent=1, sort_keys=True) + "\n")
