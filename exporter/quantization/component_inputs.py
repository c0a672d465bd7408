"""The inputs of a component's first block: everything upstream of it runs on all batches."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from exporter.errors import CalibrationError
from exporter.events import Event
from exporter.inference.encoding import Batch
from exporter.inference.forward_hooks import replaced_forwards
from exporter.model.families import Component, Pass
from exporter.quantization.block_calls import ChainInput, capture_calls
from exporter.quantization.block_inputs import BlockInputs, Cleaning, check_excluded, is_finite, token_weights
from exporter.quantization.block_io import BlockIO


def arrive(io: BlockIO, component: Component, count: int, batches: Sequence[Batch]) -> list[BlockInputs]:
    """Run everything upstream of the component on all batches: the inputs of its first block.

    count: how many of its blocks will run.
    """
    if not batches:
        raise CalibrationError("the recipe's methods need calibration data and there is none")
    family, config = io.plan.family, io.checkpoint.config
    position = family.components.index(component)
    upstream = family.components[:position]
    unused = [part.block(i) for part in upstream for i in range(part.used(config), part.stored(config))]
    behind = [part.blocks.partition("{i}")[0] for part in family.components[position:]]
    not_read = (*behind, *(f"{block}." for block in unused))
    names = [
        name
        for name in io.checkpoint.tensors
        if not name.startswith(not_read) and not family.reason_kept(name.removesuffix(".weight"))
    ]
    io.stream.load(names, io.read)
    with replaced_forwards([(io.stream.module(block), _pass_on) for block in unused]):
        inputs = list(_enter(io, component, count, batches))
    io.stream.unload(names)
    check_excluded(component.block(0), inputs)
    return inputs


def _pass_on(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    """Instead of a block whose output nothing reads."""
    return hidden_states


def _enter(io: BlockIO, component: Component, count: int, batches: Sequence[Batch]) -> Iterator[BlockInputs]:
    """The inputs of the component's first block, pass by pass and batch by batch."""
    blocks = [io.stream.module(component.block(i)) for i in range(count)]
    store = io.device.torch_device if _fits(io) else torch.device("cpu")
    image, vision = image_token(io.stream.model.config), io.plan.recipe.calibration.vision_weight
    pictures = image is not None or vision == 1
    done, total = 0, len(component.passes) * len(batches)
    for entry in component.passes:
        placed = map(io.stream.inputs, batches)
        captured = capture_calls(io.stream.model, blocks, placed, entry.run, component.name)
        for batch, first_try in zip(batches, captured, strict=True):
            entered, upstream = first_try, Cleaning()
            if not is_finite(first_try):
                entered = _enter_cleaned(io, component, blocks, batch, entry, upstream)
            weights = token_weights(batch, entered.hidden, image, vision) if entry.padded else None
            pictures = pictures or (entry.padded and entered.hidden.shape[1] > batch["attention_mask"].shape[1])
            yield BlockInputs.enter(entered, weights, store, upstream)
            done += 1
            io.on_event(Event("calibrate", done, total, f"inputs of {component.name}"))
    if not pictures and any(entry.padded for entry in component.passes):
        raise CalibrationError(
            "calibration.vision_weight is given, and config.json names no image token (image_token_index, "
            "image_token_id) by which the picture's tokens are known",
            "leave vision_weight out",
        )


def image_token(config: Any) -> int | None:
    """Id of the token that stands for a picture, by a transformers configuration; None when the model has none."""
    ids = (getattr(config, key, None) for key in ("image_token_id", "image_token_index"))
    return next((int(value) for value in ids if value is not None), None)


def _enter_cleaned(
    io: BlockIO, component: Component, blocks: Sequence[nn.Module], batch: Batch, entry: Pass, cleaning: Cleaning
) -> ChainInput:
    """The same for a batch with activations that are not finite: they become zeros before they spread."""
    family, config = io.plan.family, io.checkpoint.config
    upstream = family.components[: family.components.index(component)]
    modules = [io.stream.module(part.block(i)) for part in upstream for i in range(part.used(config))]
    with replaced_forwards([(module, cleaning.around(module.forward)) for module in modules]):
        placed = [io.stream.inputs(batch)]
        (entered,) = capture_calls(io.stream.model, blocks, placed, entry.run, component.name)
    return entered


def _fits(io: BlockIO) -> bool:
    """Keep activations on the device when they take less than a quarter of what was free there."""
    return io.plan.memory.activation_bytes < io.device.free_bytes / 4
