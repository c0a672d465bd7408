"""The hidden states of the full-precision model, computed block by block beside those of the quantized model.

GPTQ's correction and learned rounding use them: both let a block make up for the errors of the blocks before it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from exporter.model.families import Component
from exporter.model.inference.encoding import Batch
from exporter.quantization.block_inputs import BlockInputs
from exporter.quantization.block_io import BlockIO
from exporter.quantization.component_inputs import first_block_inputs


@dataclass
class SourceStream:
    """The full-precision model at one block.

    inputs: the inputs of the block, one entry per batch, as in `Block`. device: where it computes. weights: its
    tensors, by their names inside the live block. computed: its outputs so far, by the number of the batch.
    """

    inputs: Sequence[BlockInputs]
    device: torch.device
    weights: dict[str, Tensor] = field(default_factory=dict)
    computed: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def start(cls, io: BlockIO, component: Component, names: Sequence[str], batches: Sequence[Batch]) -> "SourceStream":
        """The stream at the component's block `names[0]`; everything upstream of it runs with the source's weights."""
        inputs = first_block_inputs(io, component, names, batches, io.checkpoint.read)
        return cls(inputs, io.device.torch_device)

    def enter(self, io: BlockIO, block: str) -> None:
        """Keep the source's weights of the block, which is loaded; its own weights stay in it."""
        tensors, finished = io.tensors_under(block), io.is_finished(block)
        if finished:
            io.stream.load(tensors, io.checkpoint.read)
        self.weights = {io.name_inside(block, name): io.stream.parameter(name) for name in tensors}
        if finished:
            io.stream.load(tensors, io.read)

    def advance(self, module: nn.Module) -> None:
        """Make the outputs of the block the inputs of the next one."""
        for entry, output in zip(self.inputs, self.outputs(module), strict=True):
            entry.accept(output.to(self.device))
        self.computed, self.weights = {}, {}

    def outputs(self, module: nn.Module) -> list[Tensor]:
        """The outputs of the live block `module` with the source's weights, by batch, where the inputs are stored."""
        for number in range(len(self.inputs)):
            if number not in self.computed:
                self.run(number, module)
        return [self.computed[number] for number in range(len(self.inputs))]

    def run(self, number: int, module: nn.Module) -> None:
        """Run `module` with the source's weights on a batch, and keep its output unless a hook ends the pass."""
        entry = self.inputs[number]
        output = entry.run(self.block(module), self.device)
        if output is not None:
            self.computed[number] = output.to(entry.hidden.device)

    def block(self, module: nn.Module) -> Callable[..., Any]:
        """The live block `module` with the source's weights, as a function; hooks of its modules run."""
        return with_weights(module, self.weights)


def with_weights(module: nn.Module, weights: dict[str, Tensor]) -> Callable[..., Any]:
    """A function that calls `module` with other tensors, named as inside the module."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return functional_call(module, weights, args, kwargs)

    return run


def lower_weights(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """The smaller of two token weights, f32 `[batch, tokens]`; None means 1 everywhere."""
    if first is None or second is None:
        return second if first is None else first
    return torch.minimum(first, second)


def split_batches(count: int) -> tuple[list[int], list[int]]:
    """Numbers of the batches to fit on, and of those held out to judge the fit: every eighth, at least one of four.

    With fewer than four batches none is held out.
    """
    held_out = [i for i in range(count) if i % 8 == min(7, count - 1)] if count >= 4 else []
    return [i for i in range(count) if i not in held_out], held_out
