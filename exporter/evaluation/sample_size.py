"""Estimate how many test samples a gate needs, before the first evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass

from exporter.data.tasks import retrieval, vqa
from exporter.evaluation.bootstrap import ASSUMED_SD, POINT, half_width, samples_to_exclude, samples_to_resolve
from exporter.planning.recipe import Recipe

ASSUMPTION = "assuming that one answer in ten changes between right and wrong"
RIGHT_OR_WRONG = {  # task -> metrics with scores 0 or 1; the spread of other metrics is unknown before an evaluation
    "vqa": vqa.METRICS,  # ANLS is 0 or above 0.5, and varies less than a score of 0 or 1
    "retrieval": retrieval.METRICS,  # the fraction of a picture's texts varies less than a score of 0 or 1
}


NOT_READ: Mapping[str, int] = {}  # no data was read: it is taken to have the recipe's number of samples


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


def advise(recipe: Recipe, available: Mapping[str, int] = NOT_READ) -> tuple[Advice, ...]:
    """Advice for every metric of a gate whose spread can be assumed, each once.

    available: number of test samples that the data has for each task, where it was read.
    """
    needed, predictable = samples_to_resolve(POINT), [pair for pair in _gated(recipe) if _is_predictable(*pair)]
    counts = [available.get(task, recipe.evaluation.samples) for task, _ in predictable]
    return tuple(
        Advice(task, metric, count, half_width(ASSUMED_SD, count) / POINT, needed)
        for (task, metric), count in zip(predictable, counts, strict=True)
        if count
    )


def unpredictable(recipe: Recipe) -> str:
    """A sentence about the metrics of gates that `advise` leaves out; empty when there are none."""
    names = [f"{task} {metric}" for task, metric in _gated(recipe) if not _is_predictable(task, metric)]
    if not names:
        return ""
    return f"{', '.join(names)}: the number of samples to resolve a drop is known only after a first evaluation"


def too_few(recipe: Recipe, available: Mapping[str, int] = NOT_READ) -> tuple[str, ...]:
    """One sentence per gate that the number of samples cannot resolve even when no score drops. available: as above."""
    lines = []
    for gate in recipe.gates:
        name = f"gate {gate.task} {gate.metric}"
        if not gate.max_drop:
            lines.append(f"{name}: no number of samples can exclude every loss (max_drop: 0)")
            continue
        least = samples_to_exclude(gate.max_drop)
        count = available.get(gate.task, recipe.evaluation.samples)
        if count < least:
            more = f"--eval-samples {least}" if count == recipe.evaluation.samples else "the data has no more"
            lines.append(
                f"{name}: {count} samples cannot resolve a loss of {gate.max_drop:.1%}, "
                f"which needs at least {least} ({more})"
            )
    return tuple(lines)


def _gated(recipe: Recipe) -> tuple[tuple[str, str], ...]:
    """Task and metric of every gate, each once."""
    return tuple(dict.fromkeys((gate.task, gate.metric) for gate in recipe.gates))


def _is_predictable(task: str, metric: str) -> bool:
    return metric in RIGHT_OR_WRONG.get(task, ())
