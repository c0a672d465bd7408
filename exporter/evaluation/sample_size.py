"""Estimate how many test samples a gate needs, before the first evaluation."""

from dataclasses import dataclass

from exporter.data.tasks import retrieval, vqa
from exporter.evaluation.bootstrap import ASSUMED_SD, POINT, half_width, samples_to_exclude, samples_to_resolve
from exporter.planning.recipe import Recipe

ASSUMPTION = "assuming that one answer in ten changes between right and wrong"
RIGHT_OR_WRONG = {  # task -> metrics with scores 0 or 1; the spread of other metrics is unknown before an evaluation
    "vqa": vqa.METRICS,  # ANLS is 0 or above 0.5, and varies less than a score of 0 or 1
    "retrieval": retrieval.METRICS,  # the fraction of a picture's texts varies less than a score of 0 or 1
}


@dataclass(frozen=True)
class Advice:
    """Expected precision of one metric with a recipe's number of samples.

    half_width: half width of the 95 % interval of the drop, in points (a score of 1 is 100 points).
    needed: number of samples for a half width of one point.
    """

    task: str
    metric: str
    samples: int
    half_width: float
    needed: int

    def __str__(self) -> str:
        """The advice as a sentence."""
        return (
            f"{self.task} {self.metric}: {self.samples} samples measure a drop to within {self.half_width:.1f} points; "
            f"{self.needed} samples measure it to within one point"
        )


def advise(recipe: Recipe) -> tuple[Advice, ...]:
    """Advice for every metric of a gate whose spread can be assumed, each once."""
    samples = recipe.evaluation.samples
    reach, needed = half_width(ASSUMED_SD, samples) / POINT, samples_to_resolve(POINT)
    return tuple(
        Advice(task, metric, samples, reach, needed) for task, metric in _gated(recipe) if _is_predictable(task, metric)
    )


def unpredictable(recipe: Recipe) -> str:
    """A sentence about the metrics of gates that `advise` leaves out; empty when there are none."""
    names = [f"{task} {metric}" for task, metric in _gated(recipe) if not _is_predictable(task, metric)]
    if not names:
        return ""
    return f"{', '.join(names)}: the number of samples to resolve a drop is known only after a first evaluation"


def too_few(recipe: Recipe) -> tuple[str, ...]:
    """One sentence per gate that the recipe's number of samples cannot resolve even when no score drops."""
    lines = []
    for gate in recipe.gates:
        name = f"gate {gate.task} {gate.metric}"
        if not gate.max_drop:
            lines.append(f"{name}: no number of samples can exclude every loss (max_drop: 0)")
            continue
        least = samples_to_exclude(gate.max_drop)
        if recipe.evaluation.samples < least:
            lines.append(
                f"{name}: {recipe.evaluation.samples} samples cannot resolve a loss of {gate.max_drop:.1%}, "
                f"which needs at least {least} (--eval-samples {least})"
            )
    return tuple(lines)


def _gated(recipe: Recipe) -> tuple[tuple[str, str], ...]:
    """Task and metric of every gate, each once."""
    return tuple(dict.fromkeys((gate.task, gate.metric) for gate in recipe.gates))


def _is_predictable(task: str, metric: str) -> bool:
    return metric in RIGHT_OR_WRONG.get(task, ())
