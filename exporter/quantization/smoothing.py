"""Column scales for one live block: search them, fold them, and keep them only when the block got better."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from exporter.inference.forward_hooks import watch_inputs
from exporter.methods import SMOOTHERS
from exporter.model.families import Smoothing
from exporter.numerics.scale_folding import fold, misfit
from exporter.planning.plan import PlanRow, Unit, stored_scale_dtype
from exporter.quantization.block import Block
from exporter.quantization.block_inputs import BlockInputs, cleaned
from exporter.quantization.workdir import UnitResult

CHECKED = 4  # batches on which the whole block is compared with and without smoothing, unless a search runs it on all
ROUNDING = 1e-5  # relative difference of float32 outputs that the order of sums explains
ROUNDING_16 = 1e-3  # the same where the block computes in 16 bits


def smooths(unit: Unit) -> bool:
    """Whether a method in this unit moves scales."""
    return any(smooths_row(row) for row in unit.rows)


def smooths_row(row: PlanRow) -> bool:
    """Whether this linear's method moves scales."""
    return row.rule is not None and row.rule.method in SMOOTHERS


def checked_batches(unit: Unit) -> int | None:
    """On how many batches the whole block is run to be compared; None for all of them."""
    return None if any(row.rule and row.rule.parsed_options().runs_block for row in unit.rows) else CHECKED


@dataclass(frozen=True)
class Truth:
    """The outputs of a block before anything in it changed, for its first `batches` batches (None: all)."""

    outputs: Sequence[Tensor]
    batches: int | None

    @classmethod
    def of(cls, block: Block) -> "Truth":
        """Run the block as it is."""
        batches = checked_batches(block.unit)
        kept = (output.cpu() if batches is None else output for output in block.outputs(batches))
        return cls(list(kept), batches)  # all outputs would not be small on a device

    def error(self, block: Block) -> float:
        """Relative error of the block's outputs now."""
        return _distance(block.outputs(self.batches), self.outputs)


class Folding:
    """A second try at a block: quantized once as it is, then with scales folded; the better result stays in it.

    The caller quantizes the block before `fold`, and again when that returns True; then it asks for `best`.
    """

    def __init__(self, block: Block) -> None:
        self._block = block
        self._original = {name: block.parameter(name).clone() for name in block.tensors}
        self._truth = Truth.of(block)
        self._plain_error = 0.0
        self._notes: list[str] = []
        self._altered: dict[str, Tensor] = {}

    @classmethod
    def start(cls, block: Block) -> "Folding | None":
        """Remember the block as it is; None when no method of its unit moves scales."""
        return cls(block) if block.inputs and smooths(block.unit) else None

    def fold(self, plain: UnitResult) -> bool:
        """Take the quantized weights `plain` out again and fold the best scales; False when no scales help."""
        block = self._block
        self._plain_error = self._truth.error(block)
        block.restore(self._original)
        folded, self._notes = _fold_all(block, self._truth)
        if folded:
            self._altered = _altered(block, self._original)
        else:
            block.put_quantized(plain)
        return folded

    def best(self, plain: UnitResult, smoothed: UnitResult | None) -> UnitResult:
        """The result with the smaller error of the block, which is left in it.

        smoothed: None when nothing was folded. A note says when smoothing made the block worse.
        """
        if smoothed is None:
            return replace(plain, notes=(*plain.notes, *self._notes))
        error = self._truth.error(self._block)
        if error < self._plain_error:
            return replace(smoothed, notes=(*smoothed.notes, *self._notes), altered=self._altered)
        self._block.restore(self._original)
        self._block.put_quantized(plain)
        note = f"smoothing left out, it made the block's error {error:.4f} instead of {self._plain_error:.4f}"
        return replace(plain, notes=(*plain.notes, *self._notes, f"{self._block.unit.block}: {note}"))


