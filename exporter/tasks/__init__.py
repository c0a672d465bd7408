"""Tasks: how answers are scored.

Enters: samples with their references, and answers.
Leaves: one score per sample for each metric.
May import: no other room.

To add one, write `tasks/NAME.py` with what `Task` requires and add a line to `TASKS`. Prompts belong to the family,
samples to the data source.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from exporter.tasks import captioning, retrieval, vqa
from exporter.tasks.sample import Sample


class Task(Protocol):
    """A module that scores answers."""

    @property
    def NAME(self) -> str:
        """The key in `TASKS`."""

    @property
    def METRICS(self) -> tuple[str, ...]:
        """Names of its metrics, the most important first. Higher is better; an empty answer scores 0 in each."""

    def method(self) -> Mapping[str, str]:
        """What scores depend on besides answers and samples, for the report."""

    def score(self, answers: Sequence[str], samples: Sequence[Sample]) -> dict[str, list[float]]:
        """Metric -> one score a sample, in order. The mean is the metric, so two models can be compared in pairs.

        Raises DataError when a sample has no reference, ValueError when the lengths differ.
        """

    def chance(
        self, answers: Sequence[str], samples: Sequence[Sample], metrics: Sequence[str]
    ) -> dict[str, list[float]]:
        """Metric of `metrics` -> what each sample would score by an answer that does not depend on its picture.

        A model that scores no better than this does not see the pictures, or was asked in the wrong way. answers: the
        model's own, in the order of `samples`.
        """

    def corpus(self, answers: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
        """The figures that papers report for a whole set; where they are no means, `score` cannot give them."""


TASKS: dict[str, Task] = {"vqa": vqa, "captioning": captioning, "retrieval": retrieval}
