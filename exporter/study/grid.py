"""A grid of settings: what is varied, as a YAML file or flags, and the settings it makes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from exporter.errors import RecipeError, did_you_mean, wording
from exporter.methods import METHODS
from exporter.model.families import Family
from exporter.model.families.family import Config
from exporter.numerics.quantized import GroupSize
from exporter.planning.recipe import Rule, Strict, require_known

KEPT = 16
ALL = "all"


class Axis(Strict):
    """What is tried on one component.

    bits: 2 to 8, and 16 to keep it. blocks: `all`, `front`, `middle`, `end` (thirds), `FIRST:LAST`, or several of them
    joined by `+`. roles: `all`, `attention`, `mlp`.
    """

    bits: tuple[int, ...] = Field((2, 3, 4, 5, 6, 8, 16), min_length=1)
    blocks: tuple[str, ...] = Field((ALL,), min_length=1)
    roles: tuple[Literal["all", "attention", "mlp"], ...] = Field(("all",), min_length=1)

    @field_validator("bits")
    @classmethod
    def _bits(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        for bits in value:
            Rule(component="any", bits=bits)
        return value

    @field_validator("blocks")
    @classmethod
    def _blocks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for part in {part for one in value if one != ALL for part in one.split("+")}:
            Rule(component="any", bits=4, blocks=part)
        return value


class Grid(Strict):
    """Settings to measure.

    combine: `product` of the components' choices, one component `alone` at a time, or the same choice for all
    `together`. methods and group_sizes are the same for all components of a setting.
    """

    components: dict[str, Axis] = Field(min_length=1)
    methods: tuple[str, ...] = Field(("gptq",), min_length=1)
    group_sizes: tuple[GroupSize, ...] = Field(("row",), min_length=1)
    symmetric: bool = True
    combine: Literal["product", "alone", "together"] = "product"

    @field_validator("methods")
    @classmethod
    def _methods(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(require_known(name, METHODS, "method") for name in value)

    @field_validator("group_sizes")
    @classmethod
    def _groups(cls, value: tuple[GroupSize, ...]) -> tuple[GroupSize, ...]:
        for group in value:
            Rule(component="any", bits=4, group_size=group)
        return value


@dataclass(frozen=True)
class ComponentChoice:
    """What happens to one component of a setting."""

    component: str
    bits: int
    blocks: str = ALL
    role: str = ALL


@dataclass(frozen=True)
class Point:
    """One setting of the whole model. rules: a recipe's, empty for the full model. about: its columns in the table."""

    rules: tuple[Rule, ...]
    about: tuple[tuple[str, str | int], ...]


def read_grid(path: Path) -> Grid:
    """A grid from a YAML file; RecipeError lists every problem."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected a mapping with keys {', '.join(Grid.model_fields)}")
    return parse_grid(content, str(path))


def parse_grid(content: dict[str, Any], where: str) -> Grid:
    """A grid from plain data."""
    try:
        return Grid.model_validate(content)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            place = ".".join(str(part) for part in problem["loc"])
            names = Axis.model_fields if len(problem["loc"]) > 1 else Grid.model_fields
            lines.append(f"  {place}: {wording(problem, names)}")
        raise RecipeError(f"{where} has {len(lines)} problems\n" + "\n".join(lines), "see `mmq study --help`") from None


def points(grid: Grid, family: Family, config: Config) -> tuple[list[Point], list[str]]:
    """The settings of a grid without doubles, and notes on choices that this model has no block or linear for.

    RecipeError when the family lacks a component, or nothing is left.
    """
    names = [component.name for component in family.components]
    unknown = [name for name in grid.components if name not in names]
    if unknown:
        hint = f"family {family.name} has {', '.join(names)}"
        raise RecipeError(f"no component '{unknown[0]}'.{did_you_mean(unknown[0], names)}", hint)
    notes: list[str] = []
    found: dict[tuple[str, ...], Point] = {}
    for method, group, chosen in product(grid.methods, grid.group_sizes, list(_combined(grid))):
        rules = [rule for choice in chosen for rule in _rules(choice, grid, method, group, family)]
        empty = [rule for rule in rules if not _matches(rule, family, config)]
        notes += [f"{r.component} has nothing in blocks {r.blocks}, role {r.role or ALL}: left out" for r in empty]
        kept = tuple(rule for rule in rules if rule not in empty)
        if kept or all(choice.bits == KEPT for choice in chosen):
            key = tuple(sorted(rule.model_dump_json() for rule in kept))
            found.setdefault(key, Point(kept, _about(names, chosen, kept, grid, method, group)))
    if not found:
        raise RecipeError("the grid has no setting: " + "; ".join(dict.fromkeys(notes)), "name other blocks or roles")
    return list(found.values()), list(dict.fromkeys(notes))


def _combined(grid: Grid) -> Iterator[tuple[ComponentChoice, ...]]:
    choices = {name: list(_choices(name, axis)) for name, axis in grid.components.items()}
    if grid.combine == "product":
        yield from product(*choices.values())
    elif grid.combine == "alone":
        yield from ((choice,) for found in choices.values() for choice in found)
    elif len({len(found) for found in choices.values()}) > 1:
        counts = ", ".join(f"{name} {len(found)}" for name, found in choices.items())
        raise RecipeError(f"combine: together pairs choices one by one, and there are {counts}", "make the lists equal")
    else:
        yield from zip(*choices.values(), strict=True)


def _choices(name: str, axis: Axis) -> Iterator[ComponentChoice]:
    for bits in axis.bits:
        if bits == KEPT:
            yield ComponentChoice(name, bits)
        else:
            yield from (ComponentChoice(name, bits, blocks, role) for blocks, role in product(axis.blocks, axis.roles))


def _rules(choice: ComponentChoice, grid: Grid, method: str, group: GroupSize, family: Family) -> Iterable[Rule]:
    if choice.bits == KEPT:
        return []
    store = "dequantized" if family.component(choice.component).unpackable else "packed"
    common: dict[str, Any] = {
        "component": choice.component,
        "bits": choice.bits,
        "method": method,
        "group_size": group,
        "symmetric": grid.symmetric,
        "role": None if choice.role == ALL else choice.role,
        "store": store,
    }
    parts = [None] if choice.blocks == ALL else choice.blocks.split("+")
    return [Rule(**common, blocks=part) for part in parts]


def _matches(rule: Rule, family: Family, config: Config) -> bool:
    component = family.component(rule.component)
    count = component.used(config)
    return any(
        rule.matches_block(i, count) and (rule.role is None or rule.role == component.roles[linear])
        for i in range(count)
        for linear in component.linears_of(config, i)
    )


def _about(
    names: Sequence[str],
    chosen: Sequence[ComponentChoice],
    rules: Sequence[Rule],
    grid: Grid,
    method: str,
    group: GroupSize,
) -> tuple[tuple[str, str | int], ...]:
    bits = {choice.component: choice.bits for choice in chosen}
    touched = [choice for choice in chosen if choice.bits != KEPT]
    about: dict[str, str | int] = {f"{name}_bits": bits.get(name, KEPT) for name in names}
    about |= {"method": method if rules else "none", "group_size": str(group) if rules else "none"}
    about["zero_points"] = ("no" if grid.symmetric else "yes") if rules else "none"
    about["blocks"] = ",".join(dict.fromkeys(choice.blocks for choice in touched)) or ALL
    about["role"] = ",".join(dict.fromkeys(choice.role for choice in touched)) or ALL
    return tuple(about.items())
