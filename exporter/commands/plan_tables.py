"""Tables and JSON of plans and recipes; the commands print them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from exporter.amounts import duration, memory, size
from exporter.device import Device
from exporter.evaluation.sample_size import ASSUMPTION, NOT_READ, advise, too_few, unpredictable
from exporter.numerics.kv_caches import BY_FLAG
from exporter.planning.plan import Plan, PlanRow
from exporter.planning.prompts import prompts_by_task, prompts_line
from exporter.planning.recipe import Recipe
from exporter.planning.steps import NEEDED, Step
from exporter.planning.vllm_kernels import serving_kernels


def plan_summary(plan: Plan) -> list[dict[str, Any]]:
    """One dict per component, decision, scheme and method: number of tensors, parameters, bytes, kernel or reason."""
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
                "why": _kernel_label(plan, rows[0]) if decision == "packed" else _reasons(rows),
            }
        )
    order = {component.name: i for i, component in enumerate(plan.family.components)}
    return sorted(lines, key=lambda line: (order.get(line["component"], 99), line["decision"] == "kept"))


def _kernel_label(plan: Plan, row: PlanRow) -> str:
    """The kernel that runs a packed linear, or why no engine serves it."""
    assert row.scheme is not None
    return plan.family.unserved or serving_kernels(row.scheme, plan.recipe.format).label()


def _reasons(rows: list[PlanRow]) -> str:
    reasons = sorted({row.reason for row in rows}, key=lambda reason: (reason in ("bias", "norm", "embedding"), reason))
    return "; ".join(reasons)


def plan_table(plan: Plan) -> Table:
    """The plan as a table with one row per component, decision and scheme."""
    table = Table(title=f"{plan.origin} with {plan.recipe.name}")
    for name in ("component", "decision", "scheme", "tensors", "before", "after"):
        table.add_column(name, justify="right" if name in ("tensors", "before", "after") else "left", no_wrap=True)
    for line in plan_summary(plan):
        scheme = f"{line['scheme']} {line['method']}".strip()
        cells = [line["component"], line["decision"], scheme, str(line["tensors"])]
        table.add_row(*cells, size(line["bytes_before"]), size(line["bytes_after"]))
    table.add_row("total", "", "", str(len(plan.rows)), size(plan.bytes_before), size(plan.bytes_after))
    return table


def plan_notes(plan: Plan) -> list[str]:
    """Bits per weight, and for each component its engine and kernel, or the reason to keep it."""
    notes = [f"{plan.bits_per_weight:.2f} bits per weight, including scales and kept tensors"]
    for line in plan_summary(plan):
        engine = "transformers" if plan.family.unserved else "vLLM"
        decision = "kept" if line["decision"] == "kept" else f"{line['scheme']}, {engine}"
        why = f": {line['why']}" if line["why"] else ""
        notes.append(f"  {line['component']}: {decision}{why}")
    if plan.recipe.kv_cache:
        notes.append(f"  keys and values: {plan.recipe.kv_cache}, {_cache_engines(plan.recipe.kv_cache)}")
    if plan.recipe.prompts or plan.recipe.max_new_tokens:
        notes.append(f"prompts: {prompts_line(prompts_by_task(plan.family))}")
    if plan.recipe.overrides:
        notes.append(f"changed in the recipe: {plan.recipe.changes()}")
    return notes


def _cache_engines(cache: str) -> str:
    """Where vLLM has this type of keys and values."""
    if cache in BY_FLAG:
        return f"vLLM from 0.26 on GPUs, with --kv-cache-dtype {cache}, which `mmq serve` gives"
    return "vLLM: GPUs from 8.9 (older GPUs with FlashInfer only), CPUs with AVX-512"


def plan_page(
    plan: Plan,
    device: Device,
    every_tensor: bool,
    warnings: Sequence[str] = (),
    available: Mapping[str, int] = NOT_READ,
) -> RenderableType:
    """The plan, the cost of its steps, advice, and all warnings.

    warnings: printed after those of the plan. available: number of test samples of each task, where the data was read.
    """
    parts: list[RenderableType] = [plan_table(plan), *plan_notes(plan)]
    if every_tensor:
        parts.append(tensor_table(plan))
    parts.append(steps_table(plan.steps, device))
    advice = advise(plan.recipe, available)
    if advice:
        parts.append("\n".join(map(str, advice)) + f" ({ASSUMPTION})")
    if unknown_tasks := unpredictable(plan.recipe):
        parts.append(unknown_tasks)
    parts += [f"warning: {line}" for line in too_few(plan.recipe, available)]
    return Group(*parts, *(f"warning: {warning}" for warning in (*plan.warnings, *warnings)))


def steps_table(steps: Sequence[Step], device: Device) -> Table:
    """Predicted peak memory and time of each step, and how mmq runs it."""
    title = f"estimated peak memory and time on {device.name}; host memory excludes the page cache"
    table = Table(title=title)
    for name in ("step", *(("device",) if device.is_cuda else ()), "host", "time", "how"):
        table.add_column(name, justify="left" if name in ("step", "how") else "right", no_wrap=name != "how")
    for step in steps:
        on_device = (memory(step.device_bytes) if step.device_bytes else "",) if device.is_cuda else ()
        table.add_row(step.name, *on_device, memory(step.host_bytes), duration(step.seconds), step.note)
    return table


def plan_json(
    plan: Plan, every_tensor: bool, warnings: Sequence[str] = (), available: Mapping[str, int] = NOT_READ
) -> dict[str, Any]:
    """The plan as JSON-compatible data. every_tensor: adds one entry per tensor. available: as in `plan_page`."""
    data: dict[str, Any] = {
        "model": plan.origin,
        "recipe": plan.recipe.name,
        "overrides": plan.recipe.overrides,
        "prompts": prompts_by_task(plan.family),
        "components": plan_summary(plan),
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "parameters": plan.parameters,
        "bits_per_weight": plan.bits_per_weight,
        "units": len(plan.units),
        "peak_device_bytes": plan.memory.device_bytes,
        "peak_host_bytes": max(step.host_bytes for step in plan.steps if step.name in NEEDED),
        "steps": [step.as_json() for step in plan.steps],
        "evaluation": [asdict(advice) for advice in advise(plan.recipe, available)],
        "too_few_samples": list(too_few(plan.recipe, available)),
        "warnings": [*plan.warnings, *warnings],
    }
    if every_tensor:
        data["tensors"] = [tensor_line(row) for row in plan.rows]
    return data


def tensor_line(row: PlanRow) -> dict[str, Any]:
    """One tensor's decision as plain data."""
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
    """Table with the decision of every tensor."""
    table = Table()
    for name in ("tensor", "shape", "decision", "scheme", "why"):
        table.add_column(name, no_wrap=name != "why")
    for line in map(tensor_line, plan.rows):
        scheme = f"{line['scheme']} {line['method']}" if line["scheme"] else ""
        table.add_row(line["name"], "x".join(map(str, line["shape"])), line["decision"], scheme, line["reason"])
    return table


def recipes_table(recipes: list[Recipe]) -> Table:
    """Table of recipes, one row per recipe."""
    table = Table()
    for name in ("recipe", "default model", "summary"):
        table.add_column(name, no_wrap=name != "summary")
    for recipe in recipes:
        table.add_row(recipe.name, Path(recipe.model.repo).name, recipe.description())
    return table
