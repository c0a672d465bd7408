"""Corrects the weights of linears that share an input for the errors of everything that was quantized before them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from exporter.inference.forward_hooks import watch_inputs
from exporter.methods.gptq import inverse_factor
from exporter.numerics.hessian import Statistics
from exporter.numerics.mismatch import Mismatch, fitting_share
from exporter.planning.plan import PlanRow
from exporter.quantization.block_inputs import BlockInputs, counted_rows
from exporter.quantization.source_stream import SourceStream, lower_weights, split_batches

PairedRows = tuple[Tensor, Tensor, Tensor | None]  # rows of both models [rows, in], and their weights [rows]


def corrected(
    source: SourceStream,
    inputs: Sequence[BlockInputs],
    block: nn.Module,
    linear: nn.Module,
    padded: bool,
    weight: Tensor,
    statistics: Statistics,
    damping: float,
) -> tuple[Tensor, float]:
    """`weight` f32 `[out, in]` moved by a share of the least-squares correction, and the share.

    linear: the first of the linears inside `block` that share an input. padded: whether their input has the padding of
    the block's. statistics: of their inputs in the quantized model. The share is chosen on batches that are held out;
    it is 0 with fewer than four batches.
    """
    fitted, held_out = split_batches(len(inputs))
    if not held_out:
        return weight, 0.0
    upper, _ = inverse_factor(statistics.hessian, damping)
    if upper is None:
        return weight, 0.0
    mismatch = Mismatch(weight.shape[1], weight.device)
    for full, rows, weights in pairs(source, inputs, block, linear, padded, fitted):
        mismatch.update(full, rows, weights)
    shift = mismatch.shift(weight, upper)
    del upper, mismatch  # each is as large as the Hessian
    share = fitting_share(weight, shift, pairs(source, inputs, block, linear, padded, held_out))
    return weight.add(shift, alpha=share), share


def pairs(
    source: SourceStream,
    inputs: Sequence[BlockInputs],
    block: nn.Module,
    linear: nn.Module,
    padded: bool,
    numbers: Sequence[int],
) -> Iterator[PairedRows]:
    """Inputs of a linear in the full-precision model and in the quantized one, batch by batch, without padding.

    Rows with a value that is not finite in either model are left out.
    """
    for number in numbers:
        own, full = inputs[number], source.inputs[number]
        weights = lower_weights(own.weights, full.weights) if padded else None
        received: list[Tensor] = []

        def record(_: str, x: Tensor, received: list[Tensor] = received) -> None:
            received.append(x)

        with watch_inputs({"": linear}, record, stop=True):
            full.run(source.block(block), source.device)
            own.run(block, source.device)
        if len(received) == 2:  # a linear that this batch does not run receives nothing
            (rows_full, counts), (rows, _) = (counted_rows(x, weights) for x in received)
            finite = torch.isfinite(rows_full).all(-1) & torch.isfinite(rows).all(-1)
            yield rows_full[finite], rows[finite], None if counts is None else counts[finite]


def note(linears: Sequence[tuple[Sequence[PlanRow], float]]) -> str:
    """A note with the share of the correction of each group of linears."""
    shares = ", ".join(f"{rows[0].linear} {share:.2f}" for rows, share in linears)
    return f"corrected for earlier errors, share of the least-squares fit: {shares}"
