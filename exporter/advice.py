"""How many test samples a gate needs, before anything is measured."""

from dataclasses import dataclass

from exporter.recipe import Recipe
from exporter.statistics import ASSUMED_SD, POINT, half_width, samples_to_resolve

ASSUMPTION = "assuming that one answer in ten changes between right and wrong"
RIGHT_OR_WRONG = ("accuracy", "exact")  # of other scores nothing can be assumed before a first evaluation


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
    gates = [gate for gate in recipe.gates if gate.metric in RIGHT_OR_WRONG or gate.metric.startswith("r@")]
    named = dict.fromkeys((gate.task, gate.metric) for gate in gates)
    return tuple(Advice(task, metric, samples, reach, needed) for task, metric in named)
