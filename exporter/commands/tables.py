"""Plans, reports and recipes as tables for people; `cli.py` prints them."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from exporter.amounts import duration, memory, size
from exporter.artifact.verify import Verification
from exporter.commands.report_tables import report_page
from exporter.device import Device
from exporter.evaluation.gate_text import VERDICT_SENTENCES
from exporter.evaluation.sample_size import ASSUMPTION, advise, too_few, unpredictable
from exporter.pipeline.export import Export
from exporter.planning.plan import Plan, PlanRow
from exporter.planning.recipe import Recipe
from exporter.planning.steps import NEEDED, Step
from exporter.planning.vllm_kernels import serving
from exporter.publishing.artifact_diff import Change


def plan_summary(plan: Plan) -> list[dict[str, Any]]:
    """One line for every component and decision: linears, scheme, method, bytes, kernel."""
    groups: dict[tuple[str, str, str, str], list[PlanRow]] = {}
    for row in plan.rows:
        scheme = row.scheme.label() if row.scheme else ""
        method = row.rule.method if row.rule else ""
        groups.setdefault((row.component or "(rest)", row.decision, scheme, method), []).append(row)
    lines = []
    for (component, decision, scheme, method), rows in groups.items():
        lines.append(
            {
                "component": component,
                "decision": decision,
                "scheme": scheme,
                "method": method,
                "tensors": len(rows),
                "parameters": sum(row.tensor.size for row in rows),
                "bytes_before": sum(row.tensor.bytes for row in rows),
                "bytes_after": sum(row.bytes_after for row in rows),
                "why": _runs(plan, rows[0]) if decision == "packed" else _reasons(rows),
            }
        )
    order = {component.name: i for i, component in enumerate(plan.family.components)}
    return sorted(lines, key=lambda line: (order.get(line["component"], 99), line["decision"] == "kept"))


def _runs(plan: Plan, row: PlanRow) -> str:
    """What runs a packed linear."""
    assert row.scheme is not None
    return plan.family.unserved or serving(row.scheme, plan.recipe.format).label()


def _reasons(rows: list[PlanRow]) -> str:
    found = sorted({row.reason for row in rows}, key=lambda reason: (reason in ("bias", "norm", "embedding"), reason))
    return "; ".join(found)


def plan_table(plan: Plan) -> Table:
    """The plan by component."""
    table = Table(title=f"{plan.origin} with {plan.recipe.name}", title_justify="left", box=None, pad_edge=False)
    for name in ("component", "decision", "scheme", "tensors", "before", "after"):
        table.add_column(name, justify="right" if name in ("tensors", "before", "after") else "left", no_wrap=True)
    for line in plan_summary(plan):
        scheme = f"{line['scheme']} {line['method']}".strip()
        cells = [line["component"], line["decision"], scheme, str(line["tensors"])]
        table.add_row(*cells, size(line["bytes_before"]), size(line["bytes_after"]))
    table.add_row("total", "", "", str(len(plan.rows)), size(plan.bytes_before), size(plan.bytes_after))
    return table


def plan_notes(plan: Plan) -> list[str]:
    """Bits a weight, and for each part what serves it or why it is kept."""
    notes = [f"{plan.bits_per_weight:.2f} bits a weight, scales and kept tensors counted"]
    for line in plan_summary(plan):
        engine = "transformers" if plan.family.unserved else "vLLM"
        said = "kept" if line["decision"] == "kept" else f"{line['scheme']}, {engine}"
        why = f": {line['why']}" if line["why"] else ""
        notes.append(f"  {line['component']}: {said}{why}")
    if plan.recipe.kv_cache:
        engines = "vLLM: GPUs from 8.9 (older ones by FlashInfer alone), CPUs with AVX-512"
        notes.append(f"  keys and values: {plan.recipe.kv_cache}, {engines}")
    return notes


def plan_page(plan: Plan, device: Device, every_tensor: bool, warnings: Sequence[str] = ()) -> RenderableType:
    """The plan, what its steps take, and every tensor on request. warnings: beside the plan's own."""
    parts: list[RenderableType] = [plan_table(plan), *plan_notes(plan)]
    if every_tensor:
        parts.append(tensor_table(plan))
    parts.append(steps_table(plan.steps, device))
    advice = advise(plan.recipe)
    if advice:
        parts.append("\n".join(map(str, advice)) + f" ({ASSUMPTION})")
    if rest := unpredictable(plan.recipe):
        parts.append(rest)
    parts += [f"warning: {line}" for line in too_few(plan.recipe)]
    return Group(*parts, *(f"warning: {warning}" for warning in (*plan.warnings, *warnings)))


def steps_table(steps: Sequence[Step], device: Device) -> Table:
    """What each step takes, and how it is done."""
    title = f"peak memory and time, about, on {device.name}; host: beside the page cache"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("step", *(("device",) if device.is_cuda else ()), "host", "time", "how"):
        table.add_column(name, justify="left" if name in ("step", "how") else "right", no_wrap=name != "how")
    for step in steps:
        on_device = (memory(step.device_bytes) if step.device_bytes else "",) if device.is_cuda else ()
        table.add_row(step.name, *on_device, memory(step.host_bytes), duration(step.seconds), step.note)
    return table


