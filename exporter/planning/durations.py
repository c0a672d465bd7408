"""About how long steps take, from what there is to compute and the rates of the device."""

from collections.abc import Sequence

from exporter.device import Device
from exporter.methods import METHODS, SMOOTHERS
from exporter.model.checkpoint import Checkpoint
from exporter.model.families import Family
from exporter.planning.decisions import PlanRow
from exporter.planning.placement import Placement
from exporter.planning.rates import BLOCK, PICTURE, rates
from exporter.planning.recipe import Recipe
from exporter.planning.whole_model import WholeModel

SEARCHED = 2.2  # times the passes of a method without a search of scales: nine runs up to a group where it has four
ANSWERED = 0.5  # of the longest answer is generated, of the slowest sample of a batch
QUESTIONS, PASSES = 16, 9  # of `mmq check`: samples, and passes over each


def quantize_seconds(
    recipe: Recipe, checkpoint: Checkpoint, family: Family, planned: Sequence[PlanRow], device: Device
) -> float:
    """Quantizing the `planned` linears: passes up to each group of linears and one whole, Hessians, and the method."""
    speed, seconds = rates(device), 0.0
    tokens = {c.name: recipe.calibration.samples * c.tokens(checkpoint.config) for c in family.components}
    before: dict[str, int] = {}
    squares: set[tuple[str, int, str]] = set()
    for row in planned:
        assert row.rule is not None
        smooths, (rows, columns) = row.rule.method in SMOOTHERS, row.tensor.shape
        if row.block not in before:
            seconds += BLOCK
        if METHODS[row.rule.method].Statistics is None:  # a calibrated block is read while the one before is computed
            seconds += row.tensor.size / speed.weights + row.tensor.bytes / speed.load
            before.setdefault(row.block, 0)
            continue
        phase = next(phase[0] for phase in family.component(row.component).phases if row.linear in phase)
        work = SEARCHED if smooths else 1.0
        reached = before.get(row.block, 0)
        seconds += work * 2 * tokens[row.component] * row.tensor.size / speed.passes
        if (row.block, columns, phase) not in squares:
            squares.add((row.block, columns, phase))
            seconds += work * 2 * tokens[row.component] * (columns**2 / speed.squares + reached / speed.passes)
            seconds += 0 if smooths else columns**3 / speed.solves
        seconds += row.tensor.size / speed.search if smooths else 2 * rows * columns**2 / speed.solves
        before[row.block] = reached + row.tensor.size
    return seconds


def evaluate_seconds(recipe: Recipe, family: Family, whole: WholeModel, held: Placement, device: Device) -> float:
    """Both models: loading each, pictures, prompts, and answers token by token."""
    speed, samples = rates(device), recipe.evaluation.samples
    tasks = {gate.task for gate in recipe.gates} or set(family.tasks)
    weights = whole.weight_bytes(held.dtype.itemsize)
    seconds = weights / speed.load
    for task in tasks:
        batches = -(-samples // held.batch)
        tokens = ANSWERED * family.max_new_tokens.get(task, 0)
        passes = batches * (1 + tokens)
        seconds += samples * (PICTURE + whole.operations / speed.passes) + passes * whole.depth / speed.token
        seconds += passes * weights / speed.load if held.streamed else 0.0
    return 2 * seconds


def check_seconds(whole: WholeModel, device: Device) -> float:
    """The reference's part of `mmq check`: loading and its passes."""
    speed = rates(device)
    return whole.weight_bytes(2) / speed.load + QUESTIONS * PASSES * whole.operations / speed.passes
