"""What an artifact says of itself, from its small files alone: in a folder or in a repository of the hub.

Read tolerantly, because an older mmq may have written it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from exporter.artifact import REPORT
from exporter.errors import ArtifactError
from exporter.families import FAMILIES
from exporter.fields import RECIPE_FIELDS, require, require_report, require_serving
from exporter.formats import read_groups
from exporter.hub import PREFIX, open_remote, split
from exporter.manifest import MANIFEST, Manifest, parse_manifest
from exporter.quantized import Scheme
from exporter.runtime.serve_lint import matches

Read = Callable[[str], bytes | None]  # a file's bytes by name, None when it is not there


@dataclass(frozen=True)
class Part:
    """The linears of one component that share a scheme. packed: stored as integers, else only rounded in value."""

    component: str
    scheme: str
    bits: int
    methods: tuple[str, ...]
    linears: int
    packed: bool


@dataclass(frozen=True)
class Facts:
    """One artifact. report: None when it was never evaluated. serving: what `mmq check` found, None before it ran."""

    name: str
    manifest: Manifest
    report: Mapping[str, Any] | None
    recipe: Mapping[str, Any]
    parts: tuple[Part, ...]
    serving: Mapping[str, Any] | None = None

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
        """The model whose scores the report calls full precision, when it is not the artifact's source; else empty.

        The report names it and the digest of its weights; the manifest has the digest of the source.
        """
        evaluation = _mapping((self.report or {}).get("evaluation"))
        baseline, source = _mapping(evaluation.get("baseline")), self.manifest.source
        weights = _mapping(_mapping(evaluation.get("models")).get("full precision")).get("weights")
        if baseline.get("is_source", True) is True and (source.digest is None or weights in (None, source.digest)):
            return ""
        name = "".join(letter for letter in str(baseline.get("model", "unknown")) if letter.isprintable())
        return f"{name}, not {source.model}"

    def metrics(self) -> dict[str, tuple[float, float]]:
        """`task metric` -> full precision, artifact; empty without a report."""
        measures = (self.report or {}).get("measures", [])
        return {f"{m['task']} {m['metric']}": (m["difference"]["before"], m["difference"]["after"]) for m in measures}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def read_place(place: str) -> Facts:
    """The facts of an artifact in a folder, or of `hub:ORG/NAME[@REVISION]` (a few small files are fetched)."""
    if place.startswith(PREFIX):
        remote = open_remote(*split(place))
        return read_facts(remote.name, remote.read)
    folder = Path(place).expanduser()
    if not folder.is_dir():
        raise ArtifactError(f"no folder {place}", f"give an artifact's folder, or {PREFIX}ORG/NAME")
    return read_facts(folder.resolve().name, folder_reader(folder))


def folder_reader(folder: Path) -> Read:
    """Files of a folder by name."""
    return lambda name: (folder / name).read_bytes() if (folder / name).is_file() else None


def read_facts(name: str, read: Read) -> Facts:
    """ArtifactError when manifest, recipe or configuration are missing or damaged."""
    manifest = parse_manifest(_needed(name, read, MANIFEST), f"{MANIFEST} of {name}")
    try:
        config = json.loads(_needed(name, read, "config.json"))
        recipe = yaml.safe_load(_needed(name, read, "recipe.yaml"))
        stored = read(REPORT)
        report = json.loads(stored) if stored is not None else None
        require(recipe, RECIPE_FIELDS, "recipe.yaml")
        serving = require_serving(report) if stored is not None else None
        if serving is not None and report is not None and set(report) == {"serving"}:
            report = None  # checked, and never evaluated
        if report is not None:
            require_report(report)
        parts = _parts(manifest, config, recipe)
    except (ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ArtifactError(f"{name}: its recipe or report is damaged ({error})", "export it again") from None
    return Facts(name, manifest, report, recipe, parts, serving)


def _needed(name: str, read: Read, file: str) -> bytes:
    found = read(file)
    if found is None:
        raise ArtifactError(f"{name} has no {file}: not an artifact of mmq", "`mmq export` writes one")
    return found


def _parts(manifest: Manifest, config: Mapping[str, Any], recipe: Mapping[str, Any]) -> tuple[Part, ...]:
    """Count the quantized linears by component and scheme, in the order of the data through the model."""
    family = FAMILIES[manifest.family]
    groups = read_groups(manifest.format, config)
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
        rules = [rule for rule in recipe["quantize"] if rule["component"] == component and rule["bits"] != 16]
        bits = scheme.bits if scheme else max((rule["bits"] for rule in rules), default=16)
        methods = {rule.get("method", "rtn") for rule in rules if rule["bits"] == bits}
        label = scheme.label() if scheme else f"W{bits} in value, stored in 16 bits"
        parts.append(Part(component, label, bits, tuple(sorted(methods)), count, packed))
    return tuple(parts)


def component_of(module: str, family: str) -> str:
    """The name of the component that a linear belongs to (ArtifactError when it is in none)."""
    component = FAMILIES[family].component_of(module)
    if component is None:
        raise ArtifactError(f"the manifest names {module}, which is in no component of {family}", "export it again")
    return component.name
