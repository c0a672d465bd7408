"""Read the summary of an artifact from its small files, in a folder or in a repository of the hub."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.artifact.artifact import described_groups
from exporter.artifact.manifest import MANIFEST, Manifest, parse_manifest
from exporter.data import BUILT_IN
from exporter.errors import ArtifactError, RecipeError
from exporter.evaluation.evaluation_record import EvaluationRecord
from exporter.evaluation.report_file import REPORT, Report, ServingRecord, parse_report
from exporter.evaluation.speed_record import SpeedRecord, parse_speed
from exporter.files.hub import PREFIX, open_remote, parse_place
from exporter.model.embedded import MODELS
from exporter.model.families import FAMILIES
from exporter.numerics.quantized import Scheme
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import parse_recipe
from exporter.planning.vllm_kernels import serving_kernels
from exporter.planning.vllm_rules import matches

RECIPE = "recipe.yaml"
ReadFile = Callable[[str], bytes | None]  # file name -> its bytes, None when the file is missing


@dataclass(frozen=True)
class SchemeGroup:
    """Linears of one component with the same scheme.

    packed: stored as integers; else rounded and stored in 16 bits. kernels: of vLLM for the scheme, by hardware.
    """

    component: str
    scheme: str
    bits: int
    methods: tuple[str, ...]
    linears: int
    packed: bool
    kernels: str = ""


@dataclass(frozen=True)
class Summary:
    """Summary of one artifact.

    report, serving, speed: None before the first evaluation, `mmq check`, `mmq bench`.
    """

    name: str
    manifest: Manifest
    report: Report | None
    recipe: Recipe
    parts: tuple[SchemeGroup, ...]
    serving: ServingRecord | None = None
    speed: SpeedRecord | None = None

    @property
    def source(self) -> str:
        """The full-precision model: `org/name@commit`, or a local name."""
        return self.manifest.source.model

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return self.manifest.bytes.after

    @property
    def other_baseline(self) -> str:
        """Description of the baseline when it is another model than the artifact's source; else empty.

        Compares the report's baseline name and weight digest with the source in the manifest.
        """
        evaluation, source = self.report.evaluation if self.report else EvaluationRecord(), self.manifest.source
        claims_source = evaluation.baseline is None or evaluation.baseline.is_source
        answers = evaluation.models.get("full precision")
        if claims_source and (source.digest is None or answers is None or answers.weights == source.digest):
            return ""
        name = evaluation.baseline.model if evaluation.baseline else "unknown"
        return f"{name}, not {source.model}"

    def metrics(self) -> dict[str, tuple[float, float]]:
        """`task metric` -> full precision, artifact; empty without a report."""
        measures = self.report.measures if self.report else ()
        return {f"{m.task} {m.metric}": (m.difference.before, m.difference.after) for m in measures}


def drawings_note(summary: Summary) -> str:
    """Note for a model that was evaluated on the built-in drawings; empty for other data.

    Also empty for the embedded models, because their training data are such drawings.
    """
    data = summary.report.evaluation.data if summary.report else None
    if summary.source in MODELS or not set((data or "").split(", ")) & set(BUILT_IN):
        return ""
    return (
        "Measured on mmq's built-in drawings of colored shapes: the scores show that the model works, not how much "
        "accuracy it lost. Captions are not scored on them."
    )


def read_place(place: str) -> Summary:
    """Summary of an artifact in a folder or in `hub:ORG/NAME[@REVISION]` (downloads only a few small files)."""
    if place.startswith(PREFIX):
        remote = open_remote(*parse_place(place))
        return read_summary(remote.name, remote.read)
    folder = Path(place).expanduser()
    if not folder.is_dir():
        raise ArtifactError(f"folder {place} does not exist", f"give an artifact's folder, or {PREFIX}ORG/NAME")
    return read_summary(folder.resolve().name, folder_reader(folder))


def folder_reader(folder: Path) -> ReadFile:
    """Function that reads a file of a folder by its name."""
    return lambda name: (folder / name).read_bytes() if (folder / name).is_file() else None


def read_summary(name: str, read: ReadFile) -> Summary:
    """Read the summary; ArtifactError when manifest, recipe, report or configuration is missing or damaged."""
    manifest = parse_manifest(_needed(name, read, MANIFEST), f"{MANIFEST} of {name}")
    stored = read(REPORT)
    report, serving = (None, None) if stored is None else parse_report(stored, f"{REPORT} of {name}")
    speed = None if stored is None else parse_speed(stored, f"{REPORT} of {name}")
    try:
        recipe = parse_recipe(_needed(name, read, RECIPE).decode(), f"{RECIPE} of {name}")
        config = json.loads(_needed(name, read, "config.json"))
        parts = _parts(manifest, config, recipe)
    except RecipeError as error:
        raise ArtifactError(error.message, "export it again") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, re.error) as error:
        raise ArtifactError(f"{name}: its config.json or recipe is damaged ({error})", "export it again") from None
    return Summary(name, manifest, report, recipe, parts, serving, speed)


def _needed(name: str, read: ReadFile, file: str) -> bytes:
    content = read(file)
    if content is None:
        raise ArtifactError(f"{name} has no {file}: it is not an mmq artifact", "`mmq export` writes an artifact")
    return content


def _parts(manifest: Manifest, config: Mapping[str, Any], recipe: Recipe) -> tuple[SchemeGroup, ...]:
    """Count the quantized linears by component and scheme, in the order of the data through the model."""
    family = FAMILIES[manifest.family].of(config)
    groups = described_groups(manifest.format, config, "the artifact")
    counts: dict[tuple[str, Scheme | None, bool], int] = {}
    for module in {**manifest.linears, **manifest.errors}:
        packed = module in manifest.linears
        name = family.runtime_name(module)
        schemes = (g.scheme for g in groups if any(matches(target, name) for target in g.targets))
        key = (component_of(module, manifest.family), next(schemes, None) if packed else None, packed)
        counts[key] = counts.get(key, 0) + 1
    order = [component.name for component in family.components]
    parts = []
    for (component, scheme, packed), count in sorted(counts.items(), key=lambda item: order.index(item[0][0])):
        rules = [rule for rule in recipe.quantize if rule.component == component and rule.bits != 16]
        bits = scheme.bits if scheme else max((rule.bits for rule in rules), default=16)
        methods = {rule.method for rule in rules if rule.bits == bits}
        label = scheme.label() if scheme else f"W{bits}, stored dequantized in 16 bits"
        kernels = serving_kernels(scheme, manifest.format).label() if scheme else ""
        parts.append(SchemeGroup(component, label, bits, tuple(sorted(methods)), count, packed, kernels))
    return tuple(parts)


def component_of(module: str, family: str) -> str:
    """Name of the component of a linear; ArtifactError when no component has it."""
    component = FAMILIES[family].component_with(module)
    if component is None:
        raise ArtifactError(f"the manifest names {module}, which is in no component of {family}", "export it again")
    return component.name
