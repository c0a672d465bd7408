"""Tables and JSON of exports and differences; the commands print them."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from exporter.amounts import duration, memory
from exporter.artifact.verify import Verification
from exporter.commands.next_steps import next_steps
from exporter.commands.plan_tables import plan_json, plan_table
from exporter.commands.report_tables import report_page
from exporter.evaluation.gate_text import VERDICT_SENTENCES
from exporter.pipeline.export import Export
from exporter.planning.steps import NEEDED, Step
from exporter.publishing.artifact_diff import Change
from exporter.serving.preflight import needs_other_recipe


def measured_table(predicted: Sequence[Step], measured: Sequence[Step]) -> Table:
    """Measured time and peak memory of each step, with the predictions."""
    on_device = any(step.device_bytes for step in measured)
    names = ["step", "time", "predicted", "host", "predicted", *(["device", "predicted"] if on_device else [])]
    table = Table(title="time and peak memory, measured and predicted")
    for name in names:
        table.add_column(name, justify="left" if name == "step" else "right", no_wrap=True)
    expected = {step.name: step for step in predicted}
    for step in measured:
        prediction = expected[step.name]
        cells = [
            duration(step.seconds),
            duration(prediction.seconds),
            memory(step.host_bytes),
            memory(prediction.host_bytes),
        ]
        cells += [memory(step.device_bytes), memory(prediction.device_bytes)] if on_device else []
        table.add_row(step.name, *cells)
    return table


def export_page(result: Export) -> RenderableType:
    """The result of an export: plan, verification, scores, times, and the next command."""
    return Group(
        plan_table(result.plan),
        f"{result.plan.bits_per_weight:.2f} bits per weight, including scales and kept tensors",
        verified_line(result.verified),
        report_page(result.report) if result.report else "evaluation skipped: the artifact is unproven",
        measured_table(result.plan.steps, result.measured),
        f"artifact: {result.out}",
        "\n".join(_next_steps(result)),
    )


def _next_steps(result: Export) -> list[str]:
    """The commands that follow the export, or the reason not to serve the artifact."""
    gates = result.report.gates if result.report else None
    if gates and any(gate.verdict in ("failed", "not comparable") for gate in gates):
        return [VERDICT_SENTENCES[result.report.verdict] if result.report else ""]
    ungated = ["the recipe has no gates: no loss of quality can fail it"] if gates == () else []
    family = result.plan.family
    other = None if family.unserved else needs_other_recipe(result.plan)
    return [*ungated, *next_steps(result.out, family.unserved, "vqa" in family.tasks, other)]


def export_json(result: Export) -> dict[str, Any]:
    """The result of an export as JSON-compatible data."""
    return {
        "out": str(result.out),
        "seconds": {step.name: step.seconds for step in result.measured},
        "measured": [step.as_json() for step in result.measured],
        "verified": asdict(result.verified),
        "peak_device_bytes": max((step.device_bytes for step in result.measured if step.name in NEEDED), default=0),
        "peak_host_bytes": max((step.host_bytes for step in result.measured if step.name in NEEDED), default=0),
        "plan": plan_json(result.plan, every_tensor=False),
        "report": result.report.plain() if result.report else None,
    }


def verified_line(verified: Verification) -> str:
    """The result of `verify` in one line."""
    line = f"verified: {verified.files} files match their hashes, {verified.linears} packed linears match the manifest"
    line += " and the source" if verified.source else ""
    if verified.blocks is not None:
        line += f"; outputs of {verified.blocks} blocks match compressed-tensors'"
        line += f" (largest relative difference {verified.block_difference:.1e})"
    if verified.logit_difference is not None:
        line += f"; the whole model's logits differ by at most {verified.logit_difference:.1e}"
    return f"{line}; not run in transformers: {verified.skipped}" if verified.skipped else line


def _signed(change: float | None) -> str:
    """A change with its sign: four digits, all digits of larger integers, nothing for None."""
    if change is None:
        return ""
    return f"{change:+,.0f}" if abs(change) >= 1000 else f"{change:+,.4g}"


def difference_table(first: str, second: str, changes: Sequence[Change]) -> Table:
    """Table of the differences between two artifacts, one row per difference."""
    table = Table(title=f"first: {first}\nsecond: {second}")
    for name in ("what", "first", "second"):
        table.add_column(name)
    table.add_column("change", justify="right", no_wrap=True)
    for change in changes:
        table.add_row(change.what, change.first, change.second, _signed(change.change))
    return table
