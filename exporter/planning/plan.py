"""The `Plan`: a decision for every tensor with units of work, predicted memory and steps. `make_plan` computes it.

It takes seconds and reads only tensor headers. PlanError reports every problem of the recipe before a tensor is read.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from exporter.device import Device
from exporter.errors import PlanError
from exporter.formats import FORMATS
from exporter.model.checkpoint import Checkpoint
from exporter.model.config_check import refuse_misfit
from exporter.model.families import Component, Family
from exporter.planning.decisions import PlanRow, decide, stored_scale_dtype
from exporter.planning.fitting_recipes import fitting_hint
from exporter.planning.memory import Memory, predict_memory
from exporter.planning.prompts import by_recipe, prompt_problems
from exporter.planning.recipe import Recipe
from exporter.planning.steps import Step, predict_steps
from exporter.planning.vllm_kernels import serving_kernels
from exporter.planning.vllm_rules import Linear, cache_problems, head_size, lint

__all__ = ["Plan", "PlanRow", "Unit", "engine_linears", "make_plan", "stored_scale_dtype"]


@dataclass(frozen=True)
class Unit:
    """The linears of one block that are quantized together and stored in one file."""

    index: int
    component: str
    block: str
    rows: tuple[PlanRow, ...]

    @property
    def file(self) -> str:
        """Name of the unit's file in the work folder."""
        return f"{self.index:03d}-{self.block}.safetensors"

    @property
    def needs_statistics(self) -> bool:
        """Whether a method of the unit needs calibration data."""
        return any(row.rule and row.rule.needs_data for row in self.rows)


