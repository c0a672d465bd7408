"""What a study found, as tables."""

from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table

from exporter.amounts import size
from exporter.study.importance import Importance, Shares
from exporter.study.records import Measured, columns
from exporter.study.run import Outcome

WAYS = ("method", "group_size", "zero_points", "blocks", "role")  # columns that are shown when they vary
WIDEST = 1000  # characters that a table may take


class Whole:
    """A table as wide as it is: a narrow screen breaks its lines, instead of cutting its columns."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self._table, options.update(max_width=WIDEST))


def importance_page(found: Importance) -> Group:
    """Shares and marginal drops, with a sentence on how to read each."""
    head = f"{found.metric}, {found.full_score:.4g} with the most bits; {found.shares.rows} settings"
    notes = [f"note: {text}" for text in found.notes]
    parts: list[Whole | str] = [head, *notes]
    parts.append(_shares(found.shares, "percent of what decides the score, in this whole grid"))
    region = "; ".join(f"{name} {_numbers(bits)}" for name, bits in found.usable.items())
    parts.append(f"\nusable bits: {region}")
    if found.inside:
        parts.append(_shares(found.inside, f"the same among the {found.inside.rows} settings in that region"))
    return Group(*parts, "", _drops(found))


def _numbers(bits: tuple[float, ...]) -> str:
    return ", ".join(f"{b:g}" for b in bits) or "none"


def _shares(shares: Shares, title: str) -> Whole:
    r2 = f"R2: forest {shares.r2_forest:.2f}, line {shares.r2_linear:.2f}"
    table = Table(
        "component",
        "consensus",
        "forest",
        "permutation",
        "SHAP",
        title=f"{title} ({r2})",
        title_justify="left",
        box=None,
    )
    for name in shares.consensus:
        ways = (shares.consensus, shares.forest, shares.permutation, shares.shap)
        table.add_row(name, *(f"{way[name]:.1f}" for way in ways))
    return Whole(table)


def _drops(found: Importance) -> Whole:
    title = "what bits cost there: mean share of the full score, others the same (standard error)"
    widths = sorted({drop.bits for drops in found.marginal.values() for drop in drops})
    table = Table("component", *(f"{bits:g} bits" for bits in widths), title=title, title_justify="left", box=None)
    for name, drops in found.marginal.items():
        known = {drop.bits: f"{drop.drop:+z.1%} ({drop.error:.1%})" for drop in drops}
        table.add_row(name, *(known.get(bits, "") for bits in widths))
    return Whole(table)


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    """The settings of a grid with their scores, and what it took."""
    return {
        "points": [found.row() for found in outcome.found],
        "scored": outcome.scored,
        "units_made": outcome.made,
        "units": outcome.units,
        "units_named": outcome.named,
        "seconds": dict(outcome.seconds),
        "cpu_seconds": outcome.cpu_seconds,
    }


def outcome_page(outcome: Outcome) -> Group:
    """A row for each setting, smallest first, those on the Pareto front marked."""
    best = front(outcome.found)
    bits = [name for name in columns_of(outcome.found) if name.endswith("_bits") and _varies(outcome.found, name)]
    others = [name for name in WAYS if _varies(outcome.found, name)]
    scores = [name for name in outcome.found[0].scores if not name.endswith((" nll", " kl"))] if outcome.found else []
    table = Table("", box=None)
    for name in (*map(_short, bits), *others, "size", "bits/w", *map(_short, scores)):
        table.add_column(name, justify="left" if name in others else "right")
    for found in sorted(outcome.found, key=lambda one: one.bytes):
        cells = [str(found.about[name]) for name in (*bits, *others)]
        values = [f"{found.scores[name]:z.4f}" for name in scores]
        mark = "*" if found.id in best else ""
        table.add_row(mark, *cells, size(found.bytes), f"{found.bits_per_weight:.2f}", *values)
    return Group(Whole(table), "* nothing smaller or as small scores as much", _took(outcome))


def _short(name: str) -> str:
    """A column's name in a narrow table."""
    return name.removesuffix("_bits").removesuffix(" exact")


def columns_of(found: tuple[Measured, ...]) -> list[str]:
    """What settings are described by."""
    return columns([one.about for one in found])


def _varies(found: tuple[Measured, ...], name: str) -> bool:
    return len({one.about.get(name) for one in found} - {"none"}) > 1


def _took(outcome: Outcome) -> str:
    """What was computed, what was reused, and the time of both."""
    count = len(outcome.found)
    steps = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in outcome.seconds.items())
    lines = [f"{count} settings, {outcome.scored} scored now; {steps}; {outcome.cpu_seconds:.0f} CPU seconds"]
    if outcome.sequential:
        lines.append(f"each is quantized by itself, as an export does it: {outcome.made} units, none shared")
    else:
        lines.append(
            f"they name {outcome.named} units, {outcome.units} of them different; {outcome.made} quantized now"
        )
    if outcome.scored:
        spent = sum(outcome.seconds.values()) / outcome.scored
        lines.append(f"{spent:.1f} s for each setting that was scored now")
    return "\n".join(lines)


def front(found: tuple[Measured, ...], score: str = "score") -> set[str]:
    """Ids of the settings that no other one of at most their size beats."""
    best, most = set(), float("-inf")
    for one in sorted(found, key=lambda one: (one.bytes, -one.scores[score])):
        if one.scores[score] > most:
            best.add(one.id)
            most = one.scores[score]
    return best
