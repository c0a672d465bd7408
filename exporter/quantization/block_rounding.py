"""Learned rounding of one live block: sign-gradient steps on all its linears, towards its full-precision output.

The block runs on the quantized model's inputs, and the target is the output of the full-precision block on the
full-precision model's inputs, so a block also makes up for the errors of the blocks before it. Some batches are held
out: the state with the smallest error on them is kept, and the start is one of the states.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from exporter.device import repeatable_math
from exporter.methods import MethodOptions
from exporter.model.inference.forward_hooks import watch_inputs
from exporter.numerics.learned_rounding import LearnedLinear
from exporter.numerics.quantized import QuantizedLinear
from exporter.planning.plan import PlanRow
from exporter.planning.rule import TUNE_CHECKS
from exporter.quantization.block import Block
from exporter.quantization.block_inputs import counted_rows, finite_rows
from exporter.quantization.source_stream import split_batches, with_weights
from exporter.quantization.workdir import UnitResult

GRADIENT = 0.05  # root mean square of the error that enters the backward pass: 16-bit floats hold its products


@dataclass(frozen=True)
class Learner:
    """The learned linears of a block, and the outputs that the block should have.

    targets: one per batch. weights: of the tokens of each batch, f32 `[batch, tokens]`, 0 for those that do not count.
    """

    block: Block
    linears: Mapping[str, LearnedLinear]  # by checkpoint name of the weight
    targets: Sequence[Tensor]
    weights: Sequence[Tensor]

    def served(self) -> dict[str, Tensor]:
        """The weights as they are rounded now, by name inside the live block."""
        io, name = self.block.io, self.block.unit.block
        dtype = {tensor: self.block.parameter(tensor).dtype for tensor in self.linears}
        return {io.name_inside(name, tensor): linear.served(dtype[tensor]) for tensor, linear in self.linears.items()}

    def difference(self, number: int, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The block's output on a batch minus its target, weighted, and the output itself (for its graph)."""
        entry, device = self.block.inputs[number], self.block.io.device.torch_device
        output = entry.call(with_weights(self.block.module, weights), device)
        error = output.detach().float() - self.targets[number].to(device).float()
        counted = self.weights[number].to(device).view(*error.shape[:-1], 1)
        return torch.where(counted > 0, error, 0.0) * counted, output

    @torch.no_grad()
    def error(self, numbers: Sequence[int]) -> float:
        """Relative error of the block's output on some batches."""
        served, wrong, energy = self.served(), 0.0, 0.0
        for number in numbers:
            difference, _ = self.difference(number, served)
            wrong += float(difference.square().sum())
            target = torch.nan_to_num(self.targets[number].float(), posinf=0.0, neginf=0.0)
            energy += float(target.square().sum())
        return float((wrong / max(energy, 1e-30)) ** 0.5)

    def step(self, number: int, rounding: float, ranges: float) -> None:
        """One step on a batch."""
        served = {name: tensor.requires_grad_() for name, tensor in self.served().items()}
        with torch.enable_grad():
            difference, output = self.difference(number, served)
        size = difference.square().mean().sqrt()
        if not torch.isfinite(size) or size == 0:
            return
        output.backward((difference * (GRADIENT / size)).to(output.dtype))
        for name, linear in self.linears.items():
            gradient = served[self.block.io.name_inside(self.block.unit.block, name)].grad
            if gradient is not None:  # a linear that this batch does not run has none
                linear.step(gradient, rounding, ranges)


