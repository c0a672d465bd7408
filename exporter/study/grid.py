"""The grid of a study: the varied components, bits, blocks and roles, from YAML or options, and its settings."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from exporter.errors import RecipeError, did_you_mean, validation_message
from exporter.files.strict_yaml import parse_yaml
from exporter.methods import METHODS
from exporter.model.families import Family
from exporter.model.families.component import Config
from exporter.numerics.quantized import GroupSize
from exporter.planning.recipe import Rule, Strict, require_known

KEPT = 16
ALL = "all"


class Axis(Strict):
    """Values to try on one component.

    bits: 2 to 8, or 16 for full precision. blocks: `all`, `front`, `middle`, `end` (thirds), `FIRST:LAST`, or several
    of them joined by `+`. roles: `all`, `attention`, `mlp`.
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
        for part in {part for blocks in value if blocks != ALL for part in blocks.split("+")}:
            Rule(component="any", bits=4, blocks=part)
        return value


class Grid(Strict):
    """The settings to measure.

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
    """Bits, blocks and role of one component in a setting."""

    component: str
    bits: int
    blocks: str = ALL
    role: str = ALL


@dataclass(frozen=True)
class Setting:
    """A setting of the whole model. rules: recipe rules, empty for full precision. about: its columns in the table."""

    rules: tuple[Rule, ...]
    about: tuple[tuple[str, str | int], ...]


def read_grid(path: Path) -> Grid:
    """Read a grid from a YAML file. Raises RecipeError with every problem."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected a mapping with keys {', '.join(Grid.model_fields)}")
    return parse_grid(content, str(path))


def parse_grid(content: dict[str, Any], source: str) -> Grid:
    """Validate a grid from plain data. source: name of the data for messages. Raises RecipeError."""
    try:
        return Grid.model_validate(content)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            location = ".".join(str(part) for part in problem["loc"])
            names = Axis.model_fields if len(problem["loc"]) > 1 else Grid.model_fields
            lines.append(f"  {location}: {validation_message(problem, names)}")
        raise RecipeError(
            f"{source} has {len(lines)} problems\n" + "\n".join(lines), "see `mmq study --help`"
        ) from None


def settings_of(grid: Grid, family: Family, config: Config) -> tuple[list[Setting], list[str]]:
    """The distinct settings of a grid, and notes on choices that match no block or linear of this model.

    Raises RecipeError for a component that the family does not have, or if no setting remains.
    """
    names = [component.name for component in family.components]
    unknown_names = [name for name in grid.components if name not in names]
    if unknown_names:
        hint = f"the components of family {family.name} are {', '.join(names)}"
        raise RecipeError(f"no component '{unknown_names[0]}'.{did_you_mean(unknown_names[0], names)}", hint)
    notes: list[str] = []
    settings: dict[tuple[str, ...], Setting] = {}
    for method, group, choices in product(grid.methods, grid.group_sizes, list(_combined(grid))):
        rules = [rule for choice in choices for rule in _rules(choice, grid, method, group, family)]
        empty_rules = [rule for rule in rules if not _matches(rule, family, config)]
        notes += [
            f"{rule.component} has no linear in blocks {rule.blocks} with role {rule.role or ALL}: choice skipped"
            for rule in empty_rules
        ]
        matching_rules = tuple(rule for rule in rules if rule not in empty_rules)
        if matching_rules or all(choice.bits == KEPT for choice in choices):
            key = tuple(sorted(rule.model_dump_json() for rule in matching_rules))
            settings.setdefault(
                key, Setting(matching_rules, _about(names, choices, matching_rules, grid, method, group))
            )
    if not settings:
        raise RecipeError("the grid has no setting: " + "; ".join(dict.fromkeys(notes)), "choose other blocks or roles")
    return list(settings.values()), list(dict.fromkeys(notes))


def with_full_precision(settings: Sequence[Setting], family: Family) -> list[Setting]:
    """The settings and the full-precision model, from which their changes are measured."""
    if any(not setting.rules for setting in settings):
        return list(settings)
    about: dict[str, str | int] = {f"{component.name}_bits": KEPT for component in family.components}
    about |= {"method": "none", "group_size": "none", "zero_points": "none", "blocks": ALL, "role": ALL}
    return [*settings, Setting((), tuple(about.items()))]


def _combined(grid: Grid) -> Iterator[tuple[ComponentChoice, ...]]:
    choices = {name: list(_choices(name, axis)) for name, axis in grid.components.items()}
    if grid.combine == "product":
        yield from product(*choices.values())
    elif grid.combine == "alone":
        yield from ((choice,) for component_choices in choices.values() for choice in component_choices)
    elif len({len(component_choices) for component_choices in choices.values()}) > 1:
        counts = ", ".join(f"{name} {len(component_choices)}" for name, component_choices in choices.items())
        raise RecipeError(
            f"combine: together needs equal numbers of choices, and the numbers are {counts}",
            "make the lists equally long",
        )
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
    choices: Sequence[ComponentChoice],
    rules: Sequence[Rule],
    grid: Grid,
    method: str,
    group: GroupSize,
) -> tuple[tuple[str, str | int], ...]:
    bits = {choice.component: choice.bits for choice in choices}
    quantized = [choice for choice in choices if choice.bits != KEPT]
    about: dict[str, str | int] = {f"{name}_bits": bits.get(name, KEPT) for name in names}
    about |= {"method": method if rules else "none", "group_size": str(group) if rules else "none"}
    about["zero_points"] = ("no" if grid.symmetric else "yes") if rules else "none"
    about["blocks"] = ",".join(dict.fromkeys(choice.blocks for choice in quantized)) or ALL
    about["role"] = ",".join(dict.fromkeys(choice.role for choice in quantized)) or ALL
    return tuple(about.items())
