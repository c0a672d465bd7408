"""Linears that a format cannot store under their rule: grouped into lines, with group sizes that fit.

Also the lines about linears that a rule's `else` stores in another way.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from exporter.planning.recipe import Recipe
from exporter.planning.rule import KEEP, Rule

OFFERED = (128, 64, 32)  # group sizes that kernels of vLLM support, the best compression first
Member = tuple[int, str, int]  # of one linear: index of its rule, name inside its block, number of inputs
FALLBACKS = {"row": "one scale per row", KEEP: "16 bits"}  # `else` of a rule -> what it does


@dataclass(frozen=True)
class Linears:
    """Linears of one rule with the same number of inputs.

    number: index of the rule. names: their names inside their blocks. count: over all blocks. columns: inputs.
    """

    number: int
    names: tuple[str, ...]
    count: int
    columns: int

    def text(self) -> str:
        """Names and number."""
        return f"{', '.join(self.names)} ({self.count} {'linear' if self.count == 1 else 'linears'})"


def grouped(members: Iterable[Member]) -> list[Linears]:
    """Linears by rule and number of inputs, in order."""
    groups: dict[tuple[int, int], list[str]] = {}
    for number, name, columns in members:
        groups.setdefault((number, columns), []).append(name)
    return [
        Linears(number, tuple(dict.fromkeys(names)), len(names), columns) for (number, columns), names in groups.items()
    ]


def refusal_lines(
    recipe: Recipe, refused: Mapping[str, list[Member]], inputs: Mapping[int, Collection[int]]
) -> list[str]:
    """A line for each reason and group of linears, and for each rule with unfit groups one that offers what fits.

    refused: reason -> its linears. inputs: index of a rule -> inputs of all its linears.
    """
    lines: dict[int, list[str]] = {}  # rule -> its lines
    unfit = set()
    for reason, members in refused.items():
        for linears in grouped(members):
            rule = recipe.quantize[linears.number]
            text = f"{_named(linears.number, rule)}: {linears.text()}: format {recipe.format}: {reason}"
            lines.setdefault(linears.number, []).append(text)
            unfit |= {linears.number} if rule.leaves_columns(linears.columns) else set()
    for number in unfit:
        lines[number].append(_offer(number, recipe.quantize[number], inputs[number]))
    return [line for _, of_rule in sorted(lines.items()) for line in of_rule]


def _offer(number: int, rule: Rule, inputs: Collection[int]) -> str:
    sizes = [size for size in OFFERED if size != rule.group_size and all(columns % size == 0 for columns in inputs)]
    size = f"--group-size {rule.component}={rule.group_size}"
    otherwise = f"`else: row` to the rule ({size},row), one scale per row for these linears, or `else: keep`, 16 bits"
    if not sizes:
        listed = ", ".join(map(str, sorted(inputs)))
        return f"{_named(number, rule)}: no group size of 128, 64 or 32 divides all of {listed} inputs; add {otherwise}"
    option = f"--group-size {rule.component}={sizes[0]}"
    dividing = f"groups of {' or '.join(map(str, sizes))} divide the inputs of all its linears"
    return f"{_named(number, rule)}: {dividing} ({option}); or add {otherwise}"


def fallback_lines(recipe: Recipe, members: Iterable[Member]) -> list[str]:
    """A line for each group of linears that their rule's `else` stores in another way."""
    lines = []
    for linears in grouped(members):
        rule = recipe.quantize[linears.number]
        reason = f"groups of {rule.group_size} do not divide {linears.columns} inputs"
        bits = " of 8 bits" if rule.widened(linears.columns) else ""
        what = FALLBACKS[rule.fallback or KEEP] + bits
        lines.append(f"{rule.component}: {linears.text()}: {reason}: {what} (else: {rule.fallback})")
    return lines


def _named(number: int, rule: Rule) -> str:
    return f"quantize[{number}] ({rule.component})"