def tune(block: Block, result: UnitResult, targets: Sequence[Tensor]) -> UnitResult:
    """The result with the linears of rules with learned rounding rounded anew; their weights are put into the block.

    targets: the block's outputs in full precision, one per batch.
    """
    rows = [row for row in block.unit.rows if row.rule and row.rule.learned_steps]
    if not rows or not block.inputs:
        return result
    assert rows[0].rule is not None
    options = rows[0].rule.parsed_options()
    linears = {row.tensor.name: LearnedLinear(result.weights[row.module], result.linears[row.module]) for row in rows}
    learner = Learner(block, linears, targets, list(_token_weights(block, targets)))
    with repeatable_math():
        start, best, last, quantized = _learn(learner, options)
    tuned = dict(result.linears) | {row.module: quantized[row.tensor.name] for row in rows}
    for row in rows:
        block.put(row.tensor.name, tuned[row.module].as_served())
    note = f"{block.unit.block}: learned rounding: error of unseen outputs {start:.4f}, then {best:.4f} at step {last}"
    errors = dict(result.errors) | linear_errors(block, rows, result, tuned)
    return replace(result, linears=tuned, errors=errors, notes=(*result.notes, note))


def _learn(learner: Learner, options: MethodOptions) -> tuple[float, float, int, dict[str, QuantizedLinear]]:
    """Run the steps; the error at the start, the smallest error, its step, and the linears at that step."""
    fitted, held_out = split_batches(len(learner.targets))
    judged = held_out or fitted
    steps, rate = options.learned_steps, options.learning_rate
    every = max(1, steps // TUNE_CHECKS)

    def state() -> dict[str, QuantizedLinear]:
        return {name: linear.quantized() for name, linear in learner.linears.items()}

    start = best = learner.error(judged)
    last, quantized = 0, state()
    seed = learner.block.io.plan.recipe.calibration.seed + zlib.crc32(learner.block.unit.block.encode())
    for step, number in enumerate(_order(fitted, steps, seed)):
        left = 1 - step / steps
        learner.step(number, rate * left, rate * left)
        if (step + 1) % every == 0 or step + 1 == steps:
            error = learner.error(judged)
            if error < best:
                best, last, quantized = error, step + 1, state()
    return start, best, last, quantized


def _order(numbers: Sequence[int], steps: int, seed: int) -> Iterator[int]:
    """`steps` batch numbers: all of them in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while done < steps:
        for position in torch.randperm(len(numbers), generator=generator).tolist()[: steps - done]:
            yield numbers[position]
            done += 1


def _token_weights(block: Block, targets: Sequence[Tensor]) -> Iterator[Tensor]:
    """Square roots of the weights of each batch's tokens, f32 `[batch, tokens]`; 0 for targets that are not finite."""
    for i, target in enumerate(targets):
        finite = torch.isfinite(target).all(-1).cpu().view(-1, target.shape[-2]).float()
        weights = block.token_weights(i)
        if weights is not None:
            finite = finite * weights[:, -finite.shape[1] :]
        yield finite.sqrt()


@torch.no_grad()
def linear_errors(
    block: Block, rows: Sequence[PlanRow], result: UnitResult, tuned: Mapping[str, QuantizedLinear]
) -> dict[str, float]:
    """Relative error of each tuned linear's output by module, on its inputs in the tuned block, on the judged batches.

    result: before the linears were `tuned`, with the weights that they approximate.
    """
    fitted, held_out = split_batches(len(block.inputs))
    wrong, energy = dict.fromkeys((row.module for row in rows), 0.0), dict.fromkeys((row.module for row in rows), 0.0)
    live = {row.module: block.io.stream.module(row.module) for row in rows}
    linears = {row.module: row.linear for row in rows}
    for number in held_out or fitted:
        token_weights = block.token_weights(number)

        def add(module: str, x: Tensor, token_weights: Tensor | None = token_weights) -> None:
            unpadded = linears[module] in block.component.unpadded
            counted, _ = finite_rows(*counted_rows(x, None if unpadded else token_weights))
            weight = result.weights[module].to(counted.dtype)
            output = counted @ weight.T
            served = tuned[module].as_served().to(counted.dtype)
            wrong[module] += float((output - counted @ served.T).float().square().sum())
            energy[module] += float(output.float().square().sum())

        with watch_inputs(live, add, stop=False):
            block.inputs[number].run(block.module, block.io.device.torch_device)
    return {module: (wrong[module] / max(energy[module], 1e-30)) ** 0.5 for module in wrong}
