"""Recipe + family + checkpoint headers + device -> an explicit decision for every tensor, in seconds.

Every mistake a user can make in choosing is found here, before the first tensor is read.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from exporter.checkpoint import Checkpoint, TensorInfo
from exporter.device import Device
from exporter.errors import PlanError
from exporter.families import Component, Family
from exporter.formats import FORMATS
from exporter.memory import Memory, predict_memory
from exporter.methods import METHODS
from exporter.quantized import Scheme
from exporter.recipe import Recipe, Rule
from exporter.runtime.kernels import serving
from exporter.runtime.serve_lint import Linear, cache_problems, lint

LISTED = 5  # problems of one kind that are written out
Decision = Literal["packed", "dequantized", "kept"]


@dataclass(frozen=True)
class PlanRow:
    """One tensor of the checkpoint and what becomes of it.

    component: the part of the model it belongs to ("" for embeddings, norms of the whole model, heads).
    block: checkpoint prefix of its block. reason: why it is kept. bytes_after: what it takes in the artifact.
    """

    tensor: TensorInfo
    decision: Decision
    reason: str = ""
    component: str = ""
    block: str = ""
    linear: str = ""
    rule: Rule | None = None
    bytes_after: int = 0

    @property
    def scheme(self) -> Scheme | None:
        """How it is quantized, None when kept."""
        return self.rule.scheme() if self.rule else None

    @property
    def module(self) -> str:
        """Checkpoint name of the linear, without `.weight`."""
        return self.tensor.name.removesuffix(".weight")


@dataclass(frozen=True)
class Unit:
    """One block's worth of work: quantized together, stored in one file."""

    index: int
    component: str
    block: str
    rows: tuple[PlanRow, ...]

    @property
    def file(self) -> str:
        """Name of its file in the work folder."""
        return f"{self.index:03d}-{self.block}.safetensors"

    @property
    def needs_statistics(self) -> bool:
        """Whether a method in it wants calibration data."""
        return any(row.rule and METHODS[row.rule.method].Statistics is not None for row in self.rows)