def _altered(block: Block, original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that folds changed and that are not quantized, as the artifact stores them."""
    planned = {row.tensor.name for row in block.unit.rows}
    changed = [name for name in original if not torch.equal(block.parameter(name), original[name])]
    dtypes = block.io.checkpoint.tensors
    return {name: block.parameter(name).to(dtypes[name].dtype) for name in changed if name not in planned}


def _distance(outputs: Iterable[Tensor], truth: Sequence[Tensor]) -> float:
    """Relative error of the block's outputs."""
    lost = sum(float((a.float() - b.to(a.device).float()).square().sum()) for a, b in zip(outputs, truth, strict=True))
    whole = sum(float(b.float().square().sum()) for b in truth)
    return float((lost / max(whole, 1e-30)) ** 0.5)


def _fold_all(block: Block, truth: Truth) -> tuple[bool, list[str]]:
    """Search and fold the scales of every smoothing whose targets the unit quantizes with one smoothing rule.

    False when no scales helped, so that the block is as it was; and notes about folds that are not exact.
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
        scales, before, after = _search(block, smoothing, rows, statistics, truth)
        if after < before:
            folded = True
            _, changed = fold(block.module, smoothing.source, smoothing.targets, smoothing.rows, scales)
            for name in changed:
                _round_as_stored(block, f"{block.unit.block}.{name}", rows)
    sources = ", ".join(smoothing.source for smoothing in inexact)
    why = "no scales are moved out of it: in this model that would change what the block computes"
    return folded, [f"{block.unit.block}: {sources}: {why}"] if inexact else []


def _search(
    block: Block, smoothing: Smoothing, rows: Mapping[str, PlanRow], statistics: Mapping[str, object], truth: Truth
) -> tuple[Tensor, float, float]:
    """The best scales f32 `[in]` for a smoothing's targets, and the error without and with them."""
    first = rows[smoothing.targets[0]]
    rule, scheme = first.rule, first.scheme
    assert rule is not None
    assert scheme is not None
    method, options = SMOOTHERS[rule.method], rule.parsed_options()
    names = [rows[target].tensor.name for target in smoothing.targets]
    weights = [block.parameter(name).float() for name in names]
    dtype = stored_scale_dtype(first.tensor.dtype)
    if not options.runs_block:
        return method.find_scales(weights, statistics[first.linear], scheme, options, dtype)
    candidates = method.candidates(weights, statistics[first.linear], scheme, options)
    return method.best(
        (scales, _error_with(block, names, method.rounded(weights, scales, scheme, dtype), truth))
        for scales in candidates
    )


def _error_with(block: Block, names: Sequence[str], weights: Iterable[Tensor], truth: Truth) -> float:
    """The block's error with other weights in it, which are taken out again."""
    own = {name: block.parameter(name) for name in names}
    for name, weight in zip(names, weights, strict=True):
        block.put(name, weight)
    error = truth.error(block)
    block.restore(own)
    return error


def folds_exactly(block: Block, smoothing: Smoothing) -> bool:
    """Whether the live block computes the same after a fold; its weights are as before when this returns.

    Norms that multiply by `1 + weight`, or that feed more than the targets, fail. The scales are powers of two, which
    floating-point numbers are multiplied by without rounding, so that a fold that is exact shows no difference even in
    16 bits. The difference is compared with the change that the block makes to its input, which can be much smaller
    than its output.
    """
    entry = next((entry for entry in block.inputs if _reaches(block, entry, smoothing.targets)), None)
    if entry is None:
        return False
    device = block.io.device.torch_device
    before, hidden = cleaned(entry.output(block.module, device)), entry.hidden.to(device)
    own = {name: block.parameter(name) for name in block.tensors}
    columns = block.parameter(f"{block.unit.block}.{smoothing.targets[0]}.weight").shape[1]
    scales = 2.0 ** torch.randint(-1, 2, (columns,), generator=torch.Generator().manual_seed(0))
    fold(block.module, smoothing.source, smoothing.targets, smoothing.rows, scales.to(device))
    after = cleaned(entry.output(block.module, device))
    block.restore(own)
    size = before.float() - hidden.float() if before.shape == hidden.shape else before.float()
    difference = float((after.float() - before.float()).norm() / size.norm().clamp_min(1e-30))
    return difference <= (ROUNDING if before.dtype == torch.float32 else ROUNDING_16)


def _reaches(block: Block, entry: BlockInputs, linears: Sequence[str]) -> bool:
    """Whether the block runs all of its `linears` on this batch."""
    reached: set[str] = set()
    live = {name: block.module.get_submodule(name) for name in linears}
    with watch_inputs(live, lambda name, _: reached.add(name), stop=True):
        entry.run(block.module, block.io.device.torch_device)
    return len(reached) == len(linears)


def _round_as_stored(block: Block, name: str, rows: Mapping[str, PlanRow]) -> None:
    """Live float32 tensors that the artifact keeps in 16 bits get the value they will have there."""
    planned = {row.tensor.name for row in rows.values()}
    if name not in planned:
        block.put(name, block.parameter(name).to(block.io.checkpoint.tensors[name].dtype))


def _applies(smoothing: Smoothing, rows: Mapping[str, PlanRow]) -> bool:
    """Whether the unit quantizes all targets with one rule whose method moves scales."""
    targets = [rows[target] for target in smoothing.targets if target in rows]
    alike = all(row.rule == targets[0].rule for row in targets)
    return len(targets) == len(smoothing.targets) and alike and smooths_row(targets[0])
