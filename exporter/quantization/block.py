"""One transformer block during calibration: input statistics, quantization of its linears, and their errors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from exporter.errors import CalibrationError
from exporter.methods import METHODS
from exporter.model.families import Component
from exporter.model.inference.forward_hooks import watch_inputs
from exporter.numerics.quantized import QuantizedLinear
from exporter.numerics.source_error import MAX_RATIO, source_error
from exporter.planning.plan import PlanRow, Unit, stored_scale_dtype
from exporter.quantization import correction
from exporter.quantization.batch_rounds import PlacedBlock, by_batch, placed_blocks
from exporter.quantization.block_inputs import (
    BlockInputs,
    check_excluded,
    counted_rows,
    excluded_token_notes,
    finite_rows,
    weighted,
    zero_nonfinite,
)
from exporter.quantization.block_io import BlockIO, require_finite
from exporter.quantization.source_stream import SourceStream, lower_weights
from exporter.quantization.workdir import UnitResult


@dataclass(frozen=True)
class Block:
    """A block with the `unit` that lists its linears to quantize.

    inputs: the block's inputs, one entry per batch. When no method of the unit needs them, they are empty, the block
    is not in memory, `quantize` reads one weight at a time from the checkpoint, and no other method may be called.
    source: the full-precision model at this block, for rules that follow it.
    """

    io: BlockIO
    component: Component
    unit: Unit
    inputs: Sequence[BlockInputs] = ()
    source: SourceStream | None = None

    def token_weights(self, number: int) -> Tensor | None:
        """Weights of the tokens of a batch, f32 `[batch, tokens]`, 0 for those that either stream excludes."""
        own = self.inputs[number].weights
        return lower_weights(own, self.source.inputs[number].weights) if self.source else own

    @property
    def module(self) -> nn.Module:
        """The block's module in the live model."""
        return self.io.stream.module(self.unit.block)

    @property
    def tensors(self) -> list[str]:
        """Checkpoint names of the block's tensors."""
        return self.io.tensors_under(self.unit.block)

    def parameter(self, name: str) -> Tensor:
        """The block's live tensor with this checkpoint name."""
        return self.io.stream.parameter(name)

    def put(self, name: str, tensor: Tensor) -> None:
        """Replace a tensor of the block by another tensor; the old tensor object is not modified."""
        self.io.stream.put(name, tensor)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put saved tensors back into the block, by checkpoint name."""
        for name, tensor in tensors.items():
            self.put(name, tensor)

    def put_quantized(self, result: UnitResult) -> None:
        """Replace each weight by its dequantized value, one at a time to avoid a second copy of the block."""
        for row in self.unit.rows:
            self.put(row.tensor.name, result.linears[row.module].as_served())

    def outputs(self, batches: int | None = None) -> Iterator[Tensor]:
        """The block's outputs for the first `batches` batches (None: all), scaled by the square roots of token weights.

        Tokens with a non-finite value are zeros.
        """

        def output(block: PlacedBlock, entry: BlockInputs) -> Tensor:
            output = entry.output(block.module, block.device)
            return weighted(output if torch.isfinite(output).all() else zero_nonfinite(output), entry.weights)

        yield from by_batch(placed_blocks(self.module, self.io.device), self.inputs[:batches], output)

    def gather(
        self, rows: Sequence[PlanRow], see: Callable[[BlockInputs, Tensor], None] | None = None
    ) -> dict[str, Any]:
        """Input statistics over all batches, by linear; linears whose method uses no statistics are absent.

        see: called with every batch and the input of each linear in it. Input rows with a non-finite value are
        excluded. CalibrationError when too many rows are excluded, or when the squares of finite inputs overflow
        float32.
        """
        kinds = {row.linear: METHODS[row.rule.method].Statistics for row in rows if row.rule}
        watched = [row for row in rows if kinds.get(row.linear) is not None]
        if not watched or not self.inputs:
            return {}
        statistics, _ = self._gather_once(watched, kinds, clean=False, see=see)
        damaged = [row for row in watched if not statistics[row.linear].is_finite()]
        if damaged:
            clean, excluded = self._gather_once(damaged, kinds, clean=True)
            check_excluded(self.unit.block, self.inputs, also=max(excluded.values()))
            for row in damaged:
                if not clean[row.linear].is_finite():
                    raise CalibrationError(f"{row.module}: the squares of its inputs overflow float32")
            statistics |= clean
        return statistics

    def _gather_once(
        self,
        rows: Sequence[PlanRow],
        kinds: Mapping[str, Any],
        clean: bool,
        see: Callable[[BlockInputs, Tensor], None] | None = None,
    ) -> tuple[dict[str, Any], dict[str, int]]:
        """Statistics by linear, and the number of excluded input rows by linear (0 unless `clean`).

        clean: exclude input rows with a non-finite value.
        """
        blocks = placed_blocks(self.module, self.io.device)
        shares = [
            {row.linear: kinds[row.linear](row.tensor.shape[1], block.device) for row in rows} for block in blocks
        ]
        linears = {row.linear: self.io.stream.module(row.module) for row in rows}

        def run(block: PlacedBlock, entry: BlockInputs) -> dict[str, int]:
            excluded, received = dict.fromkeys(linears, 0), list[Tensor]()

            def update(name: str, x: Tensor) -> None:
                if see:
                    received.append(x)
                counted, weights = counted_rows(x, None if name in self.component.unpadded else entry.weights)
                if clean:
                    finite, weights = finite_rows(counted, weights)
                    excluded[name] += len(counted) - len(finite)
                    counted = finite
                shares[block.index][name].update(counted, weights)

            watched = {name: block.module_for(linear) for name, linear in linears.items()}
            with watch_inputs(watched, update, stop=True):
                entry.run(block.module, block.device)
            if see:
                for x in received:
                    see(entry, x)
            return excluded

        counts = list(by_batch(blocks, self.inputs, run))
        excluded = {name: sum(count[name] for count in counts) for name in linears}
        return _summed(shares), excluded

    def quantize(self) -> UnitResult:
        """Quantize the unit's linears in data order; each is calibrated on inputs computed with the quantized ones.

        When the block is in memory, its weights are replaced by the dequantized ones.
        """
        linears: dict[str, QuantizedLinear] = {}
        errors: dict[str, float] = {}
        kept: dict[str, Tensor] = {}
        shares: list[tuple[Sequence[PlanRow], float]] = []
        notes = [f"{self.unit.block}: {note}" for note in excluded_token_notes(self.inputs)]
        stacks = list(self._stacks())
        for rows in stacks:
            rule, scheme = rows[0].rule, rows[0].scheme
            assert rule is not None
            assert scheme is not None
            correcting = self._correction(rows[0], rows is stacks[-1])
            statistics = self._statistics(rows[0], correcting)
            weights = [self._weight(row) for row in rows]
            whole = weights[0] if len(weights) == 1 else torch.cat(weights)
            if correcting:
                sizes, weights = [len(weight) for weight in weights], []  # frees them: `whole` holds them too
                whole, share = correcting.corrected(whole, statistics)
                shares.append((rows, share))
                weights = list(whole.split(sizes))
            stacked, remarks = METHODS[rule.method].quantize_linear(
                whole,
                statistics,
                scheme,
                rule.parsed_options(),
                stored_scale_dtype(rows[0].tensor.dtype).torch,
            )
            notes += [f"{self.unit.block}: {', '.join(row.linear for row in rows)}: {remark}" for remark in remarks]
            parts = stacked.split([len(weight) for weight in weights])
            linears |= {row.module: part for row, part in zip(rows, parts, strict=True)}
            if rule.learned_steps:
                dtype = self.parameter(rows[0].tensor.name).dtype
                kept |= {row.module: weight.to(dtype) for row, weight in zip(rows, weights, strict=True)}
            errors |= self._errors(rows, parts, weights, statistics)
            del weights, whole, stacked, statistics  # free them before the next linears' statistics are gathered
        notes += [f"{self.unit.block}: {correction.note(shares)}"] * bool(shares)
        return UnitResult(linears, errors, tuple(notes), weights=kept)

    def _correction(self, row: PlanRow, last: bool) -> correction.Correction | None:
        """The correction of the linears that share the row's input; None when their rule does not correct.

        last: whether the unit has no linears after them.
        """
        if not self.source or not row.rule or not row.rule.corrects:
            return None
        padded, linear = row.linear not in self.component.unpadded, self.io.stream.module(row.module)
        damping = row.rule.parsed_options().correction_damping
        assert damping is not None
        return correction.Correction(self.source, self.inputs, self.module, linear, padded, damping, last)

    def _statistics(self, row: PlanRow, correcting: correction.Correction | None) -> Any:
        """Input statistics of the row's linear, None without; the same passes feed the correction on one device."""
        if correcting is None or self.io.device.others:
            statistics = self.gather([row])
            if correcting:
                correcting.add_all()
        else:
            statistics = self.gather([row], correcting.add)
        return statistics.get(row.linear)

    def _errors(
        self, rows: Sequence[PlanRow], linears: Sequence[QuantizedLinear], weights: Sequence[Tensor], statistics: Any
    ) -> dict[str, float]:
        """Relative error of each quantized linear by module; also puts the dequantized weights into the live block.

        CalibrationError when a weight's error is larger than rounding explains.
        """
        errors = {}
        for row, linear, weight in zip(rows, linears, weights, strict=True):
            _refuse_lost(row, source_error(weight, linear, statistics))
            served = linear.as_served()
            errors[row.module] = relative_error(weight, served, statistics)
            if self.inputs:
                self.put(row.tensor.name, served)
        return errors

    def _stacks(self) -> Iterator[list[PlanRow]]:
        """Plan rows that one call quantizes together, in data order: linears with the same input and the same rule.

        Their weights are concatenated along the outputs. That changes no result, because output rows are quantized
        independently; only a "tensor" scheme shares a scale between rows, so its linears stay alone.
        """
        for phase in self.component.phases:
            stack: list[PlanRow] = []
            for row in (row for row in self.unit.rows if row.linear in phase):
                shared = stack and stack[0].rule == row.rule and row.rule and row.rule.group_size != "tensor"
                if stack and not shared:
                    yield stack
                    stack = []
                stack.append(row)
            if stack:
                yield stack

    def _weight(self, row: PlanRow) -> Tensor:
        """The weight f32 `[out, in]`, from the live block when it is in memory; CheckpointError when not finite."""
        read = self.parameter if self.inputs else self.io.checkpoint.read
        weight = read(row.tensor.name).to(self.io.device.torch_device, torch.float32)
        return require_finite(self.io.checkpoint, row.tensor.name, weight)


