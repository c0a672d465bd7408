"""Tables of an evaluation report for the terminal: scores with intervals, and one colored line per gate."""

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
    """Table of scores with 95 % intervals, then one line per gate, then notes."""
    table = Table(title="evaluation")
    for name in ("score", "samples", "full", "artifact", "change", "95 % interval"):
        table.add_column(name, justify="left" if name == "score" else "right", no_wrap=True)
    for measure in report.measures:
        difference, (low, high) = measure.difference, measure.interval()
        interval = f"{low:+z.4f} to {high:+z.4f}"
        scores = (f"{difference.before:.4f}", f"{difference.after:.4f}", f"{difference.change:+z.4f}", interval)
        table.add_row(f"{measure.task} {measure.metric}", str(measure.samples), *scores)
    one_percent = [
        (measure.samples_to_resolve_one_percent, f"{measure.task} {measure.metric}") for measure in report.measures
    ]
    sample_counts = [f"{count} for {name}" for count, name in one_percent if count]
    lines = []
    if sample_counts:
        lines.append(f"samples needed to resolve a change of 1 % of the full score: {', '.join(sample_counts)}")
    for task, figures in report.corpus.items():
        scores_of_set = [f"{name} {before:.4f} -> {after:.4f}" for name, (before, after) in figures.items()]
        lines += [f"{task}, score of the whole set: {', '.join(scores_of_set)}"] if scores_of_set else []
    if searched := report.evaluation.searched:
        sizes = ", ".join(f"{count:,} {name}" for name, count in searched.items())
        lines.append(f"retrieval searched: {sizes}")
    if any(key.startswith(("prompt ", "max_new_tokens ")) for key in report.evaluation.overrides):
        lines.append(f"prompts: {report.evaluation.prompts_text(report.samples)}")
    baseline = report.evaluation.baseline
    if baseline and not baseline.is_source:
        lines.append(f"the full-precision model, {baseline.model}, is not the artifact's source model")
    return Group(table, *(gate_line(gate) for gate in report.gates), *lines)


def gate_line(gate: GateResult) -> Text:
    """One gate as a sentence, with its verdict colored."""
    line = Text(f"gate {sentence(gate)}")
    line.highlight_words([gate.verdict], COLORS[gate.verdict])
    return line
