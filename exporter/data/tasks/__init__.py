"""Tasks (vqa, captioning, retrieval): scoring of answers.

Enters: samples with their references, and answers.
Leaves: one score per sample for each metric.
May import: no other room.

To add a task, write `data/tasks/NAME.py` with the functions of `Task` and add a line to `TASKS`. The family defines the
prompts, the data source the samples.
"""

from collections.abc import Container, Mapping, Sequence
from typing import Protocol

from exporter.data.tasks import captioning, retrieval, vqa
from exporter.data.tasks.sample import Sample


class Task(Protocol):
    """A module that scores answers."""

    @property
    def NAME(self) -> str:
        """The key in `TASKS`."""

    @property
    def METRICS(self) -> tuple[str, ...]:
        """Names of the metrics. Higher is better; an empty answer scores 0. The first measured one is the main one."""

    @property
    def DEFAULT(self) -> tuple[str, ...]:
        """The metrics of every evaluation; the others are measured for gates and for data that names them."""

    @property
    def ALONE(self) -> tuple[str, ...]:
        """The metrics whose score of an answer does not depend on the other samples."""

    @property
    def CORPUS(self) -> tuple[str, ...]:
        """Names of the scores in `corpus`, without those by kind."""

    def method(self) -> Mapping[str, str]:
        """Settings that scores depend on, besides answers and samples; recorded in the report."""

    def score(self, answers: Sequence[str], samples: Sequence[Sample]) -> dict[str, list[float]]:
        """Metric -> one score per sample, in order. The metric is their mean, so two models can be compared in pairs.

        Raises DataError if a sample has no reference, ValueError if the lengths differ.
        """

    def chance(
        self, answers: Sequence[str], samples: Sequence[Sample], metrics: Sequence[str]
    ) -> dict[str, list[float]]:
        """Metric -> score per sample of a baseline answer that does not depend on the picture.

        A model that scores no better ignores its pictures, or its prompts are wrong. answers: the model's answers, in
        the order of `samples`.
        """

    def corpus(self, answers: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
        """Scores of the whole set, as papers report them; some are not means over samples."""


def measured(task: str, samples: Sequence[Sample], gated: Sequence[str] = ()) -> tuple[str, ...]:
    """The metrics of an evaluation, in the task's order: its default ones, those of the samples, those of gates."""
    names = {*TASKS[task].DEFAULT, *gated, *(metric for sample in samples for metric in sample.metrics)}
    return tuple(metric for metric in TASKS[task].METRICS if metric in names)


def highest(metric: str) -> float:
    """The highest score that a metric can have."""
    return 10.0 if metric == "cider" else 1.0


def main_metric(task: str, metrics: Container[str]) -> str:
    """The main metric among those that were measured, `metrics`: the first in the task's order."""
    return next((metric for metric in TASKS[task].METRICS if metric in metrics), TASKS[task].DEFAULT[0])


TASKS: dict[str, Task] = {"vqa": vqa, "captioning": captioning, "retrieval": retrieval}
