"""Recipe + family + checkpoint headers + device -> an explicit decision for every tensor, in seconds.

Every mistake a user can make in choosing is found here, before the first tensor is read.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from exporter.device import Device
from exporter.errors import PlanError
from exporter.formats import FORMATS
from exporter.methods import METHODS, SMOOTHERS
from exporter.model.checkpoint import Checkpoint
from exporter.model.config_check import refuse_misfit
from exporter.model.families import Family
from exporter.planning.decisions import PlanRow, decide, stored_scale_dtype
from exporter.planning.memory import Memory, predict_memory
from exporter.planning.recipe import Recipe
from exporter.planning.steps import Step, predict_steps
from exporter.planning.vllm_kernels import serving
from exporter.planning.vllm_rules import Linear, cache_problems, lint

__all__ = ["Plan", "PlanRow", "Unit", "engine_linears", "make_plan", "stored_scale_dtype"]


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
    """What will be done. rows: one for every tensor of the checkpoint, in header order. steps: what each takes."""

    recipe: Recipe
    family: Family
    origin: str
    rows: tuple[PlanRow, ...]
    units: tuple[Unit, ...]
    memory: Memory
    steps: tuple[Step, ...]
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
    refuse_misfit(checkpoint, family)
    rows, used, problems = decide(recipe, checkpoint, family)
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
    chosen = [(row.component, row.rule.method) for row in rows if row.rule]
    statistics = dict(sorted((name, m in SMOOTHERS) for name, m in chosen if METHODS[m].Statistics))  # True comes last
    planned = {name for name, _ in chosen}
    memory = predict_memory(checkpoint, family, recipe.calibration, planned, statistics, device)
    steps = predict_steps(recipe, checkpoint, family, rows, memory, device)
    warnings = (*_of_source(checkpoint), *_warnings(recipe, family, rows))
    return Plan(recipe, family, checkpoint.origin, tuple(rows), units, memory, steps, warnings)


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


def _of_source(checkpoint: Checkpoint) -> list[str]:
    """What the plan says of stored tensors that it leaves out, and of an adapter that it merges."""
    names = checkpoint.ignored
    rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
    left = [f"left out of the artifact: {names[0]}{rest}, which models compute from the config"] if names else []
    return left + ([checkpoint.adapter.note()] if checkpoint.adapter else [])


def _warnings(recipe: Recipe, family: Family, rows: list[PlanRow]) -> tuple[str, ...]:
    found = [family.unserved] if family.unserved else []
    if recipe.calibration.data == ("drawings",):
        found.append("built-in drawings calibrate it and judge its answers, not its captions: pass --data for your own")
    schemes = {(row.component, row.scheme) for row in rows if row.decision == "packed" and row.scheme}
    for component, scheme in sorted(schemes, key=str):
        if scheme and not family.unserved and (needs := serving(scheme, recipe.format).needs()):
            found.append(f"{component} {scheme.label()}: {needs} to be served")
    return tuple(found)
