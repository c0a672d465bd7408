"""An allocation as tables."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group
from rich.table import Table

from exporter.amounts import size
from exporter.planning.recipe import Rule
from exporter.study.propose import Confirmed
from exporter.study.search import AllocationResult, Tried
from exporter.study.show import Whole


def allocation_page(found: AllocationResult, file: Path) -> Group:
    """The choice, the front it is on, and what real tasks say of it."""
    parts: list[Whole | str] = [_rules(found.recipe.quantize)]
    one = found.winner.measured
    parts.append(
        f"{size(one.bytes)}, {one.bits_per_weight:.2f} bits a weight; costs sum up to {found.winner.predicted:z.5f}"
    )
    parts.append(
        f"KL a token with all of it together: {found.together:z.5f}; on the validation split {one.scores['kl']:z.5f}\n"
    )
    parts.append(_front(found.front, found.written, found.winner))
    if found.confirmed:
        parts.append(_proof([found.confirmed, *found.against]))
    else:
        parts.append("not proven: --no-proof")
    steps = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in found.seconds.items())
    parts.append(f"sensitivities: {steps}; {found.cpu_seconds:.0f} CPU seconds")
    parts.append(f"recipe: {file}; mmq export --recipe {file}")
    parts += [f"WARNING: {text}" for text in found.warnings]
    return Group(*parts)


def _rules(rules: Sequence[Rule]) -> Whole:
    table = Table("component", "blocks", "role", "scheme", box=None, title="the choice", title_justify="left")
    for rule in rules:
        scheme = rule.scheme()
        shown = f"{scheme.label()} {rule.method}" if scheme else "16 bits"
        table.add_row(rule.component, rule.blocks or "all", rule.role or "all", shown)
    return Whole(table)


def _front(front: Sequence[Tried], written: Sequence[Tried], winner: Tried) -> Whole:
    title = "least cost by size, and recipes; scored by exact replies on the validation split"
    table = Table("", "name", box=None, title=title, title_justify="left")
    for name in ("size", "bits/w", "predicted", "KL", "score", "change"):
        table.add_column(name, justify="right")
    for one in sorted([*front, *written], key=lambda one: one.measured.bytes):
        cost = "" if one.predicted is None else f"{one.predicted:z.5f}"
        found = one.measured
        values = [size(found.bytes), f"{found.bits_per_weight:.2f}", cost, f"{found.scores['kl']:z.5f}"]
        mark = ">" if one is winner else ""
        table.add_row(mark, one.name, *values, f"{found.scores['score']:.4f}", f"{one.change:+z.1%}")
    return Whole(table)


def _proof(confirmed: Sequence[Confirmed]) -> Whole:
    table = Table("recipe", box=None, title="real tasks on test data, exported", title_justify="left")
    metrics = list(confirmed[0].row()["metrics"])
    for name in ("size", "bits/w", *metrics, "mean change"):
        table.add_column(name, justify="right")
    for one in confirmed:
        row = one.row()
        found = [row["metrics"][name] for name in metrics]
        values = [f"{d['after']:.4f} of {d['before']:.4f}" for d in found]
        table.add_row(one.name, size(one.bytes), f"{one.bits_per_weight:.2f}", *values, f"{one.change:+z.1%}")
    return Whole(table)