def _summed(shares: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Statistics by linear of all devices, on the first one; the others' are freed one at a time."""
    total, *others = shares
    for name, statistics in total.items():
        for share in others:
            statistics.add(share.pop(name))
    return total


def _refuse_lost(row: PlanRow, error: float) -> None:
    """CalibrationError when a quantized weight differs from the source weight by more than rounding explains."""
    if error <= MAX_RATIO:
        return
    scheme = row.scheme
    assert scheme is not None
    excess = f"its error is {error:.0f} times as large as rounding to {scheme.label()} explains"
    reason = excess if error < float("inf") else "some of its rows are zero"
    raise CalibrationError(
        f"{row.module}: the quantized weight does not approximate the source weight: {reason}",
        "this is a bug in mmq or in a kernel, please report it; set bits: 16 to keep this component unquantized",
    )


def relative_error(weight: Tensor, approximation: Tensor, statistics: Any) -> float:
    """Norm of the output error over the norm of the output, on the calibration rows; without statistics, of the weight.

    weight, approximation: f32 `[out, in]`.
    """
    if statistics is None:
        return float(torch.linalg.norm(weight - approximation) / torch.linalg.norm(weight).clamp_min(1e-30))
    error, energy = statistics.energy(weight - approximation), statistics.energy(weight)
    return float((max(error, 0.0) / max(energy, 1e-30)) ** 0.5)  # float rounding can make a tiny error negative