@dataclass(frozen=True)
class Plan:
    """What will be done. rows: one for every tensor of the checkpoint, in header order."""

    recipe: Recipe
    family: Family
    origin: str
    rows: tuple[PlanRow, ...]
    units: tuple[Unit, ...]
    memory: Memory
    warnings: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Parameters of the whole checkpoint."""
        return sum(row.tensor.size for row in self.rows)

    @property
    def bytes_before(self) -> int:
        """Bytes of tensors in the source."""
        return sum(row.tensor.bytes for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of tensors in the artifact, scales and zero points counted."""
        return sum(row.bytes_after for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Artifact bits over all parameters, kept tensors and scales counted."""
        return 8 * self.bytes_after / self.parameters

    @property
    def needs_calibration(self) -> bool:
        """Whether any unit wants calibration data."""
        return any(unit.needs_statistics for unit in self.units)

    def of(self, component: str) -> tuple[PlanRow, ...]:
        """The rows of one component."""
        return tuple(row for row in self.rows if row.component == component)


def make_plan(recipe: Recipe, checkpoint: Checkpoint, family: Family, device: Device) -> Plan:
    """Decide every tensor; PlanError lists all problems at once."""
    if family.name != recipe.model.family:
        raise PlanError(
            f"recipe '{recipe.name}' is for family {recipe.model.family}, the model is {family.name}",
            "`mmq recipes` lists the recipes of each family",
        )
    refused = family.refuses(checkpoint.config)
    if refused:
        raise PlanError(f"{checkpoint.origin}: {refused}", "see docs/families.md for the models that mmq takes")
    if "quantization_config" in checkpoint.config:
        raise PlanError(f"{checkpoint.origin} is quantized already", "start from the full-precision model")
    rows, used, problems = _decide(recipe, checkpoint, family)
    problems += [
        f"quantize[{i}] ({rule.component}, bits {rule.bits}) matches no linear: earlier rules or its filters leave none"
        for i, rule in enumerate(recipe.quantize)
        if i not in used
    ]
    problems += [] if family.unserved else lint(engine_linears(rows, family), recipe.format)
    together = FORMATS[recipe.format].conflict([row.scheme for row in rows if row.decision == "packed" and row.scheme])
    problems += [f"format {recipe.format}: {together}"] if together else []
    packed = any(row.decision == "packed" for row in rows)
    problems += cache_problems(recipe.kv_cache, recipe.format, FORMATS[recipe.format].KV_CACHES, packed)
    if problems:
        lines = "\n".join(f"  {problem}" for problem in sorted(set(problems), key=problems.index))
        raise PlanError(f"recipe '{recipe.name}' does not fit {checkpoint.origin}:\n{lines}", "see `mmq plan --help`")
    units = _units(rows, family, checkpoint)
    chosen = [(row.component, METHODS[row.rule.method]) for row in rows if row.rule]
    statistics = dict(sorted((name, method.SMOOTHS) for name, method in chosen if method.Statistics))  # True comes last
    planned = {name for name, _ in chosen}
    memory = predict_memory(checkpoint, family, recipe.calibration, planned, statistics, device)
    warnings = _warnings(recipe, family, rows, memory, device)
    return Plan(recipe, family, checkpoint.origin, tuple(rows), units, memory, warnings)


def _decide(recipe: Recipe, checkpoint: Checkpoint, family: Family) -> tuple[list[PlanRow], set[int], list[str]]:
    """A row for every tensor, the indices of the rules that matched something, and what is wrong."""
    problems: list[str] = []
    places = _places(checkpoint, family, problems)
    rows, used = [], set()
    for tensor in checkpoint.tensors.values():
        module = tensor.name.removesuffix(".weight")
        place = places.get(module) if tensor.name.endswith(".weight") else None
        if place is None:
            reason = family.reason_kept(module) or _reason_not_linear(tensor, family, checkpoint.config)
            rows.append(PlanRow(tensor, "kept", reason, _component_of(tensor.name, family), bytes_after=tensor.bytes))
            continue
        component, index, linear = place
        number, rule = _first_match(recipe, component, index, linear, checkpoint.config)
        if number is not None:
            used.add(number)
        rows.append(_linear_row(tensor, component, index, linear, rule, recipe.format, problems))
    return rows, used, problems


def _places(checkpoint: Checkpoint, family: Family, problems: list[str]) -> dict[str, tuple[Component, int, str]]:
    """Module -> (component, block index, relative name) of every linear that runs; all must be in the header."""
    places = {}
    wrong = []
    for component in family.components:
        for i in range(component.used(checkpoint.config)):
            for linear in component.linears_of(checkpoint.config, i):
                module = component.module(i, linear)
                info = checkpoint.tensors.get(f"{module}.weight")
                if info is None or len(info.shape) != 2 or not info.dtype.is_floating_point or info.dtype.itemsize == 1:
                    found = f"{info.dtype} {list(info.shape)}" if info else "nothing"
                    wrong.append(f"{module}.weight: expected a 16 or 32 bit matrix, the checkpoint has {found}")
                places[module] = (component, i, linear)
    problems += wrong[:LISTED]
    if len(wrong) > LISTED:
        problems.append(f"and {len(wrong) - LISTED} more of the same kind")
    return places


def _first_match(
    recipe: Recipe, component: Component, index: int, linear: str, config: Any
) -> tuple[int | None, Rule | None]:
    for number, rule in enumerate(recipe.quantize):
        role_fits = rule.role is None or rule.role == component.roles[linear]
        if rule.component == component.name and role_fits and rule.matches_block(index, component.used(config)):
            return number, rule
    return None, None


def _linear_row(
    tensor: TensorInfo,
    component: Component,
    index: int,
    linear: str,
    rule: Rule | None,
    format_name: str,
    problems: list[str],
) -> PlanRow:
    row = PlanRow(tensor, "kept", "", component.name, component.block(index), linear, bytes_after=tensor.bytes)
    if rule is None or rule.bits == 16 or len(tensor.shape) != 2:
        return replace(row, reason="the recipe keeps it at 16 bits" if rule else "no rule of the recipe names it")
    if component.without_data and METHODS[rule.method].Statistics:
        problems.append(f"component '{component.name}', method {rule.method}: {component.without_data}")
    if rule.store == "dequantized":
        size = tensor.size * stored_scale_dtype(tensor.dtype).itemsize
        reason = f"values of few bits, stored in 16: {component.unpackable or 'the recipe asks for it'}"
        return replace(row, decision="dequantized", reason=reason, rule=rule, bytes_after=size)
    scheme = rule.scheme()
    assert scheme is not None
    if component.unpackable and rule.store != "plugin":
        ways = "remove the rule, or add `store: dequantized`, or `store: plugin` for a vLLM with mmq's plugin"
        problems.append(f"component '{component.name}': {component.unpackable}; {ways}")
    if rule.store == "plugin" and not component.unpackable:
        problems.append(f"component '{component.name}' needs no plugin to be served: leave out `store: plugin`")
    if component.formats and format_name not in component.formats:
        usable = ", ".join(component.formats)
        problems.append(
            f"component '{component.name}': vLLM loads it packed only in format {usable}, not {format_name}"
        )
    refused = FORMATS[format_name].supports(scheme, tensor.shape[1], tensor.shape[0])
    if refused:
        problems.append(f"component '{component.name}', {linear} {list(tensor.shape)}: format {format_name}: {refused}")
        return replace(row, decision="packed", rule=rule)
    scale_bytes = stored_scale_dtype(tensor.dtype).itemsize
    size = FORMATS[format_name].stored_bytes(scheme, tensor.shape[1], tensor.shape[0], scale_bytes)
    return replace(row, decision="packed", rule=rule, bytes_after=size)


def stored_scale_dtype(weight: torch.dtype) -> torch.dtype:
    """Scales are stored in the checkpoint's 16-bit dtype (float32 checkpoints get bfloat16 scales)."""
    return weight if weight.itemsize == 2 else torch.bfloat16


def _reason_not_linear(tensor: TensorInfo, family: Family, config: Any) -> str:
    for component in family.components:
        for i in range(component.used(config), component.stored(config)):
            if tensor.name.startswith(component.block(i) + "."):
                return component.unused
    if tensor.name.endswith(".bias"):
        return "bias"
    if "embed" in tensor.name:
        return "embedding: no configuration makes vLLM load it packed"
    return "norm" if len(tensor.shape) == 1 else "not a linear that mmq quantizes"


def _component_of(name: str, family: Family) -> str:
    """The component whose blocks `name` lies in, also for its norms and biases."""
    for component in family.components:
        if name.startswith(component.blocks.partition("{i}")[0].rstrip(".") + "."):
            return component.name
    return ""


def engine_linears(rows: Iterable[PlanRow], family: Family) -> list[Linear]:
    """The planned linears as the serving engine sees them."""
    found = [(row, row.scheme if row.decision == "packed" else None) for row in rows if row.linear]
    return [
        Linear(family.runtime_name(row.module), family.engine_name(row.module), row.tensor.shape, scheme)
        for row, scheme in found
    ]


def _units(rows: list[PlanRow], family: Family, checkpoint: Checkpoint) -> tuple[Unit, ...]:
    """Blocks with something to quantize, in data order (a header may list its tensors in any order)."""
    blocks: dict[str, dict[str, PlanRow]] = {}
    for row in rows:
        if row.decision != "kept":
            blocks.setdefault(row.block, {})[row.linear] = row
    units: list[Unit] = []
    for component in family.components:
        for i in range(component.used(checkpoint.config)):
            found = blocks.get(component.block(i))
            if found:
                ordered = tuple(found[linear] for linear in component.linears if linear in found)
                units.append(Unit(len(units), component.name, component.block(i), ordered))
    return tuple(units)


def _warnings(recipe: Recipe, family: Family, rows: list[PlanRow], memory: Memory, device: Device) -> tuple[str, ...]:
    found = [family.unserved] if family.unserved else []
    if recipe.calibration.data == ("drawings",):
        found.append("built-in drawings calibrate it and judge its answers, not its captions: pass --data for your own")
    schemes = {(row.component, row.scheme) for row in rows if row.decision == "packed" and row.scheme}
    for component, scheme in sorted(schemes, key=str):
        if scheme and not family.unserved and (needs := serving(scheme, recipe.format).needs()):
            found.append(f"{component} {scheme.label()}: {needs} to be served")
    if memory.device_bytes > device.free_bytes:
        found.append(f"{device.name} has {device.free_bytes / 2**30:.1f} GiB free, {memory.advice()}")
    return tuple(found)
