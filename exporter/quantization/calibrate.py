"""Runs the quantization: goes through the blocks in data order, quantizes each, and stores one unit per block.

Components follow the data (vision, projector, language), so every block is calibrated on inputs that include the
quantization error of everything before it, as in the finished artifact. The phases inside a block do the same (GPTQ's
"true sequential" order). Units in the work folder are not computed again: their blocks run with the stored weights.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from torch import Tensor

from exporter.device import Device
from exporter.events import Event, Listener
from exporter.model.checkpoint import Checkpoint
from exporter.model.families import Component
from exporter.model.inference.encoding import Batch
from exporter.planning.plan import Plan, Unit
from exporter.quantization.batch_rounds import by_batch, placed_blocks
from exporter.quantization.block import Block
from exporter.quantization.block_inputs import BlockInputs, check_excluded, mark_noted
from exporter.quantization.block_io import BlockIO
from exporter.quantization.block_rounding import tune
from exporter.quantization.component_inputs import first_block_inputs
from exporter.quantization.smoothing import Folding
from exporter.quantization.source_stream import SourceStream
from exporter.quantization.workdir import UnitResult, Workdir

VERSION = 3  # part of a job's fingerprint; increment it when a change in this file changes results


def run(
    plan: Plan,
    checkpoint: Checkpoint,
    workdir: Workdir,
    batches: Sequence[Batch],
    device: Device,
    on_event: Listener,
) -> None:
    """Quantize every unit of the plan that is not yet in the work folder.

    batches: model inputs (`input_ids`, `attention_mask`, `pixel_values`, ...) on the CPU; may be empty when no unit
    needs statistics. Raises CheckpointError for damaged weights, and CalibrationError for non-finite activations or a
    model whose blocks cannot be run one after the other.
    """
    with ThreadPoolExecutor(2) as pool:
        io = BlockIO(plan, checkpoint, workdir, device, on_event, pool)
        if io.finished:
            on_event(Event("quantize", io.finished, len(plan.units), "resumed"))
        for component in plan.family.components:
            units = [u for u in plan.units if u.component == component.name and u.index >= io.finished]
            for block in walk(io, component, units, batches):
                io.commit(block.unit, refined(block, learned_outputs(block), Folding.start(block), block.quantize()))
        io.settle()


def learned_outputs(block: Block) -> Sequence[Tensor]:
    """The outputs by batch that learned rounding approximates, of a block that is not yet quantized; else empty."""
    if not any(row.rule and row.rule.learned_steps for row in block.unit.rows):
        return ()
    if block.source:
        return block.source.outputs(block.module)
    return [entry.output(block.module, block.io.device.torch_device) for entry in block.inputs]


def refined(block: Block, targets: Sequence[Tensor], folding: Folding | None, result: UnitResult) -> UnitResult:
    """The better of two quantizations where scales can move, then tuned to `targets`.

    result: the block quantized by its methods. folding: from before that.
    """
    if folding:
        result = folding.best(result, block.quantize() if folding.fold(result) else None)
    return replace(tune(block, result, targets), weights={})


def walk(
    io: BlockIO, component: Component, units: Sequence[Unit], batches: Sequence[Batch], sequential: bool = True
) -> Iterator[Block]:
    """Yield the blocks of a component that `units` quantize, in order, once for each of their units.

    Blocks are in memory, with their inputs, up to the last block whose unit needs statistics; later blocks are neither
    loaded nor run. sequential: later blocks run on the weights that the caller leaves in earlier blocks; otherwise the
    block is reloaded through `io.read` after each yield.
    """
    calibrated = [unit.block for unit in units if unit.needs_statistics]
    names = [component.block(i) for i in range(component.used(io.checkpoint.config))]
    count = 1 + max((names.index(block) for block in calibrated), default=-1)
    if not component.chained:
        yield from _walk_apart(io, component, units, batches, sequential)
        return
    inputs = first_block_inputs(io, component, names[:count], batches) if count else []
    source = source_stream(io, component, names[:count], units, batches) if sequential else None
    noted = {unit.block for unit in (*io.plan.units, *units)}  # their notes report tokens excluded before them
    for i, name in enumerate(names[:count]):
        tensors = io.tensors_under(name)
        io.stream.load(tensors, io.read)
        if i + 1 < count:
            io.read_ahead(io.tensors_under(names[i + 1]))
        if source:
            source.enter(io, name)
        for unit in (unit for unit in units if unit.block == name):
            yield Block(io, component, unit, inputs, source)
            if not sequential:
                io.stream.load(tensors, io.read)
        if name in noted:
            mark_noted(inputs)
        if i + 1 < count:
            blocks = placed_blocks(io.stream.module(name), io.device)
            for _ in by_batch(blocks, inputs, lambda block, entry: entry.advance(block.module, block.device)):
                pass
            del blocks  # frees the copies on other devices
            if source:
                source.advance(io.stream.module(name))
            check_excluded(name, inputs)
        io.stream.unload(tensors)
    for unit in units:
        if unit.block not in names[:count]:
            yield Block(io, component, unit)


def source_stream(
    io: BlockIO, component: Component, names: Sequence[str], units: Sequence[Unit], batches: Sequence[Batch]
) -> SourceStream | None:
    """The full-precision stream at block `names[0]`; None when no rule of the units follows it."""
    follows = any(row.rule and row.rule.follows_source for unit in units for row in unit.rows)
    return SourceStream.start(io, component, names, batches) if follows and names else None


def _walk_apart(
    io: BlockIO, component: Component, units: Sequence[Unit], batches: Sequence[Batch], sequential: bool
) -> Iterator[Block]:
    """`walk` for a component whose blocks each have an input of their own, from upstream of the component."""
    for block in dict.fromkeys(unit.block for unit in units):
        own = [unit for unit in units if unit.block == block]
        inputs: list[BlockInputs] = []
        source = None
        if any(unit.needs_statistics for unit in own):
            inputs = first_block_inputs(io, component, [block], batches)
            source = source_stream(io, component, [block], own, batches) if sequential else None
            io.stream.load(io.tensors_under(block), io.read)
            if source:
                source.enter(io, block)
        for unit in own:
            yield Block(io, component, unit, inputs, source)
            if inputs and not sequential:
                io.stream.load(io.tensors_under(block), io.read)
        if inputs:
            io.stream.unload(io.tensors_under(block))
