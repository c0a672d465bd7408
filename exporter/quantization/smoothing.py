"""AWQ-style smoothing of one live block: searches column scales, folds them, and keeps them only if the error falls."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from exporter.methods import SMOOTHERS
from exporter.model.families import Smoothing
from exporter.model.inference.forward_hooks import watch_inputs
from exporter.numerics.scale_folding import fold, misfit, tied
from exporter.planning.plan import PlanRow, Unit, stored_scale_dtype
from exporter.quantization.block import Block
from exporter.quantization.block_inputs import BlockInputs, zero_nonfinite
from exporter.quantization.workdir import UnitResult

CHECKED = 4  # batches on which the block's error is compared with and without smoothing, unless a search runs on all
ROUNDING = 1e-5  # largest relative difference of float32 outputs that the order of summation explains
ROUNDING_16 = 1e-3  # the same limit for a block that computes in 16 bits


def smooths(unit: Unit) -> bool:
    """Whether a method of this unit moves scales between linears."""
    return any(row_moves_scales(row) for row in unit.rows)


def row_moves_scales(row: PlanRow) -> bool:
    """Whether this linear's method moves scales between linears."""
    return row.rule is not None and row.rule.smoother is not None


def comparison_batches(unit: Unit) -> int | None:
    """The number of batches on which the whole block is run to compare errors; None for all batches."""
    return None if any(row.rule and row.rule.parsed_options().runs_block for row in unit.rows) else CHECKED


@dataclass(frozen=True)
class ReferenceOutputs:
    """Outputs of the unmodified block for its first `batches` batches (None: all)."""

    outputs: Sequence[Tensor]
    batches: int | None

    @classmethod
    def of(cls, block: Block) -> "ReferenceOutputs":
        """Run the block as it is now."""
        batches = comparison_batches(block.unit)
        # The outputs of all batches can exceed the device's memory.
        outputs = (output.cpu() if batches is None else output for output in block.outputs(batches))
        return cls(list(outputs), batches)

    def error(self, block: Block) -> float:
        """Relative error of the block's current outputs."""
        return _distance(block.outputs(self.batches), self.outputs)


class Folding:
    """Compares two quantizations of a block, without and with folded scales, and keeps the one with the smaller error.

    The caller quantizes the block, calls `fold`, quantizes it again when `fold` returns True, and then calls `best`.
    """

    def __init__(self, block: Block) -> None:
        self._block = block
        self._original = {name: block.parameter(name).clone() for name in block.tensors}
        self._reference = ReferenceOutputs.of(block)
        self._plain_error = 0.0
        self._notes: list[str] = []
        self._altered: dict[str, Tensor] = {}

    @classmethod
    def start(cls, block: Block) -> "Folding | None":
        """Store the block's weights and outputs; None when no method of its unit moves scales."""
        return cls(block) if block.inputs and smooths(block.unit) else None

    def fold(self, plain: UnitResult) -> bool:
        """Restore the original weights and fold the best scales; False, with `plain` in the block, when none help."""
        block = self._block
        self._plain_error = self._reference.error(block)
        block.restore(self._original)
        folded, self._notes = _fold_all(block, self._reference)
        if folded:
            self._altered = _altered(block, self._original)
        else:
            block.put_quantized(plain)
        return folded

    def best(self, plain: UnitResult, smoothed: UnitResult | None) -> UnitResult:
        """The result with the smaller error of the block's outputs; its weights are left in the block.

        smoothed: None when nothing was folded. A note reports that smoothing increased the error.
        """
        if smoothed is None:
            return replace(plain, notes=(*plain.notes, *self._notes))
        error = self._reference.error(self._block)
        if error < self._plain_error:
            return replace(smoothed, notes=(*smoothed.notes, *self._notes), altered=self._altered)
        self._block.restore(self._original)
        self._block.put_quantized(plain)
        note = f"smoothing left out, it made the block's error {error:.4f} instead of {self._plain_error:.4f}"
        return replace(plain, notes=(*plain.notes, *self._notes, f"{self._block.unit.block}: {note}"))


