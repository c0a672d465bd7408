"""One block of the model while it is quantized: its weights, its inputs, and what methods do with both."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from exporter.errors import CalibrationError
from exporter.inference.forward_hooks import watch_inputs
from exporter.methods import METHODS
from exporter.model.families import Component
from exporter.numerics.quantized import QuantizedLinear
from exporter.numerics.source_error import MOST, source_error
from exporter.planning.plan import PlanRow, Unit, stored_scale_dtype
from exporter.quantization.block_inputs import (
    BlockInputs,
    check_excluded,
    cleaned,
    counted_rows,
    finite_rows,
    unnoted,
    weighted,
)
from exporter.quantization.block_io import BlockIO
from exporter.quantization.workdir import UnitResult


@dataclass(frozen=True)
class Block:
    """A block of which `unit` quantizes linears.

    inputs: of the block, one entry a batch. Empty when no method of the unit needs them: then the block is not in
    memory, its weights are read one at a time, and only `quantize` can be called.
    """

    io: BlockIO
    component: Component
    unit: Unit
    inputs: Sequence[BlockInputs] = ()

    @property
    def module(self) -> nn.Module:
        """The live module."""
        return self.io.stream.module(self.unit.block)

    @property
    def tensors(self) -> list[str]:
        """Checkpoint names of its tensors."""
        return self.io.tensors_under(self.unit.block)

    def parameter(self, name: str) -> Tensor:
        """A tensor of the block by its checkpoint name."""
        return self.io.stream.parameter(name)

    def put(self, name: str, tensor: Tensor) -> None:
        """Replace a tensor of the block; the old one is left as it is."""
        self.io.stream.put(name, tensor)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors back."""
        for name, tensor in tensors.items():
            self.put(name, tensor)

    def put_quantized(self, result: UnitResult) -> None:
        """Replace weights by those that codes stand for, one at a time: a second block of them would not be small."""
        for row in self.unit.rows:
            self.put(row.tensor.name, result.linears[row.module].as_served())

    def outputs(self, batches: int | None = None) -> Iterator[Tensor]:
        """The block's outputs for the first `batches` batches (None: all), weighted as their tokens count.

        Tokens that are not finite are zeros.
        """
        for entry in self.inputs[:batches]:
            output = entry.output(self.module, self.io.device.torch_device)
            yield weighted(output if torch.isfinite(output).all() else cleaned(output), entry.weights)

    def gather(self, rows: Sequence[PlanRow]) -> dict[str, Any]:
        """Statistics of the inputs of linears over all batches, by linear; none for methods without statistics.

        Rows of the inputs that are not finite are left out. CalibrationError when they are too many.
        """
        kinds = {row.linear: METHODS[row.rule.method].Statistics for row in rows if row.rule}
        watched = [row for row in rows if kinds.get(row.linear) is not None]
        if not watched or not self.inputs:
            return {}
        statistics, _ = self._one_pass(watched, kinds, clean=False)
        damaged = [row for row in watched if not statistics[row.linear].is_finite()]
        if damaged:
            again, excluded = self._one_pass(damaged, kinds, clean=True)
            check_excluded(self.unit.block, self.inputs, also=max(excluded.values()))
            for row in damaged:
                if not again[row.linear].is_finite():
                    raise CalibrationError(f"{row.module}: its inputs are too large to be squared in float32")
            statistics |= again
        return statistics

    def _one_pass(
        self, rows: Sequence[PlanRow], kinds: Mapping[str, Any], clean: bool
    ) -> tuple[dict[str, Any], dict[str, int]]:
        """Statistics by linear, and how many rows of its input were left out because they are not finite."""
        device = self.io.device.torch_device
        statistics = {row.linear: kinds[row.linear](row.tensor.shape[1], device) for row in rows}
        excluded = dict.fromkeys(statistics, 0)
        linears = {row.linear: self.io.stream.module(row.module) for row in rows}
        for entry in self.inputs:

            def see(name: str, x: Tensor, entry: BlockInputs = entry) -> None:
                counted, weights = counted_rows(x, None if name in self.component.unpadded else entry.weights)
                if clean:
                    finite, weights = finite_rows(counted, weights)
                    excluded[name] += len(counted) - len(finite)
                    counted = finite
                statistics[name].update(counted, weights)

            with watch_inputs(linears, see, stop=True):
                entry.run(self.module, device)
        return statistics, excluded

    def quantize(self) -> UnitResult:
        """Quantize the unit's linears, each on inputs that show the errors of those before it.

        Leaves the quantized weights in the block when it is in memory.
        """
        linears: dict[str, QuantizedLinear] = {}
        errors: dict[str, float] = {}
        notes = [f"{self.unit.block}: {note}" for note in unnoted(self.inputs)]
        for rows in self._stacks():
            statistics = self.gather(rows[:1]).get(rows[0].linear)
            weights = [self._weight(row) for row in rows]
            rule, scheme = rows[0].rule, rows[0].scheme
            assert rule is not None
            assert scheme is not None
            whole, remarks = METHODS[rule.method].quantize_linear(
                weights[0] if len(weights) == 1 else torch.cat(weights),
                statistics,
                scheme,
                rule.parsed_options(),
                stored_scale_dtype(rows[0].tensor.dtype),
            )
            notes += [f"{self.unit.block}: {', '.join(row.linear for row in rows)}: {remark}" for remark in remarks]
            parts = whole.split([len(weight) for weight in weights])
            linears |= {row.module: part for row, part in zip(rows, parts, strict=True)}
            errors |= self._errors(rows, parts, weights, statistics)
            del weights, whole, statistics  # not beside the statistics of the next linears
        return UnitResult(linears, errors, tuple(notes))

    def _errors(
        self, rows: Sequence[PlanRow], linears: Sequence[QuantizedLinear], weights: Sequence[Tensor], statistics: Any
    ) -> dict[str, float]:
        """Relative error of each quantized linear by module; puts the quantized weights into the live block."""
        errors = {}
        for row, linear, weight in zip(rows, linears, weights, strict=True):
            _refuse_lost(row, source_error(weight, linear, statistics))
            served = linear.as_served()
            errors[row.module] = relative_error(weight, served, statistics)
            if self.inputs:
                self.put(row.tensor.name, served)
        return errors

    def _stacks(self) -> Iterator[list[PlanRow]]:
        """Rows that one call may quantize, in data order: same input, same rule.

        Rows of a weight do not influence each other, except through the one scale of a "tensor" scheme.
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
        """The weight f32 `[out, in]`, of the live block when it is in memory."""
        read = self.parameter if self.inputs else self.io.checkpoint.read
        weight = read(row.tensor.name).to(self.io.device.torch_device, torch.float32)
        if not torch.isfinite(weight).all():
            raise self.io.checkpoint.not_finite(row.tensor.name)
        return weight


def _refuse_lost(row: PlanRow, error: float) -> None:
    """CalibrationError when a quantized weight is further from the source's than its bits explain."""
    if error <= MOST:
        return
    scheme = row.scheme
    assert scheme is not None
    much = f"its error is {error:.0f} times as large as {scheme.label()} explains"
    lost = much if error < float("inf") else "rows of it became zero"
    raise CalibrationError(
        f"{row.module}: the quantized weight does not hold the source's: {lost}",
        "this is a fault of mmq or of a kernel, please report it; bits: 16 for this component leaves it as it is",
    )


def relative_error(weight: Tensor, approximation: Tensor, statistics: Any) -> float:
    """Size of the output's error over the size of the output on the calibration rows; without statistics, of weights.

    weight, approximation: f32 `[out, in]`.
    """
    if statistics is None:
        return float(torch.linalg.norm(weight - approximation) / torch.linalg.norm(weight).clamp_min(1e-30))
    lost, whole = statistics.energy(weight - approximation), statistics.energy(weight)
    return float((max(lost, 0.0) / max(whole, 1e-30)) ** 0.5)  # rounding can bring a tiny loss below zero
