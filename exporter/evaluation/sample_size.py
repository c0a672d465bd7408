"""How many test samples a gate needs, before anything is measured."""

from dataclasses import dataclass

from exporter.evaluation.statistics import ASSUMED_SD, POINT, half_width, samples_to_exclude, samples_to_resolve
from exporter.planning.recipe import Recipe
from exporter.tasks import retrieval

ASSUMPTION = "assuming that one answer in ten changes between right and wrong"
RIGHT_OR_WRONG = {  # by task; of other scores nothing can be assumed
    "vqa": ("accuracy", "exact"),
    "retrieval": retrieval.METRICS,  # shares of a picture's texts vary less than right or wrong
}


@dataclass(frozen=True)
class Advice:
    """What a recipe's number of samples can show of one metric.

    half_width: how far the 95 % interval of the drop reaches to each side, in points (hundredths of a score's 1).
    needed: samples that make it one point.
    """

    task: str
    metric: str
    samples: int
    half_width: float
    needed: int

    def __str__(self) -> str:
        """The advice as a sentence."""
        return (
            f"{self.task} {self.metric}: {self.samples} samples show a drop to within {self.half_width:.1f} points; "
            f"{self.needed} samples resolve one point"
        )


def advise(recipe: Recipe) -> tuple[Advice, ...]:
    """Advice for every metric that a gate names, each once, and of which something can be assumed."""
    samples = recipe.evaluation.samples
    reach, needed = half_width(ASSUMED_SD, samples) / POINT, samples_to_resolve(POINT)
    return tuple(
        Advice(task, metric, samples, reach, needed) for task, metric in _gated(recipe) if _known(task, metric)
    )


def unknown(recipe: Recipe) -> str:
    """A sentence on the metrics that a gate names and `advise` leaves out; empty when there are none."""
    names = [f"{task} {metric}" for task, metric in _gated(recipe) if not _known(task, metric)]
    if not names:
        return ""
    return f"{', '.join(names)}: how many samples resolve a drop can be said after a first evaluation, not before"


def too_few(recipe: Recipe) -> tuple[str, ...]:
    """A sentence for every gate that the recipe's samples cannot resolve, however few of them lose anything."""
    lines = []
    for gate in recipe.gates:
        name = f"gate {gate.task} {gate.metric}"
        if not gate.max_drop:
            lines.append(f"{name}: no number of samples shows that nothing at all is lost (max_drop: 0)")
            continue
        least = samples_to_exclude(gate.max_drop)
        if recipe.evaluation.samples < least:
            lines.append(
                f"{name}: {recipe.evaluation.samples} samples cannot resolve a loss of {gate.max_drop:.1%}, "
                f"which takes at least {least} (--eval-samples {least})"
            )
    return tuple(lines)


def _gated(recipe: Recipe) -> tuple[tuple[str, str], ...]:
    """Task and metric of every gate, each once."""
    return tuple(dict.fromkeys((gate.task, gate.metric) for gate in recipe.gates))


def _known(task: str, metric: str) -> bool:
    return metric in RIGHT_OR_WRONG.get(task, ())
