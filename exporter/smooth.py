"""Column scales for one live block: search them, fold them, and keep them only when the block got better."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from exporter.families import Component, Smoothing
from exporter.folds import fold, misfit
from exporter.job import Job
from exporter.methods import METHODS
from exporter.plan import PlanRow, Unit, stored_scale_dtype
from exporter.workdir import UnitResult

CHECKED = 4  # batches on which the whole block is compared with and without smoothing, unless a search runs it on all

Outputs = Callable[[], Iterator[Tensor]]  # the live block's outputs on those batches
Quantize = Callable[[], UnitResult]  # quantizes the live block and leaves the quantized weights in it
Gather = Callable[[Sequence[PlanRow]], Mapping[str, Any]]  # statistics of the inputs of several linears, in one pass


def smooths(unit: Unit) -> bool:
    """Whether a method in this unit moves scales."""
    return any(smooths_row(row) for row in unit.rows)


def smooths_row(row: PlanRow) -> bool:
    """Whether this linear's method moves scales."""
    return row.rule is not None and bool(METHODS[row.rule.method].SMOOTHS)


def checked_batches(unit: Unit) -> int | None:
    """On how many batches the whole block is run to be compared; None for all of them."""
    searches = (getattr(row.rule.parsed_options(), "search", "") for row in unit.rows if row.rule)
    return None if "block" in searches else CHECKED


def quantize_smoothed(
    job: Job, component: Component, unit: Unit, gather: Gather, quantize: Quantize, outputs: Outputs
) -> UnitResult:
    """Quantize the live block without and with smoothing; the better one stays in it.

    A block that smoothing made worse falls back, and a note says so.
    """
    names = job.tensors_under(unit.block)
    original = {name: job.stream.parameter(name).clone() for name in names}
    few = checked_batches(unit) is not None  # all outputs would not be small on a device
    truth = [output if few else output.cpu() for output in outputs()]
    plain = quantize()
    plain_error = _distance(outputs(), truth)
    _restore(job, original)
    if not _fold_all(job, component, unit, gather, lambda: _distance(outputs(), truth)):
        _put_quantized(job, unit, plain)
        return plain
    planned = {row.tensor.name for row in unit.rows}
    altered = {
        name: job.stream.parameter(name).to(job.checkpoint.tensors[name].dtype)
        for name in names
        if name not in planned and not torch.equal(job.stream.parameter(name), original[name])
    }
    smoothed = quantize()
    error = _distance(outputs(), truth)
    if error < plain_error:
        return UnitResult(smoothed.linears, smoothed.errors, smoothed.notes, altered)
    _restore(job, original)
    _put_quantized(job, unit, plain)
    note = f"{unit.block}: smoothing left out, it made the block's error {error:.4f} instead of {plain_error:.4f}"
    return UnitResult(plain.linears, plain.errors, (*plain.notes, note), {})


def _restore(job: Job, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        job.stream.put(name, tensor.clone())


def _put_quantized(job: Job, unit: Unit, result: UnitResult) -> None:
    """The weights that codes stand for, one at a time: a second block of them would not be small."""
    for row in unit.rows:
        job.stream.put(row.tensor.name, result.linears[row.module].as_served())


def _distance(found: Iterable[Tensor], truth: Sequence[Tensor]) -> float:
    """Relative error of the block's outputs."""
    lost = sum(float((a.float() - b.to(a.device).float()).square().sum()) for a, b in zip(found, truth, strict=True))
    whole = sum(float(b.float().square().sum()) for b in truth)
    return float((lost / max(whole, 1e-30)) ** 0.5)


def _fold_all(job: Job, component: Component, unit: Unit, gather: Gather, error: Callable[[], float]) -> bool:
    """Search and fold the scales of every smoothing whose targets this unit quantizes with one smoothing rule.

    error: of the live block's output. False when no scales helped, so that the block is as it was.
    """
    folded = False
    rows = {row.linear: row for row in unit.rows}
    chosen = [smoothing for smoothing in component.smoothings if _applies(smoothing, rows)]
    statistics = gather([rows[smoothing.targets[0]] for smoothing in chosen])
    block = job.stream.module(unit.block)
    for smoothing in chosen:
        if misfit(block, smoothing.source, smoothing.targets, smoothing.rows):
            continue
        first = rows[smoothing.targets[0]]
        rule = first.rule
        assert rule is not None
        names = [rows[target].tensor.name for target in smoothing.targets]
        weights = [job.stream.parameter(name).float() for name in names]
        arguments = (rule.scheme(), rule.parsed_options(), stored_scale_dtype(first.tensor.dtype))
        scales, before, after = METHODS[rule.method].find_scales(
            weights, statistics[first.linear], *arguments, lambda tried, names=names: _with(job, names, tried, error)
        )
        if after < before:
            folded = True
            _, changed = fold(block, smoothing.source, smoothing.targets, smoothing.rows, scales)
            for name in changed:
                _round_as_stored(job, f"{unit.block}.{name}", rows)
    return folded


def _with(job: Job, names: Sequence[str], tried: Iterable[Tensor], error: Callable[[], float]) -> float:
    """The error with other weights in the live block, which then gets its own back."""
    own = [job.stream.parameter(name) for name in names]
    for name, weight in zip(names, tried, strict=True):
        job.stream.put(name, weight)
    found = error()
    for name, weight in zip(names, own, strict=True):
        job.stream.put(name, weight)
    return found


def _round_as_stored(job: Job, name: str, rows: Mapping[str, PlanRow]) -> None:
    """Live float32 tensors that the artifact keeps in 16 bits get the value they will have there."""
    planned = {row.tensor.name for row in rows.values()}
    if name not in planned:
        job.stream.put(name, job.stream.parameter(name).to(job.checkpoint.tensors[name].dtype))


def _applies(smoothing: Smoothing, rows: Mapping[str, PlanRow]) -> bool:
    found = [rows[target] for target in smoothing.targets if target in rows]
    alike = all(row.rule == found[0].rule for row in found)
    return len(found) == len(smoothing.targets) and alike and smooths_row(found[0])
