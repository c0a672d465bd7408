"""Runs a block on calibration batches, which several devices share: batch i runs on device i modulo their number."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
from torch import nn

from exporter.device import Device, current
from exporter.quantization.block_inputs import BlockInputs

Result = TypeVar("Result")


@dataclass(frozen=True)
class PlacedBlock:
    """A block on one of the calibration's devices: the live block, or a copy of it on another device.

    index: the position of the device in `Device.all`. copies: the copied modules by `id` of the original module.
    """

    index: int
    device: torch.device
    module: nn.Module
    copies: Mapping[int, object]

    def module_for(self, original: nn.Module) -> nn.Module:
        """The module of this block that corresponds to a module of the live block."""
        module = self.copies.get(id(original), original)
        assert isinstance(module, nn.Module)
        return module


def placed_blocks(block: nn.Module, device: Device) -> list[PlacedBlock]:
    """The live block on the first device, and a copy of it with its present weights on every other device."""
    return [PlacedBlock(0, device.torch_device, block, {})] + [
        _copied(block, index, other) for index, other in enumerate(device.all[1:], 1)
    ]


def _copied(block: nn.Module, index: int, device: torch.device) -> PlacedBlock:
    tensors = [*block.parameters(), *block.buffers()]
    copies: dict[int, object] = {id(tensor): _to(tensor, device) for tensor in tensors}
    for module in block.modules():  # configurations are shared, not copied
        config = getattr(module, "config", None)
        copies[id(config)] = config
    return PlacedBlock(index, device, copy.deepcopy(block, copies), copies)


def _to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    moved = tensor.detach().to(device)
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved


def by_batch(
    blocks: Sequence[PlacedBlock], inputs: Sequence[BlockInputs], work: Callable[[PlacedBlock, BlockInputs], Result]
) -> Iterator[Result]:
    """`work` of every batch, in order; the devices work at the same time, each on one batch of a round."""
    first, *others = blocks
    if not others:
        yield from (work(first, entry) for entry in inputs)
        return

    def on_device(block: PlacedBlock, entry: BlockInputs) -> Result:
        with current(block.device):
            return work(block, entry)

    for start in range(0, len(inputs), len(blocks)):
        own, *rest = inputs[start : start + len(blocks)]
        pending = [_thread(b.index).submit(on_device, b, e) for b, e in zip(others, rest, strict=False)]
        try:
            yield on_device(first, own)
        finally:
            wait(pending)
        yield from (future.result() for future in pending)


@cache
def _thread(index: int) -> Executor:
    """The thread of a further device, kept for the life of the process: cuDNN plans attention once per thread."""
    return ThreadPoolExecutor(1)