def measured_table(predicted: Sequence[Step], measured: Sequence[Step]) -> Table:
    """What each step took, beside what was predicted of it."""
    on_device = any(step.device_bytes for step in measured)
    names = ["step", "time", "about", "host", "about", *(["device", "about"] if on_device else [])]
    table = Table(title="time and peak memory, beside the prediction", title_justify="left", box=None, pad_edge=False)
    for name in names:
        table.add_column(name, justify="left" if name == "step" else "right", no_wrap=True)
    expected = {step.name: step for step in predicted}
    for step in measured:
        about = expected[step.name]
        cells = [duration(step.seconds), duration(about.seconds), memory(step.host_bytes), memory(about.host_bytes)]
        cells += [memory(step.device_bytes), memory(about.device_bytes)] if on_device else []
        table.add_row(step.name, *cells)
    return table


def plan_json(plan: Plan, every_tensor: bool, warnings: Sequence[str] = ()) -> dict[str, Any]:
    """The plan as plain data."""
    data: dict[str, Any] = {
        "model": plan.origin,
        "recipe": plan.recipe.name,
        "components": plan_summary(plan),
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "parameters": plan.parameters,
        "bits_per_weight": plan.bits_per_weight,
        "units": len(plan.units),
        "peak_device_bytes": plan.memory.device_bytes,
        "peak_host_bytes": max(step.host_bytes for step in plan.steps if step.name in NEEDED),
        "steps": [step.as_json() for step in plan.steps],
        "evaluation": [asdict(advice) for advice in advise(plan.recipe)],
        "too_few_samples": list(too_few(plan.recipe)),
        "warnings": [*plan.warnings, *warnings],
    }
    if every_tensor:
        data["tensors"] = [tensor_line(row) for row in plan.rows]
    return data


def tensor_line(row: PlanRow) -> dict[str, Any]:
    """One tensor's decision."""
    return {
        "name": row.tensor.name,
        "shape": list(row.tensor.shape),
        "decision": row.decision,
        "scheme": row.scheme.label() if row.scheme else None,
        "method": row.rule.method if row.rule else None,
        "reason": row.reason,
        "bytes_before": row.tensor.bytes,
        "bytes_after": row.bytes_after,
    }


def tensor_table(plan: Plan) -> Table:
    """Every tensor's decision."""
    table = Table(box=None, pad_edge=False)
    for name in ("tensor", "shape", "decision", "scheme", "why"):
        table.add_column(name, no_wrap=name != "why")
    for line in map(tensor_line, plan.rows):
        scheme = f"{line['scheme']} {line['method']}" if line["scheme"] else ""
        table.add_row(line["name"], "x".join(map(str, line["shape"])), line["decision"], scheme, line["reason"])
    return table


def export_page(result: Export) -> RenderableType:
    """What an export did: plan, checks, scores, times and how to serve."""
    return Group(
        plan_table(result.plan),
        f"{result.plan.bits_per_weight:.2f} bits a weight, scales and kept tensors counted",
        verified_line(result.verified),
        report_page(result.report) if result.report else "evaluation skipped: the artifact is unproven",
        measured_table(result.plan.steps, result.measured),
        f"artifact: {result.out}",
        _ending(result),
    )


def _ending(result: Export) -> str:
    """How to serve the artifact, or why not to."""
    gates = result.report.gates if result.report else None
    if gates and any(gate.verdict in ("failed", "not comparable") for gate in gates):
        return VERDICT_SENTENCES[result.report.verdict] if result.report else ""
    serve = f"serve it: mmq serve {result.out}; prove its answers: mmq check {result.out}"
    ungated = "the recipe has no gates: no loss would have failed it\n" if gates == () else ""
    return ungated + (result.plan.family.unserved or serve)


def export_json(result: Export) -> dict[str, Any]:
    """What an export did, as plain data."""
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
    """What `verify` checked, in one line."""
    line = f"verified: {verified.files} files hashed, {verified.linears} packed linears equal to what was computed"
    line += " and like the source's" if verified.source else ""
    if verified.blocks is not None:
        line += (
            f"; {verified.blocks} blocks give compressed-tensors' outputs (difference {verified.block_difference:.1e})"
        )
    if verified.logit_difference is not None:
        line += f"; the whole model's logits differ by at most {verified.logit_difference:.1e}"
    return f"{line}; not run in transformers: {verified.skipped}" if verified.skipped else line


def recipes_table(recipes: list[Recipe]) -> Table:
    """Built-in recipes, one a line."""
    table = Table(box=None, pad_edge=False)
    for name in ("recipe", "family", "what it does"):
        table.add_column(name, no_wrap=name != "what it does")
    for recipe in recipes:
        table.add_row(recipe.name, recipe.model.family, recipe.summary)
    return table


def difference_table(first: str, second: str, changes: Sequence[Change]) -> Table:
    """Differences between two artifacts, one a line."""
    table = Table(box=None, pad_edge=False)
    for name, justify in (("what", "left"), (first, "left"), (second, "left"), ("change", "right")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for c in changes:
        table.add_row(c.what, c.first, c.second, "" if c.change is None else f"{c.change:+,.4g}")
    return table
