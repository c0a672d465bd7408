"""An artifact beside the plan that its own recipe makes for a model of its shapes."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from exporter.artifact.artifact import CACHE_SCALES, Artifact
from exporter.artifact.artifact_config import artifact_config
from exporter.device import choose
from exporter.errors import ArtifactError, MmqError
from exporter.formats import FORMATS
from exporter.model.checkpoint import Checkpoint, TensorInfo
from exporter.numerics.quantized import Scheme
from exporter.planning.plan import Plan, make_plan
from exporter.publishing.artifact_summary import Summary


def against_plan(summary: Summary, artifact: Artifact) -> list[str]:
    """Everything in which the artifact is not what its recipe makes; empty when it is that."""
    recipe, manifest = summary.recipe, summary.manifest
    if recipe.digest() != manifest.recipe.sha256:
        return ["recipe.yaml is not the recipe that made it: its digest is not the manifest's"]
    try:
        plan = make_plan(recipe, source_headers(artifact), artifact.family, choose("cpu"))
        schemes = {module: artifact.scheme_of(module) for module in manifest.linears}
    except MmqError as error:
        return [f"it does not fit its own recipe: {error.message}"]
    problems = [*_of_linears(plan, summary, schemes), *_of_config(plan, artifact), *_of_calibration(plan, summary)]
    if recipe.name != manifest.recipe.name:
        problems.append("the manifest and recipe.yaml have different names of the recipe")
    if not problems:
        problems += _of_sizes(plan, summary, artifact)
    return problems


def source_headers(artifact: Artifact) -> Checkpoint:
    """The full-precision model as its headers were: every packed linear is a 16-bit matrix again.

    ArtifactError when the manifest names a linear that the model does not have.
    """
    stored, config = artifact.checkpoint.tensors, artifact.source_config()
    shapes: Mapping[str, Any] = artifact.family.shapes(artifact.family.read(config)[0])
    tensors = {name: stored[name] for name in artifact.names() if name in stored}
    for module in artifact.manifest.linears:
        name = f"{module}.weight"
        if name not in shapes:
            raise ArtifactError(f"the manifest names {module}, which is no linear of the model")
        names = FORMATS[artifact.manifest.format].tensor_names(module, artifact.scheme_of(module))
        packed = [stored[part] for part in names if part in stored]
        scale = next((info for info in packed if info.dtype.is_floating_point and info.dtype.itemsize == 2), None)
        if scale is None:
            raise ArtifactError(f"{module} has no scales of 16 bits")
        tensors[name] = TensorInfo(name, name, scale.dtype, tuple(shapes[name]), scale.file)
    return Checkpoint(artifact.checkpoint.folder, config, tensors, artifact.checkpoint.origin)


def _of_linears(plan: Plan, summary: Summary, schemes: Mapping[str, Scheme]) -> Iterator[str]:
    """Which linears are packed, and how; which are quantized at all, and in which blocks."""
    planned = {row.module: _stored(row.scheme) for row in plan.rows if row.decision == "packed" and row.scheme}
    quantized = {row.module for unit in plan.units for row in unit.rows}
    if planned.keys() != schemes.keys():
        name = min(planned.keys() ^ schemes.keys())
        yield f"its recipe packs {len(planned)} linears, its manifest names {len(schemes)}: {name} is in one of them"
    other = [name for name in planned.keys() & schemes.keys() if planned[name] != schemes[name]]
    if other:
        name = min(other)
        yield f"config.json gives {name} the scheme {schemes[name].label()}, its recipe {planned[name].label()}"
    if quantized != summary.manifest.errors.keys():
        yield "the manifest's errors are not those of the linears that the recipe quantizes"
    if summary.manifest.units != tuple(unit.block for unit in plan.units):
        yield "the manifest's units are not the blocks that the recipe quantizes"


def _stored(scheme: Scheme) -> Scheme:
    """A scheme as formats store it: one scale a tensor is kept as equal scales of its rows."""
    return replace(scheme, group_size="row") if scheme.group_size == "tensor" else scheme


def _of_config(plan: Plan, artifact: Artifact) -> Iterator[str]:
    """config.json must be what the plan writes, apart from the order of its lists."""
    expected = _unordered(artifact_config(plan, artifact.source_config()))
    found = _unordered(artifact.checkpoint.config)
    if artifact.manifest.format != "compressed_tensors":  # the order of groups decides how other formats name them
        expected, found = (dict(config) | {"quantization_config": None} for config in (expected, found))
    wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if wrong:
        yield f"config.json is not what its recipe writes: {', '.join(wrong)}"
    if plan.recipe.format != artifact.manifest.format:
        yield f"the manifest has format {artifact.manifest.format}, its recipe {plan.recipe.format}"
    if plan.recipe.kv_cache != artifact.kv_cache:
        yield "config.json and recipe.yaml differ about the keys and values that an engine keeps"


def _unordered(value: Any) -> Any:
    """Plain data in which lists, and the numbered groups of a quantization config, have no order."""
    if isinstance(value, Mapping):
        if isinstance(value.get("config_groups"), Mapping):
            value = dict(value) | {"config_groups": list(value["config_groups"].values())}
        return {key: _unordered(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return sorted((_unordered(item) for item in value), key=lambda item: json.dumps(item, sort_keys=True))
    return value


def _of_calibration(plan: Plan, summary: Summary) -> Iterator[str]:
    """Samples where a method needs them, and no more than the recipe asks for; the recipe's settings."""
    kept, recipe = summary.manifest.provenance.calibration, plan.recipe.calibration
    if plan.needs_calibration != bool(kept.samples):
        yield (
            "its methods look at calibration samples, and the manifest names none"
            if plan.needs_calibration
            else "the manifest names calibration samples, and no method of its recipe looks at any"
        )
    if len(kept.samples) > recipe.samples:
        yield f"the manifest names {len(kept.samples)} calibration samples, its recipe asks for {recipe.samples}"
    if len({sample.id for sample in kept.samples}) < len(kept.samples) and len(recipe.tasks) == 1:
        yield "the manifest names a calibration sample twice"
    for name in ("seed", "batch", "vision_weight"):
        value = getattr(kept, name)
        if value is not None and value != getattr(recipe, name):
            yield f"the manifest has calibration {name} {value}, its recipe {getattr(recipe, name)}"


def _of_sizes(plan: Plan, summary: Summary, artifact: Artifact) -> Iterator[str]:
    """Bytes before and after, and bits a weight."""
    manifest = summary.manifest
    tensors = artifact.checkpoint.tensors.values()
    held = sum(info.bytes for info in tensors if not info.name.endswith(CACHE_SCALES))
    if not manifest.bytes.after == plan.bytes_after == held:
        yield f"the manifest counts {manifest.bytes.after:,} bytes of tensors, the artifact holds {held:,}"
    if manifest.bytes.before != plan.bytes_before:
        yield f"the manifest counts {manifest.bytes.before:,} bytes of source tensors, which take {plan.bytes_before:,}"
    if not math.isclose(manifest.bits_per_weight, plan.bits_per_weight, rel_tol=1e-9):
        yield f"the manifest has {manifest.bits_per_weight:.4f} bits a weight, and {plan.bits_per_weight:.4f} follow"
