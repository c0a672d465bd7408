"""Computes the inputs of a component's first block, by running everything upstream of it on all calibration batches."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from exporter.errors import CalibrationError
from exporter.events import Event
from exporter.model.families import Component, Pass
from exporter.model.inference.encoding import Batch
from exporter.model.inference.forward_hooks import replaced_forwards
from exporter.model.stream import Read
from exporter.planning.memory import upstream_tensors
from exporter.quantization.block_calls import ChainInput, capture_calls
from exporter.quantization.block_inputs import BlockInputs, Cleaning, check_excluded, is_finite, token_weights
from exporter.quantization.block_io import BlockIO


def first_block_inputs(
    io: BlockIO, component: Component, names: Sequence[str], batches: Sequence[Batch], read: Read | None = None
) -> list[BlockInputs]:
    """Run everything upstream of the component on all batches, and return the inputs of its block `names[0]`.

    names: the component's blocks that will run, each on the output of the previous one. read: reads the tensors
    upstream; None reads them as the artifact will have them. CalibrationError without batches, and when too many tokens
    are not finite.
    """
    if not batches:
        raise CalibrationError("the recipe's methods need calibration data, but there are no samples")
    family, config = io.plan.family, io.checkpoint.config
    position = family.components.index(component)
    upstream = family.components[:position]
    unused = [part.block(i) for part in upstream for i in range(part.used(config), part.stored(config))]
    loaded = upstream_tensors(io.checkpoint.tensors, family, config, component)
    io.stream.load(loaded, read or io.read)
    later = [part.block(i) for part in family.components[position:] for i in range(part.used(config))]
    skipped_blocks = [*unused, *(block for block in later if block not in names)]
    with replaced_forwards([(io.stream.module(block), _identity) for block in skipped_blocks]):
        inputs = list(_inputs_by_batch(io, component, names, batches))
    io.stream.unload(loaded)
    check_excluded(names[0], inputs)
    return inputs


def _identity(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    """Forward function that replaces a block whose output is not used."""
    return hidden_states


def _inputs_by_batch(
    io: BlockIO, component: Component, names: Sequence[str], batches: Sequence[Batch]
) -> Iterator[BlockInputs]:
    """The inputs of the component's block `names[0]`: for each pass of the component, for each batch."""
    blocks = [io.stream.module(name) for name in names]
    devices, fits = io.device.all, _fits(io)
    image, vision = image_token(io.stream.model.config), io.plan.recipe.calibration.vision_weight
    pictures = image is not None or vision == 1
    done, total = 0, len(component.passes) * len(batches)
    for entry in component.passes:
        placed = map(io.stream.inputs, batches)
        captured = capture_calls(io.stream.model, blocks, placed, entry.run, component.name)
        for batch, uncleaned in zip(batches, captured, strict=True):
            entered, upstream = uncleaned, Cleaning()
            if not is_finite(uncleaned):
                entered = _enter_cleaned(io, component, blocks, batch, entry, upstream)
            weights = token_weights(batch, entered.hidden, image, vision) if entry.padded else None
            pictures = pictures or (entry.padded and entered.hidden.shape[1] > batch["attention_mask"].shape[1])
            device = devices[done % len(devices)]
            yield BlockInputs.enter(entered, weights, device, device if fits else torch.device("cpu"), upstream)
            done += 1
            io.on_event(Event("calibrate", done, total, f"inputs of {component.name}"))
    if not pictures and any(entry.padded for entry in component.passes):
        raise CalibrationError(
            "calibration.vision_weight needs the image token's id to locate the picture's tokens, and config.json has "
            "neither image_token_index nor image_token_id",
            "remove vision_weight from the recipe",
        )


def image_token(config: Any) -> int | None:
    """Id of the image placeholder token in a transformers configuration; None when it names none."""
    ids = (getattr(config, key, None) for key in ("image_token_id", "image_token_index"))
    return next((int(value) for value in ids if value is not None), None)


def _enter_cleaned(
    io: BlockIO, component: Component, blocks: Sequence[nn.Module], batch: Batch, entry: Pass, cleaning: Cleaning
) -> ChainInput:
    """The component's input for a batch with non-finite activations, which the upstream blocks replace by zeros.

    cleaning: receives the counts of the replaced tokens.
    """
    family, config = io.plan.family, io.checkpoint.config
    upstream = family.components[: family.components.index(component)]
    modules = [io.stream.module(part.block(i)) for part in upstream for i in range(part.used(config))]
    with replaced_forwards([(module, cleaning.around(module.forward)) for module in modules]):
        placed = [io.stream.inputs(batch)]
        (entered,) = capture_calls(io.stream.model, blocks, placed, entry.run, component.name)
    return entered


def _fits(io: BlockIO) -> bool:
    """Whether the activations take less than a quarter of the device's free memory, so that they can stay there."""
    return io.plan.memory.activation_bytes < io.device.free_bytes / 4
