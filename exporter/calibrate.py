"""Walk through the blocks: quantize each on the inputs it gets from the quantized blocks before it, and store the unit.

Components follow the data (vision, projector, language), so every block sees the error of everything before it,
as it will when the artifact runs. Inside a block the phases do the same (GPTQ's "true sequential" order).
A finished unit is never computed again: its block runs with the weights from its file.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from exporter.block import Block
from exporter.block_calls import ChainInput, capture_calls
from exporter.block_inputs import (
    Batch,
    BlockInputs,
    check_excluded,
    cleaning_forward,
    is_finite,
    token_weights,
)
from exporter.checkpoint import Checkpoint
from exporter.device import Device
from exporter.errors import CalibrationError
from exporter.events import Event
from exporter.families import Component, Pass
from exporter.forward_hooks import replaced_forwards
from exporter.job import Job
from exporter.plan import Plan, Unit
from exporter.smooth import Folding
from exporter.workdir import Workdir

VERSION = 3  # part of a job's fingerprint: raise it when this file changes the numbers


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
    needs statistics. Raises CheckpointError (bad weights), CalibrationError (bad activations, or a model whose blocks
    cannot be run one after the other).
    """
    with ThreadPoolExecutor(2) as pool:
        job = Job(plan, checkpoint, workdir, device, on_event, pool)
        if job.finished:
            on_event(Event("quantize", job.finished, len(plan.units), "resumed"))
        for component in plan.family.components:
            units = [u for u in plan.units if u.component == component.name and u.index >= job.finished]
            for block in walk(job, component, units, batches):
                folding, result = Folding.start(block), block.quantize()
                if folding:
                    result = folding.best(result, block.quantize() if folding.fold(result) else None)
                job.commit(block.unit, result)
                del folding, result  # a copy of the block; its codes are being written
        job.settle()


def walk(
    job: Job, component: Component, units: Sequence[Unit], batches: Sequence[Batch], sequential: bool = True
) -> Iterator[Block]:
    """The blocks of a component that `units` quantize, in order; a block comes once for each of its units.

    Blocks are in memory, with their inputs, up to the last one whose unit needs statistics; those after it are neither
    read nor run. sequential: later blocks run on what the caller leaves in the earlier ones; otherwise every block is
    as `job.read` gives it, for each of its units and for the blocks after it.
    """
    calibrated = [unit.block for unit in units if unit.needs_statistics]
    names = [component.block(i) for i in range(component.used(job.checkpoint.config))]
    count = 1 + max((names.index(block) for block in calibrated), default=-1)
    inputs = arrive(job, component, count, batches) if count else []
    for i, name in enumerate(names[:count]):
        tensors = job.tensors_under(name)
        job.stream.load(tensors, job.read)
        if i + 1 < count:
            job.read_ahead(job.tensors_under(names[i + 1]))
        for unit in (unit for unit in units if unit.block == name):
            yield Block(job, component, unit, inputs)
            if not sequential:
                job.stream.load(tensors, job.read)
        if i + 1 < count:
            module = job.stream.module(name)
            for entry in inputs:
                entry.advance(module, job.device.torch_device)
            check_excluded(name, inputs)
        job.stream.unload(tensors)
    for unit in units:
        if unit.block not in names[:count]:
            yield Block(job, component, unit)


def arrive(job: Job, component: Component, count: int, batches: Sequence[Batch]) -> list[BlockInputs]:
    """Run everything upstream of the component on all batches: the inputs of its first block.

    count: how many of its blocks will run.
    """
    if not batches:
        raise CalibrationError("the recipe's methods need calibration data and there is none")
    family, config = job.plan.family, job.checkpoint.config
    position = family.components.index(component)
    upstream = family.components[:position]
    unused = [part.block(i) for part in upstream for i in range(part.used(config), part.stored(config))]
    behind = [part.blocks.partition("{i}")[0] for part in family.components[position:]]
    not_read = (*behind, *(f"{block}." for block in unused))
    names = [
        name
        for name in job.checkpoint.tensors
        if not name.startswith(not_read) and not family.reason_kept(name.removesuffix(".weight"))
    ]
    job.stream.load(names, job.read)
    with replaced_forwards([(job.stream.module(block), _pass_on) for block in unused]):
        inputs = list(_enter(job, component, count, batches))
    job.stream.unload(names)
    check_excluded(component.block(0), inputs)
    return inputs


def _pass_on(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    """Instead of a block whose output nothing reads."""
    return hidden_states


def _enter(job: Job, component: Component, count: int, batches: Sequence[Batch]) -> Iterator[BlockInputs]:
    """The inputs of the component's first block, pass by pass and batch by batch."""
    blocks = [job.stream.module(component.block(i)) for i in range(count)]
    store = job.device.torch_device if _fits(job) else torch.device("cpu")
    image, vision = image_token(job.stream.model.config), job.plan.recipe.calibration.vision_weight
    done, total = 0, len(component.passes) * len(batches)
    for entry in component.passes:
        placed = map(job.stream.inputs, batches)
        captured = capture_calls(job.stream.model, blocks, placed, entry.run, component.name)
        for batch, first_try in zip(batches, captured, strict=True):
            entered = first_try if is_finite(first_try) else _enter_cleaned(job, component, blocks, batch, entry)
            weights = token_weights(batch, entered.hidden, image, vision) if entry.padded else None
            yield BlockInputs.enter(entered, weights, store)
            done += 1
            job.on_event(Event("calibrate", done, total, f"inputs of {component.name}"))


def image_token(config: Any) -> int | None:
    """Id of the token that stands for a picture, by a transformers configuration; None when the model has none."""
    ids = (getattr(config, key, None) for key in ("image_token_id", "image_token_index"))
    return next((int(value) for value in ids if value is not None), None)


def _enter_cleaned(
    job: Job, component: Component, blocks: Sequence[nn.Module], batch: Batch, entry: Pass
) -> ChainInput:
    """The same for a batch with activations that are not finite: they become zeros before they spread."""
    family, config = job.plan.family, job.checkpoint.config
    upstream = family.components[: family.components.index(component)]
    modules = [job.stream.module(part.block(i)) for part in upstream for i in range(part.used(config))]
    with replaced_forwards([(module, cleaning_forward(module.forward)) for module in modules]):
        placed = [job.stream.inputs(batch)]
        (entered,) = capture_calls(job.stream.model, blocks, placed, entry.run, component.name)
    return entered


def _fits(job: Job) -> bool:
    """Keep activations on the device when they take less than a quarter of what was free there."""
    return job.plan.memory.activation_bytes < job.device.free_bytes / 4
