"""Loads a transformers model whose blocks are in memory only while a forward pass runs them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from exporter.errors import CheckpointError
from exporter.model.families import Family
from exporter.model.families.component import Config
from exporter.model.stream import Read, Stream


def load_streamed(
    family: Family, config: Config, names: Iterable[str], read: Read, device: torch.device, dtype: torch.dtype
) -> Any:
    """A complete model on `device`: each block is loaded through `read` before it runs, and unloaded after it ran.

    Its outputs equal those of a model that is loaded whole. CheckpointError when tensors are missing.
    """
    return stream_blocks(Stream(family, config, device, dtype), config, names, read)


def stream_blocks(stream: Stream, config: Config, names: Iterable[str], read: Read) -> Any:
    """The complete model of an empty stream, with hooks that load and unload its blocks; other tensors stay loaded."""
    blocks, outside = names_by_block(stream.family, config, names)
    stream.load(outside, read)
    model: Any = stream.model
    model.tie_weights()
    for name, inside in blocks.items():
        block = stream.module(name)
        block.register_forward_pre_hook(_loader(stream, inside, read))
        block.register_forward_hook(_unloader(stream, inside))
    _refuse_incomplete(stream, blocks)
    return model


def names_by_block(family: Family, config: Config, names: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Checkpoint names grouped by block, and the names that are in no block."""
    blocks: dict[str, list[str]] = {
        component.block(i): []
        for component in family.components
        if "{i}" in component.blocks
        for i in range(component.stored(config))
    }
    outside: list[str] = []
    depths = {name.count(".") + 1 for name in blocks}
    for name in names:
        parts = name.split(".")
        inside = next((p for depth in depths if (p := ".".join(parts[:depth])) in blocks), None)
        (outside if inside is None else blocks[inside]).append(name)
    return blocks, outside


def _loader(stream: Stream, names: Sequence[str], read: Read) -> Callable[..., None]:
    return lambda module, args: stream.load(names, read)


def _unloader(stream: Stream, names: Sequence[str]) -> Callable[..., None]:
    return lambda module, args, output: stream.unload(names)


def _refuse_incomplete(stream: Stream, blocks: dict[str, list[str]]) -> None:
    """CheckpointError when the checkpoint has no tensor for a parameter, inside or outside of the blocks."""
    inside = {stream.family.live_name(name) for names in blocks.values() for name in names}
    empty = [name for name, parameter in stream.model.named_parameters() if parameter.is_meta and name not in inside]
    if empty:
        raise CheckpointError(f"the checkpoint lacks {empty[0]} ({len(empty)} parameters missing)")
