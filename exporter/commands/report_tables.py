"""A report in the terminal: scores with intervals, and each gate in the color of its verdict."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from exporter.evaluation.gate_text import sentence
from exporter.evaluation.gates import Verdict
from exporter.evaluation.report_file import GateResult, Report

COLORS: dict[Verdict, str] = {
    "passed": "bold green",
    "failed": "bold red",
    "not comparable": "bold red",
    "not measured": "bold yellow",
    "not resolved": "bold yellow",
}


def report_page(report: Report) -> RenderableType:
    """Scores with intervals, then the gates."""
    table = Table(title="evaluation", title_justify="left", box=None, pad_edge=False)
    for name in ("score", "samples", "full", "artifact", "change", "95 % interval"):
        table.add_column(name, justify="left" if name == "score" else "right", no_wrap=True)
    for m in report.measures:
        d = m.difference
        interval = f"{d.low:+z.4f} to {d.high:+z.4f}"
        scores = (f"{d.before:.4f}", f"{d.after:.4f}", f"{d.change:+z.4f}", interval)
        table.add_row(f"{m.task} {m.metric}", str(m.samples), *scores)
    one_percent = [(m.samples_to_resolve_one_percent, f"{m.task} {m.metric}") for m in report.measures]
    needed = [f"{count} for {name}" for count, name in one_percent if count]
    more = [f"samples that would resolve 1 % of the full score: {', '.join(needed)}"] if needed else []
    for task, figures in report.corpus.items():
        named = [f"{name} {before:.4f} -> {after:.4f}" for name, (before, after) in figures.items()]
        more += [f"{task}, of the whole set: {', '.join(named)}"] if named else []
    if searched := report.evaluation.searched:
        sizes = ", ".join(f"{count:,} {name}" for name, count in searched.items())
        more.append(f"retrieval searched: {sizes}")
    baseline = report.evaluation.baseline
    if baseline and not baseline.is_source:
        more.append(f"the full-precision model, {baseline.model}, is not the one that the artifact was made from")
    return Group(table, *(gate_line(gate) for gate in report.gates), *more)


def gate_line(gate: GateResult) -> Text:
    """A gate's verdict in a sentence; the verdict itself in the color of its kind."""
    line = Text(f"gate {sentence(gate)}")
    line.highlight_words([gate.verdict], COLORS[gate.verdict])
    return line