def _altered(block: Block, original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that folds changed and that are not quantized, in the dtype in which the artifact stores them."""
    planned = {row.tensor.name for row in block.unit.rows}
    changed = [name for name in original if not torch.equal(block.parameter(name), original[name])]
    dtypes = block.io.checkpoint.tensors
    return {name: block.parameter(name).to(dtypes[name].dtype.torch) for name in changed if name not in planned}


def _distance(outputs: Iterable[Tensor], reference: Sequence[Tensor]) -> float:
    """Relative error of outputs: norm of the difference over norm of the reference."""
    pairs = zip(outputs, reference, strict=True)
    error = sum(float((a.float() - b.to(a.device).float()).square().sum()) for a, b in pairs)
    energy = sum(float(b.float().square().sum()) for b in reference)
    return float((error / max(energy, 1e-30)) ** 0.5)


def _fold_all(block: Block, reference: ReferenceOutputs) -> tuple[bool, list[str]]:
    """Search and fold the scales of every smoothing whose targets the unit quantizes with one rule that moves scales.

    Returns whether any scales were folded, and notes about smoothings that were skipped because their fold is inexact.
    """
    rows = {row.linear: row for row in block.unit.rows}
    smoothings = [
        smoothing
        for smoothing in block.component.smoothings
        if _applies(smoothing, rows) and not misfit(block.module, smoothing.source, smoothing.targets, smoothing.rows)
    ]
    inexact = [smoothing for smoothing in smoothings if not folds_exactly(block, smoothing)]
    smoothings = [smoothing for smoothing in smoothings if smoothing not in inexact]
    statistics = block.gather([rows[smoothing.targets[0]] for smoothing in smoothings])
    folded = False
    for smoothing in smoothings:
        scales, before, after = _search(block, smoothing, rows, statistics, reference)
        if after < before:
            folded = True
            _, changed = fold(block.module, smoothing.source, smoothing.targets, smoothing.rows, scales)
            for name in changed:
                _round_as_stored(block, f"{block.unit.block}.{name}", rows)
    sources = ", ".join(smoothing.source for smoothing in inexact)
    why = "no scales are moved out of it: in this model that would change what the block computes"
    return folded, [f"{block.unit.block}: {sources}: {why}"] if inexact else []


def _search(
    block: Block,
    smoothing: Smoothing,
    rows: Mapping[str, PlanRow],
    statistics: Mapping[str, object],
    reference: ReferenceOutputs,
) -> tuple[Tensor, float, float]:
    """The best scales f32 `[in]` for a smoothing's targets, and the error without and with these scales."""
    first = rows[smoothing.targets[0]]
    rule, scheme = first.rule, first.scheme
    assert rule is not None
    assert scheme is not None
    assert rule.smoother is not None
    method = SMOOTHERS[rule.smoother]
    options = method.Options() if rule.fold else rule.parsed_options()
    names = [rows[target].tensor.name for target in smoothing.targets]
    weights = [block.parameter(name).float() for name in names]
    dtype = stored_scale_dtype(first.tensor.dtype).torch
    tie = partial(tied, block.module, smoothing.source, smoothing.targets, smoothing.rows)
    if not options.runs_block:
        return method.find_scales(weights, statistics[first.linear], scheme, options, dtype, tie)
    candidates = map(tie, method.candidates(weights, statistics[first.linear], scheme, options))
    return method.best(
        (scales, _error_with(block, names, method.rounded(weights, scales, scheme, dtype), reference))
        for scales in candidates
    )


def _error_with(block: Block, names: Sequence[str], weights: Iterable[Tensor], reference: ReferenceOutputs) -> float:
    """The block's error with the tensors `names` replaced by `weights`; the original tensors are restored."""
    original = {name: block.parameter(name) for name in names}
    for name, weight in zip(names, weights, strict=True):
        block.put(name, weight)
    error = reference.error(block)
    block.restore(original)
    return error


def folds_exactly(block: Block, smoothing: Smoothing) -> bool:
    """Whether the live block computes the same function after a fold; its original weights are restored.

    Fails for norms that multiply by `1 + weight`, and for sources whose output is read by more than the targets. The
    test scales are powers of two: multiplying by them does not round, so an exact fold makes no difference even in 16
    bits. The difference is divided by the norm of the change that the block makes to its input (its output minus its
    input), because that change can be much smaller than the output.
    """
    entry = next((entry for entry in block.inputs if _reaches(block, entry, smoothing.targets)), None)
    if entry is None:
        return False
    device = block.io.device.torch_device
    before, hidden = zero_nonfinite(entry.output(block.module, device)), entry.hidden.to(device)
    original = {name: block.parameter(name) for name in block.tensors}
    columns = block.parameter(f"{block.unit.block}.{smoothing.targets[0]}.weight").shape[1]
    scales = 2.0 ** torch.randint(-1, 2, (columns,), generator=torch.Generator().manual_seed(0))
    fold(block.module, smoothing.source, smoothing.targets, smoothing.rows, scales.to(device))
    after = zero_nonfinite(entry.output(block.module, device))
    block.restore(original)
    size = before.float() - hidden.float() if before.shape == hidden.shape else before.float()
    difference = float((after.float() - before.float()).norm() / size.norm().clamp_min(1e-30))
    return difference <= (ROUNDING if before.dtype == torch.float32 else ROUNDING_16)


def _reaches(block: Block, entry: BlockInputs, linears: Sequence[str]) -> bool:
    """Whether the block runs all of `linears` on this batch."""
    reached: set[str] = set()
    live = {name: block.module.get_submodule(name) for name in linears}
    with watch_inputs(live, lambda name, _: reached.add(name), stop=True):
        entry.run(block.module, block.io.device.torch_device)
    return len(reached) == len(linears)


def _round_as_stored(block: Block, name: str, rows: Mapping[str, PlanRow]) -> None:
    """Round a live float32 tensor to the 16-bit dtype in which the artifact stores it, unless it is quantized."""
    quantized = {row.tensor.name for row in rows.values()}
    if name not in quantized:
        block.put(name, block.parameter(name).to(block.io.checkpoint.tensors[name].dtype.torch))


def _applies(smoothing: Smoothing, rows: Mapping[str, PlanRow]) -> bool:
    """Whether the unit quantizes all targets with one rule whose method moves scales."""
    targets = [rows[target] for target in smoothing.targets if target in rows]
    same_rule = all(row.rule == targets[0].rule for row in targets)
    return len(targets) == len(smoothing.targets) and same_rule and row_moves_scales(targets[0])
