"""Stream the blocks: capture inputs, gather statistics, quantize, store the unit, go on with quantized outputs.

Components follow the data (vision, projector, language), so every block sees the error of everything before it,
as it will when the artifact runs. Inside a block the phases do the same (GPTQ's "true sequential" order).
A finished unit is never computed again: its block runs with the weights from its file.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from exporter.checkpoint import Checkpoint
from exporter.device import Device
from exporter.errors import CalibrationError, CheckpointError
from exporter.events import Event
from exporter.families import Component
from exporter.flow import Batch, Flow, counted_rows, token_weights, weighted
from exporter.job import Job
from exporter.methods import METHODS
from exporter.plan import Plan, PlanRow, Unit, stored_scale_dtype
from exporter.quantized import QuantizedLinear
from exporter.smooth import checked_batches, quantize_smoothed, smooths
from exporter.stream import watch_inputs
from exporter.workdir import UnitResult, Workdir

VERSION = 2  # part of a job's fingerprint: raise it when this file changes the numbers


def run(
    plan: Plan,
    checkpoint: Checkpoint,
    workdir: Workdir,
    batches: Sequence[Batch],
    device: Device,
    on_event: Callable[[Event], None],
) -> None:
    """Quantize every unit of the plan that the work folder does not hold yet.

    batches: model inputs (`input_ids`, `attention_mask`, `pixel_values`, ...) on the CPU; may be empty when no unit
    needs statistics. Raises CheckpointError (bad weights), CalibrationError (bad activations).
    """
    with ThreadPoolExecutor(2) as pool:
        job = Job(plan, checkpoint, workdir, device, on_event, pool)
        if job.finished:
            on_event(Event("quantize", job.finished, len(plan.units), "resumed"))
        for component in plan.family.components:
            units = [unit for unit in plan.units if unit.component == component.name]
            todo = [unit for unit in units if unit.index >= job.finished]
            if any(unit.needs_statistics for unit in todo):
                _walk(job, component, units, batches)
            else:
                for unit in todo:
                    job.commit(unit, quantize_unit(job, component, unit, flows=()))
        job.settle()


def _walk(job: Job, component: Component, units: list[Unit], batches: Sequence[Batch]) -> None:
    """The blocks of one component, from its first to the last that needs statistics."""
    last = max(unit.index for unit in units if unit.needs_statistics)
    by_block = {unit.block: unit for unit in units}
    flows = arrive(job, component, batches)
    for i in range(component.used(job.checkpoint.config)):
        unit = by_block.get(component.block(i))
        names = job.tensors_under(component.block(i))
        job.stream.load(names, job.read)
        if i + 1 < component.used(job.checkpoint.config):
            job.read_ahead(job.tensors_under(component.block(i + 1)))
        if unit and unit.index >= job.finished:
            job.commit(unit, quantize_unit(job, component, unit, flows))
        if unit is None or unit.index < last:
            advance(job, component.block(i), flows)
        job.stream.unload(names)


def advance(job: Job, name: str, flows: Sequence[Flow]) -> None:
    """Run all batches through the live block `name`, so that they stand at the door of the next one."""
    block = job.stream.module(name)
    for flow in flows:
        output = flow.run(block, job.device.torch_device)
        assert output is not None
        if not torch.isfinite(output).all():
            raise CalibrationError(
                f"{name}: its output is not finite on the calibration data",
                "check the checkpoint's values; float16 models may overflow: try --device cpu",
            )
        flow.hidden = output.to(flow.hidden.device)


def arrive(job: Job, component: Component, batches: Sequence[Batch]) -> list[Flow]:
    """Run everything upstream of the component on all batches; what its first block receives."""
    if not batches:
        raise CalibrationError("the recipe's methods need calibration data and there is none")
    family = job.plan.family
    later = family.components[family.components.index(component) :]
    behind = tuple(other.blocks.partition("{i}")[0] for other in later)
    names = [
        name
        for name in job.checkpoint.tensors
        if not name.startswith(behind) and not family.reason_kept(name.removesuffix(".weight"))
    ]
    job.stream.load(names, job.read)
    block = job.stream.module(component.block(0))
    store = job.device.torch_device if _fits(job) else torch.device("cpu")
    image, vision = job.checkpoint.config.get("image_token_index"), job.plan.recipe.calibration.vision_weight
    flows: list[Flow] = []
    total = len(component.passes) * len(batches)
    for entry in component.passes:
        for batch, (args, kwargs) in zip(batches, job.stream.capture(block, batches, entry.run), strict=True):
            hidden = args[0] if args else kwargs["hidden_states"]
            weights = token_weights(batch, hidden.shape[1], image, vision) if entry.padded else None
            flows.append(Flow(hidden.to(store), args[1:], kwargs, weights))
            job.on_event(Event("calibrate", len(flows), total, f"inputs of {component.name}"))
    job.stream.unload(names)
    return flows


def _fits(job: Job) -> bool:
    """Keep activations on the device when they take less than a quarter of what was free there."""
    return job.plan.memory.activation_bytes < job.device.free_bytes / 4


def quantize_unit(job: Job, component: Component, unit: Unit, flows: Sequence[Flow]) -> UnitResult:
    """All linears of one block; leaves the quantized weights in the live block when it is loaded."""
    if not (flows and smooths(unit)):
        return _quantize_phases(job, component, unit, flows)
    block, device = job.stream.module(unit.block), job.device.torch_device
    checked = flows[: checked_batches(unit)]

    def outputs() -> Iterator[Tensor]:
        found = ((flow, flow.run(block, device)) for flow in checked)
        return (weighted(output, flow.weights) for flow, output in found if output is not None)

    return quantize_smoothed(
        job,
        component,
        unit,
        gather=lambda rows: _gather(job, component, unit, rows, flows),
        quantize=lambda: _quantize_phases(job, component, unit, flows),
        outputs=outputs,
    )


def _quantize_phases(job: Job, component: Component, unit: Unit, flows: Sequence[Flow]) -> UnitResult:
    """The linears of one block, phase by phase: each sees the errors of those before it."""
    linears: dict[str, QuantizedLinear] = {}
    errors: dict[str, float] = {}
    notes: list[str] = []
    for phase in component.phases:
        rows = [row for row in unit.rows if row.linear in phase]
        for stack in _stacks(rows):
            statistics = _gather(job, component, unit, stack[:1], flows).get(stack[0].linear)
            for row, linear, error in _quantize_stack(job, stack, statistics, notes):
                linears[row.module] = linear
                errors[row.module] = error
                if flows:
                    job.stream.put(row.tensor.name, linear.as_served())
    return UnitResult(linears, errors, tuple(notes))


def _stacks(rows: Sequence[PlanRow]) -> list[list[PlanRow]]:
    """Rows that one call may quantize: same input, same rule. Rows of a weight do not influence each other, except
    through the one scale of a "tensor" scheme."""
    stacks: list[list[PlanRow]] = []
    for row in rows:
        shared = stacks and stacks[-1][0].rule == row.rule and row.rule and row.rule.group_size != "tensor"
        if shared:
            stacks[-1].append(row)
        else:
            stacks.append([row])
    return stacks


def _gather(
    job: Job, component: Component, unit: Unit, rows: Sequence[PlanRow], flows: Sequence[Flow]
) -> dict[str, Any]:
    """Statistics of the inputs of linears over all batches, in one pass; none for methods that want none."""
    device = job.device.torch_device
    statistics: dict[str, Any] = {}
    for row in rows:
        kind = METHODS[row.rule.method].Statistics if row.rule else None
        if kind is not None:
            statistics[row.linear] = kind(row.tensor.shape[1], device)
    if not statistics:
        return {}
    block = job.stream.module(unit.block)
    linears = {row.linear: job.stream.module(row.module) for row in rows if row.linear in statistics}
    for flow in flows:

        def see(name: str, x: Tensor, flow: Flow = flow) -> None:
            statistics[name].update(*counted_rows(x, None if name in component.unpadded else flow.weights))

        with watch_inputs(linears, see, stop=True):
            flow.run(block, device)
    return statistics


def _quantize_stack(
    job: Job, stack: Sequence[PlanRow], statistics: Any, notes: list[str]
) -> list[tuple[PlanRow, QuantizedLinear, float]]:
    weights = [_finite_weight(job, row, loaded=statistics is not None) for row in stack]
    rule = stack[0].rule
    assert rule is not None
    method, scheme = METHODS[rule.method], rule.scheme()
    whole, said = method.quantize_linear(
        weights[0] if len(weights) == 1 else torch.cat(weights),
        statistics,
        scheme,
        rule.parsed_options(),
        stored_scale_dtype(stack[0].tensor.dtype),
    )
    notes += [f"{stack[0].block}: {', '.join(row.linear for row in stack)}: {note}" for note in said]
    results, start = [], 0
    for row, weight in zip(stack, weights, strict=True):
        end = start + weight.shape[0]
        part = QuantizedLinear(whole.scheme, whole.codes[start:end], whole.scale[start:end], whole.zero[start:end])
        results.append((row, part, relative_error(weight, part.as_served(), statistics)))
        start = end
    return results


def _finite_weight(job: Job, row: PlanRow, loaded: bool) -> Tensor:
    """The weight f32 `[out, in]`, from the live block when it is loaded."""
    read = job.stream.parameter if loaded else job.checkpoint.read
    weight = read(row.tensor.name).to(job.device.torch_device, torch.float32)
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise CheckpointError(
            f"{row.tensor.name} holds {bad} values that are not finite ({row.tensor.file})",
            "the checkpoint is damaged, or its training diverged; download it again",
        )
    return weight


def relative_error(weight: Tensor, approximation: Tensor, statistics: Any) -> float:
    """Size of the output's error over the size of the output on the calibration rows; without statistics, of weights.

    weight, approximation: f32 `[out, in]`.
    """
    if statistics is None:
        return float(torch.linalg.norm(weight - approximation) / torch.linalg.norm(weight).clamp_min(1e-30))
    lost, whole = statistics.energy(weight - approximation), statistics.energy(weight)
    return float((max(lost, 0.0) / max(whole, 1e-30)) ** 0.5)  # rounding can bring a tiny loss below zero