@dataclass(frozen=True)
class Plan:
    """The plan of an export.

    family: with the recipe's prompts. rows: one per checkpoint tensor, in header order. steps: predicted memory and
    seconds. fallbacks: lines about the linears that a rule's `else` applies to; they are among the warnings.
    head_size: width of an attention head of the language model; None if config.json leaves it to a default.
    """

    recipe: Recipe
    family: Family
    origin: str
    rows: tuple[PlanRow, ...]
    units: tuple[Unit, ...]
    memory: Memory
    steps: tuple[Step, ...]
    warnings: tuple[str, ...]
    fallbacks: tuple[str, ...] = ()
    head_size: int | None = None

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole checkpoint."""
        return sum(row.tensor.size for row in self.rows)

    @property
    def bytes_before(self) -> int:
        """Bytes of the source's tensors."""
        return sum(row.tensor.bytes for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of the artifact's tensors, including scales and zero points."""
        return sum(row.bytes_after for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the artifact's tensors per parameter, including kept tensors and scales."""
        return 8 * self.bytes_after / self.parameters

    @property
    def needs_calibration(self) -> bool:
        """Whether any unit needs calibration data."""
        return any(unit.needs_statistics for unit in self.units)

    def of(self, component: str) -> tuple[PlanRow, ...]:
        """The rows of one component."""
        return tuple(row for row in self.rows if row.component == component)


def _absence(part: Component, config: Mapping[str, Any]) -> str:
    """Why a rule for a component matches none of its linears."""
    if not part.stored(config):
        tied = ", because the output head shares the embedding's tensor" if part.name == "head" else ""
        return f"the model stores none of its linears{tied}"
    return "earlier rules or its filters exclude it" if part.used(config) else part.unused


def _refuse_other_family(recipe: Recipe, family: Family) -> None:
    if recipe.model.family not in (None, family.name):
        raise PlanError(
            f"recipe '{recipe.name}' is for family {recipe.model.family}, but the model's family is {family.name}",
            "remove `family` from the recipe's model section: the recipe then fits every family with its components; "
            f"{fitting_hint(recipe, family)}",
        )


def make_plan(recipe: Recipe, checkpoint: Checkpoint, family: Family, device: Device) -> Plan:
    """Decide every tensor; PlanError lists all problems."""
    _refuse_other_family(recipe, family)
    refuse_misfit(checkpoint, family)
    foreign = [*recipe.foreign_components(family), *recipe.foreign_tasks(family)]
    problems = [*foreign, *prompt_problems(recipe, family)]
    family = by_recipe(family, recipe)
    decided = decide(recipe, checkpoint, family)
    rows = decided.rows
    problems += decided.problems
    parts = {component.name: component for component in family.components}
    problems += [
        f"quantize[{i}] ({rule.component}, bits {rule.bits}) matches no linear: {_absence(part, checkpoint.config)}"
        for i, rule in enumerate(recipe.quantize)
        if i not in decided.used and (part := parts.get(rule.component))
    ]
    problems += [] if family.unserved else lint(engine_linears(rows, family), recipe.format)
    conflict = FORMATS[recipe.format].conflict([row.scheme for row in rows if row.decision == "packed" and row.scheme])
    problems += [f"format {recipe.format}: {conflict}"] if conflict else []
    packed = any(row.decision == "packed" for row in rows)
    head = head_size(checkpoint.config)
    problems += cache_problems(recipe.kv_cache, recipe.format, FORMATS[recipe.format].KV_CACHES, packed, head)
    if problems:
        lines = "\n".join(f"  {problem}" for problem in sorted(set(problems), key=problems.index))
        hint = fitting_hint(recipe, family) if foreign else "see `mmq plan --help`"
        raise PlanError(f"recipe '{recipe.name}' does not fit {checkpoint.origin}:\n{lines}", hint)
    units = _units(rows, family, checkpoint)
    rules = [(row.component, row.rule) for row in rows if row.rule]
    # Sorting puts True last, so that a component with any smoothing method gets True.
    statistics = dict(sorted((name, rule.smoother is not None) for name, rule in rules if rule.needs_data))
    planned = {name for name, _ in rules}
    tuned = {name for name, rule in rules if rule.learned_steps}
    corrected = {name for name, rule in rules if rule.corrects}
    memory = predict_memory(checkpoint, family, recipe.calibration, planned, statistics, device, tuned, corrected)
    steps = predict_steps(recipe, checkpoint, family, rows, memory, device)
    fallbacks = tuple(decided.fallbacks)
    warnings = (*fallbacks, *_source_notes(checkpoint), *_warnings(recipe, family, rows))
    head = head_size(checkpoint.config)
    return Plan(recipe, family, checkpoint.origin, tuple(rows), units, memory, steps, warnings, fallbacks, head)


def engine_linears(rows: Iterable[PlanRow], family: Family) -> list[Linear]:
    """The checkpoint's block linears as vLLM builds them, with their schemes (None when not packed)."""
    linears = [(row, row.scheme if row.decision == "packed" else None) for row in rows if row.linear]
    return [
        Linear(family.runtime_name(row.module), family.engine_name(row.module), row.tensor.shape, scheme)
        for row, scheme in linears
    ]


def _units(rows: list[PlanRow], family: Family, checkpoint: Checkpoint) -> tuple[Unit, ...]:
    """A unit for each block with linears to quantize, in data order (headers can list tensors in any order)."""
    blocks: dict[str, dict[str, PlanRow]] = {}
    for row in rows:
        if row.decision != "kept":
            blocks.setdefault(row.block, {})[row.linear] = row
    units: list[Unit] = []
    for component in family.components:
        for i in range(component.used(checkpoint.config)):
            block_rows = blocks.get(component.block(i))
            if block_rows:
                ordered = tuple(block_rows[linear] for linear in component.linears if linear in block_rows)
                units.append(Unit(len(units), component.name, component.block(i), ordered))
    return tuple(units)


def _source_notes(checkpoint: Checkpoint) -> list[str]:
    """Notes about stored tensors that the artifact leaves out, and about a merged adapter."""
    names = checkpoint.ignored
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    omitted = [f"left out of the artifact: {names[0]}{more}, which models compute from the config"] if names else []
    return omitted + ([checkpoint.adapter.note()] if checkpoint.adapter else [])


def _warnings(recipe: Recipe, family: Family, rows: list[PlanRow]) -> tuple[str, ...]:
    """Warnings about how the artifact can be served, and about calibration on the built-in drawings."""
    warnings = [family.unserved] if family.unserved else []
    if recipe.calibration.data == ("drawings",):
        warnings.append(
            "it is calibrated on the built-in drawings, which evaluate its answers but not its captions: pass --data "
            "to use your own data"
        )
    schemes = {(row.component, row.scheme) for row in rows if row.decision == "packed" and row.scheme}
    for component, scheme in sorted(schemes, key=str):
        if scheme and not family.unserved and (requirement := serving_kernels(scheme, recipe.format).requirement()):
            warnings.append(f"{component} {scheme.label()}: {requirement} to be served")
    return tuple(warnings)
