"""Tasks: how answers are scored. To add one, write `tasks/NAME.py` with what `Task` asks for and add a line to `TASKS`.

Prompts belong to the family, samples to the data source; a task only scores.
"""

from collections.abc import Sequence
from typing import Protocol

from exporter.tasks import captioning, vqa
from exporter.tasks.sample import Sample


class Task(Protocol):
    """A module that scores answers."""

    @property
    def NAME(self) -> str:
        """The key in `TASKS`."""

    @property
    def METRICS(self) -> tuple[str, ...]:
        """Names of its metrics, the most important first; higher is better, and an empty answer scores 0."""

    def score(self, answers: Sequence[str], samples: Sequence[Sample]) -> dict[str, list[float]]:
        """Metric -> one score a sample, in order. The mean is the metric, so two models can be compared in pairs.

        Raises DataError when a sample has no reference, ValueError when the lengths differ.
        """


TASKS: dict[str, Task] = {"vqa": vqa, "captioning": captioning}
