"""Tables of an allocation for the terminal."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group
from rich.table import Table

from exporter.amounts import size
from exporter.planning.recipe import Rule
from exporter.study.allocation_run import AllocationResult, Candidate
from exporter.study.propose import MeasuredRecipe
from exporter.study.records import SAMPLES
from exporter.study.result_tables import change_text
from exporter.study.setting_rows import row_of


def allocation_page(result: AllocationResult, file: Path, command: str) -> Group:
    """The chosen rules, their front, the results on real tasks, and the command that exports the recipe in `file`."""
    parts: list[Table | str] = [_rules(result.recipe.quantize)]
    setting = result.winner.measured
    bits = f"{setting.bits_per_weight:.2f} bits per weight"
    parts.append(f"{size(setting.bytes)}, {bits}; sum of the costs {result.winner.predicted:z.5f}")
    validation = f"on the validation split {setting.scores['kl']:z.5f}"
    parts.append(f"KL per token of the whole allocation: {result.together:z.5f}; {validation}\n")
    parts.append(_front(result.front, result.hand_written, result.winner))
    if result.confirmed:
        parts.append(_proof([result.confirmed, *result.against]))
    else:
        parts.append("not measured on real tasks: --no-proof")
    steps = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items())
    parts.append(f"sensitivities: {steps}; {result.cpu_seconds:.0f} CPU seconds")
    parts += [f"WARNING: {text}" for text in result.warnings]
    parts.append(f"recipe: {file}\nnext:\n  {command}")
    return Group(*parts)


def _rules(rules: Sequence[Rule]) -> Table:
    table = Table("component", "blocks", "role", "scheme", title="the allocation")
    for rule in rules:
        scheme = rule.scheme()
        scheme_text = f"{scheme.label()} {rule.method}" if scheme else "16 bits"
        table.add_row(rule.component, rule.blocks or "all", rule.role or "all", scheme_text)
    return table


def _front(front: Sequence[Candidate], hand_written: Sequence[Candidate], winner: Candidate) -> Table:
    title = "allocations of minimal cost by size, and recipes; score: exact replies"
    if counts := sorted({int(candidate.measured.scores.get(SAMPLES, 0)) for candidate in [*front, *hand_written]}):
        title += f" of {' or '.join(f'{count:,}' for count in counts)} samples"
    table = Table("", "name", title=f"{title}, validation split")
    for name in ("size", "bits/w", "predicted", "KL", "score", "change"):
        table.add_column(name, justify="right")
    others = [c for c in front if c is winner or c.measured.id != winner.measured.id]  # the same allocation once
    for candidate in sorted([*others, *hand_written], key=lambda candidate: candidate.measured.bytes):
        cost = "" if candidate.predicted is None else f"{candidate.predicted:z.5f}"
        setting = candidate.measured
        values = [size(setting.bytes), f"{setting.bits_per_weight:.2f}", cost, f"{setting.scores['kl']:z.5f}"]
        mark = ">" if candidate is winner else ""
        change = change_text(row_of(setting, "score", None)) or f"{candidate.change:+z.1%}"
        table.add_row(mark, candidate.name, *values, f"{setting.scores['score']:.4f}", change)
    return table


def _proof(confirmed: Sequence[MeasuredRecipe]) -> Table:
    table = Table("recipe", title="exported artifacts on real tasks, test data")
    metrics = list(confirmed[0].row()["metrics"])
    for name in ("size", "bits/w", "samples", *metrics, "mean change"):
        table.add_column(name, justify="right")
    for confirmed_recipe in confirmed:
        row = confirmed_recipe.row()
        differences = [row["metrics"][name] for name in metrics]
        values = [f"{difference['after']:.4f} of {difference['before']:.4f}" for difference in differences]
        table.add_row(
            confirmed_recipe.name,
            size(confirmed_recipe.bytes),
            f"{confirmed_recipe.bits_per_weight:.2f}",
            f"{confirmed_recipe.samples:,}",
            *values,
            f"{confirmed_recipe.change:+z.1%}",
        )
    return table
