"""Corrects the weights of linears that share an input for the errors of everything that was quantized before them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from exporter.methods.gptq import inverse_factor
from exporter.model.inference.forward_hooks import watch_inputs
from exporter.numerics.hessian import Statistics
from exporter.numerics.mismatch import Mismatch, fitting_share
from exporter.planning.plan import PlanRow
from exporter.quantization.block_inputs import BlockInputs, counted_rows
from exporter.quantization.source_stream import SourceStream, lower_weights, split_batches

PairedRows = tuple[Tensor, Tensor, Tensor | None]  # rows of both models [rows, in], and their weights [rows]


class Correction:
    """The correction of the weights of linears that share an input; collects how the inputs of both models differ.

    linear: the first of these linears, inside the live `block`. padded: whether its input has the padding of the
    block's. damping: added to the Hessian's diagonal, relative to its mean. last: whether no linears of the block
    follow, so that the passes of the full-precision model go on to the block's end and give its outputs too. The
    correction is fitted on most batches, and its share is chosen on those that are held out.
    """

    def __init__(
        self,
        source: SourceStream,
        inputs: Sequence[BlockInputs],
        block: nn.Module,
        linear: nn.Module,
        padded: bool,
        damping: float,
        last: bool = False,
    ) -> None:
        self._source, self._inputs, self._block, self._linear = source, inputs, block, linear
        self._padded, self._damping, self._last = padded, damping, last
        fitted, self._held_out = split_batches(len(inputs))
        self._fitted = {id(inputs[number]): number for number in fitted}
        self._mismatch: Mismatch | None = None

    def add(self, entry: BlockInputs, x: Tensor) -> None:
        """Add the linear's input `x` in the quantized model for the batch `entry`, unless the batch is held out."""
        if not self._held_out or id(entry) not in self._fitted:
            return
        pair = self._pair(self._fitted[id(entry)], x)
        if pair is not None:
            self._mismatch = self._mismatch or Mismatch(x.shape[-1], self._source.device)
            self._mismatch.update(*pair)

    def add_all(self) -> None:
        """Run every batch that is not held out up to the linear, and add its input."""
        for number in self._fitted.values():
            for x in self._received(number):
                self.add(self._inputs[number], x)

    def corrected(self, weight: Tensor, statistics: Statistics) -> tuple[Tensor, float]:
        """`weight` f32 `[out, in]` moved by a share of the least-squares correction, and the share.

        statistics: of the linears' inputs in the quantized model. The share is 0 with fewer than four batches.
        """
        if self._mismatch is None:
            return weight, 0.0
        upper, _ = inverse_factor(statistics.hessian, self._damping)
        if upper is None:
            return weight, 0.0
        shift = self._mismatch.shift(weight, upper)
        del upper
        self._mismatch = None  # each is as large as the Hessian
        share = fitting_share(weight, shift, self._held_out_pairs())
        return torch.add(weight, shift, alpha=share, out=shift), share

    def _held_out_pairs(self) -> Iterator[PairedRows]:
        for number in self._held_out:
            for x in self._received(number):
                pair = self._pair(number, x)
                if pair is not None:
                    yield pair

    def _pair(self, number: int, x: Tensor) -> PairedRows | None:
        """The linear's inputs in both models for a batch, without padding and without rows that are not finite.

        x: in the quantized model. None when the linear does not run in the full-precision model.
        """
        own, full = self._inputs[number], self._source.inputs[number]
        weights = lower_weights(own.weights, full.weights) if self._padded else None
        for x_full in self._received(number, by_source=True):
            (rows_full, counts), (rows, _) = (counted_rows(tensor, weights) for tensor in (x_full, x))
            finite = torch.isfinite(rows_full).all(-1) & torch.isfinite(rows).all(-1)
            return rows_full[finite], rows[finite], None if counts is None else counts[finite]
        return None

    def _received(self, number: int, by_source: bool = False) -> list[Tensor]:
        """The linear's input when the block runs on a batch; empty when the batch does not run the linear.

        by_source: in the full-precision model, whose pass goes on to the block's end for the last linears.
        """
        received: list[Tensor] = []
        stop = not (by_source and self._last)
        with watch_inputs({"": self._linear}, lambda _, x: received.append(x), stop):
            if by_source:
                self._source.run(number, self._block)
            else:
                self._inputs[number].run(self._block, self._source.device)
        return received


def note(linears: Sequence[tuple[Sequence[PlanRow], float]]) -> str:
    """A note with the share of the correction of each group of linears."""
    shares = ", ".join(f"{rows[0].linear} {share:.2f}" for rows, share in linears)
    return f"corrected for earlier errors, share of the least-squares fit: {shares}"
