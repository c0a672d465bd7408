"""Compare an artifact with the plan that its recipe makes for a model of the same shapes."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from exporter.artifact.artifact import CACHE_SCALES, Artifact, size_record
from exporter.artifact.artifact_config import artifact_config
from exporter.device import choose
from exporter.errors import ArtifactError, MmqError
from exporter.formats import FORMATS
from exporter.model.checkpoint import Checkpoint, TensorInfo
from exporter.numerics.quantized import Scheme
from exporter.planning.plan import Plan, make_plan
from exporter.planning.prompts import prompts_by_task
from exporter.publishing.artifact_summary import Summary
from exporter.publishing.proof.files import cache_problems
from exporter.publishing.proof.source import source_problems


def plan_problems(summary: Summary, artifact: Artifact) -> list[str]:
    """One line per difference between the artifact and the plan of its recipe; empty when they agree."""
    recipe, manifest = summary.recipe, summary.manifest
    if recipe.digest() != manifest.recipe.sha256:
        return ["recipe.yaml is not the recipe of the export: its digest differs from the manifest's"]
    try:
        plan = make_plan(recipe, source_headers(artifact), artifact.family, choose("cpu"))
        schemes = {module: artifact.scheme_of(module) for module in manifest.linears}
    except MmqError as error:
        return [f"the artifact does not fit its recipe: {error.message}"]
    problems = [*_of_linears(plan, summary, schemes), *_of_config(plan, artifact), *_of_calibration(plan, summary)]
    problems += [*cache_problems(plan, artifact), *source_problems(plan, summary, artifact)]
    recorded = {task: record.model_dump() for task, record in manifest.prompts.items()}
    if recorded and recorded != prompts_by_task(plan.family):
        problems.append("the manifest and recipe.yaml have different prompts")
    if recipe.name != manifest.recipe.name:
        problems.append("the manifest and recipe.yaml have different recipe names")
    if not problems:
        problems += _of_sizes(plan, summary, artifact)
    return problems


def source_headers(artifact: Artifact) -> Checkpoint:
    """Reconstruct the headers of the full-precision model: every packed linear becomes a 16-bit matrix.

    ArtifactError when the manifest names a linear that the model does not have.
    """
    stored, config = artifact.checkpoint.tensors, artifact.source_config()
    shapes: Mapping[str, Any] = artifact.family.shapes(artifact.family.read(config)[0])
    tensors = {name: stored[name] for name in artifact.names() if name in stored}
    for module in artifact.manifest.linears:
        name = f"{module}.weight"
        if name not in shapes:
            raise ArtifactError(f"the manifest names {module}, which is not a linear of the model")
        names = FORMATS[artifact.manifest.format].tensor_names(module, artifact.scheme_of(module))
        packed = [stored[part] for part in names if part in stored]
        scale = next((info for info in packed if info.dtype.is_floating_point and info.dtype.itemsize == 2), None)
        if scale is None:
            raise ArtifactError(f"{module} has no 16-bit scales")
        tensors[name] = TensorInfo(name, name, scale.dtype, tuple(shapes[name]), scale.file)
    return Checkpoint(artifact.checkpoint.folder, config, tensors, artifact.checkpoint.origin)


def _of_linears(plan: Plan, summary: Summary, schemes: Mapping[str, Scheme]) -> Iterator[str]:
    """Differences in the packed linears, their schemes, the quantized linears and the blocks."""
    planned = {row.module: _stored(row.scheme) for row in plan.rows if row.decision == "packed" and row.scheme}
    quantized = {row.module for unit in plan.units for row in unit.rows}
    if planned.keys() != schemes.keys():
        name = min(planned.keys() ^ schemes.keys())
        yield f"the recipe packs {len(planned)} linears, the manifest names {len(schemes)}: {name} is in one of the two"
    other = [name for name in planned.keys() & schemes.keys() if planned[name] != schemes[name]]
    if other:
        name = min(other)
        yield f"config.json has scheme {schemes[name].label()} for {name}, the recipe has {planned[name].label()}"
    if quantized != summary.manifest.errors.keys():
        yield "the linears in the manifest's errors differ from the linears that the recipe quantizes"
    if summary.manifest.units != tuple(unit.block for unit in plan.units):
        yield "the manifest's units differ from the blocks that the recipe quantizes"


def _stored(scheme: Scheme) -> Scheme:
    """A scheme as formats store it: they store one scale per tensor as equal scales of all rows."""
    return replace(scheme, group_size="row") if scheme.group_size == "tensor" else scheme


def _of_config(plan: Plan, artifact: Artifact) -> Iterator[str]:
    """Differences between config.json and the one that the plan writes, apart from the order of lists."""
    expected = _unordered(artifact_config(plan, artifact.source_config()))
    stored = _unordered(artifact.checkpoint.config)
    if artifact.manifest.format != "compressed_tensors":  # in other formats the order of groups changes the config
        expected, stored = (dict(config) | {"quantization_config": None} for config in (expected, stored))
    wrong = sorted(key for key in expected.keys() | stored.keys() if expected.get(key) != stored.get(key))
    if wrong:
        yield f"config.json differs from the one that the recipe writes: {', '.join(wrong)}"
    if plan.recipe.format != artifact.manifest.format:
        yield f"the manifest has format {artifact.manifest.format}, the recipe {plan.recipe.format}"
    if plan.recipe.kv_cache != artifact.kv_cache:
        yield "the artifact and recipe.yaml have different number types of the KV cache"


def _unordered(value: Any) -> Any:
    """Plain data with sorted lists and sorted groups of the quantization config, for comparisons without order."""
    if isinstance(value, Mapping):
        if isinstance(value.get("config_groups"), Mapping):
            value = dict(value) | {"config_groups": list(value["config_groups"].values())}
        return {key: _unordered(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return sorted((_unordered(item) for item in value), key=lambda item: json.dumps(item, sort_keys=True))
    return value


def _of_calibration(plan: Plan, summary: Summary) -> Iterator[str]:
    """Differences between the manifest's calibration record and the recipe: need for samples, number, settings."""
    record, recipe = summary.manifest.provenance.calibration, plan.recipe.calibration
    if plan.needs_calibration != bool(record.samples):
        yield (
            "the recipe's methods need calibration samples, but the manifest names none"
            if plan.needs_calibration
            else "the manifest names calibration samples, but no method of the recipe needs them"
        )
    if len(record.samples) > recipe.samples:
        yield f"the manifest names {len(record.samples)} calibration samples, the recipe allows {recipe.samples}"
    if len({sample.id for sample in record.samples}) < len(record.samples) and len(recipe.tasks) == 1:
        yield "the manifest names a calibration sample twice"
    for name in ("seed", "batch", "vision_weight"):
        value = getattr(record, name)
        if value is not None and value != getattr(recipe, name):
            yield f"the manifest has calibration {name} {value}, the recipe {getattr(recipe, name)}"


def _of_sizes(plan: Plan, summary: Summary, artifact: Artifact) -> Iterator[str]:
    """Differences in bytes before and after, and in bits per weight."""
    manifest = summary.manifest
    tensors = artifact.checkpoint.tensors.values()
    stored = sum(info.bytes for info in tensors if not info.name.endswith(CACHE_SCALES))
    if not manifest.bytes.after == plan.bytes_after == stored:
        yield f"the manifest counts {manifest.bytes.after:,} bytes of tensors, the artifact has {stored:,}"
    if manifest.bytes.components and manifest.bytes.components != size_record(plan).components:
        yield "the manifest's bytes of the components differ from the plan's"
    if manifest.bytes.before != plan.bytes_before:
        yield f"the manifest counts {manifest.bytes.before:,} bytes of source tensors, the plan {plan.bytes_before:,}"
    if not math.isclose(manifest.bits_per_weight, plan.bits_per_weight, rel_tol=1e-9):
        yield f"the manifest has {manifest.bits_per_weight:.4f} bits per weight, the plan {plan.bits_per_weight:.4f}"
