"""Predicts the seconds that steps take, from operation counts and the measured rates of the device."""

from collections.abc import Sequence

from exporter.device import Device
from exporter.methods import METHODS, SMOOTHERS
from exporter.model.checkpoint import Checkpoint
from exporter.model.families import Family
from exporter.planning.decisions import PlanRow
from exporter.planning.placement import Placement
from exporter.planning.rates import BLOCK, PICTURE, rates
from exporter.planning.recipe import Recipe
from exporter.planning.rule import TUNE_CHECKS
from exporter.planning.whole_model import WholeModel

SEARCH_FACTOR = 2.2  # passes of a method that searches scales, over those of a method that does not (9 instead of 4)
ANSWER_SHARE = 0.5  # share of the longest allowed answer that the slowest sample of a batch generates
CHECKED_SHARE = 1 / 8  # share of the batches on which learned rounding is compared
CHECK_SAMPLES, CHECK_PASSES = 16, 9  # samples of `mmq check`, and its forward passes per sample


def quantize_seconds(
    recipe: Recipe, checkpoint: Checkpoint, family: Family, planned: Sequence[PlanRow], device: Device
) -> float:
    """Predicted seconds to quantize the `planned` linears: forward passes, Hessians, and the passes of the methods.

    Each block runs once up to each group of linears that share an input, and once as a whole.
    """
    speed, seconds = rates(device), 0.0
    tokens = {c.name: recipe.calibration.samples * c.tokens(checkpoint.config) for c in family.components}
    weights_before: dict[str, int] = {}  # block -> weights of its linears that were counted so far
    hessians: set[tuple[str, int, str]] = set()
    for row in planned:
        assert row.rule is not None
        searches, (rows, columns) = row.rule.method in SMOOTHERS, row.tensor.shape
        solutions = 2 if row.rule.fold else 1  # without and with scales
        if row.block not in weights_before:
            seconds += BLOCK
        if row.rule.learned_steps:
            seconds += _tune_seconds(recipe, row, tokens[row.component], device)
        if METHODS[row.rule.method].Statistics is None:  # blocks with statistics are loaded in the background
            seconds += row.tensor.size / speed.weights + row.tensor.bytes / speed.load
            weights_before.setdefault(row.block, 0)
            continue
        phase = next(phase[0] for phase in family.component(row.component).phases if row.linear in phase)
        passes = SEARCH_FACTOR if row.rule.smoother else 1.0
        seconds += 2 * tokens[row.component] * row.tensor.size / speed.passes if row.rule.corrects else 0.0
        offset = weights_before.get(row.block, 0)
        seconds += passes * 2 * tokens[row.component] * row.tensor.size / speed.passes
        if (row.block, columns, phase) not in hessians:
            hessians.add((row.block, columns, phase))
            seconds += passes * 2 * tokens[row.component] * (columns**2 / speed.squares + offset / speed.passes)
            seconds += 0 if searches else solutions * columns**3 / speed.solves
            seconds += _correct_seconds(row, tokens[row.component], offset, device) if row.rule.corrects else 0.0
        seconds += row.tensor.size / speed.search if searches else solutions * 2 * rows * columns**2 / speed.solves
        weights_before[row.block] = offset + row.tensor.size
    return seconds


def _correct_seconds(row: PlanRow, tokens: int, offset: int, device: Device) -> float:
    """Predicted seconds to correct linears that share an input.

    Both models run once more up to them, for which the second moments of the mismatch and a factorization follow.
    offset: weights of the block before them.
    """
    speed, columns = rates(device), row.tensor.shape[1]
    return 2 * tokens * (columns**2 / speed.squares + 2 * offset / speed.passes) + columns**3 / speed.solves


def _tune_seconds(recipe: Recipe, row: PlanRow, tokens: int, device: Device) -> float:
    """Predicted seconds to learn the rounding of one linear.

    Every step runs a batch forward and backward; the full-precision model runs once, and the checks run the batches
    that are held out.
    """
    assert row.rule is not None
    speed, steps = rates(device), row.rule.learned_steps
    batch = tokens * recipe.calibration.batch / recipe.calibration.samples
    passes = 3 * steps * batch + (1 + CHECKED_SHARE * TUNE_CHECKS) * tokens
    return steps * row.tensor.size / speed.tune + passes * 2 * row.tensor.size / speed.passes


def evaluate_seconds(recipe: Recipe, family: Family, whole: WholeModel, placement: Placement, device: Device) -> float:
    """Predicted seconds to evaluate both models: loading, picture processing, prompts, and answers token by token."""
    speed, samples = rates(device), recipe.evaluation.samples
    tasks = {gate.task for gate in recipe.gates} or set(family.tasks)
    weight_bytes = whole.weight_bytes(placement.dtype.itemsize)
    seconds = weight_bytes / speed.load
    for task in tasks:
        batches = -(-samples // placement.batch)
        tokens = ANSWER_SHARE * family.max_new_tokens.get(task, 0)
        passes = batches * (1 + tokens)
        seconds += samples * (PICTURE + whole.operations / speed.passes) + passes * whole.depth / speed.token
        seconds += passes * weight_bytes / speed.load if placement.streamed else 0.0
    return 2 * seconds


def check_seconds(whole: WholeModel, device: Device) -> float:
    """Predicted seconds of the reference in `mmq check`: loading and its forward passes."""
    speed = rates(device)
    return whole.weight_bytes(2) / speed.load + CHECK_SAMPLES * CHECK_PASSES * whole.operations / speed.passes
