"""Check the listed answers of a report against their samples: which are listed, and the scores that follow from them.

A report lists the answers of some samples: the first ones, and those that changed the score most.
"""

import math
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from PIL import Image

from exporter.data.tasks import TASKS, main_metric
from exporter.data.tasks.sample import Sample
from exporter.errors import DataError
from exporter.evaluation.evaluate import EXAMPLES, MAX_CHANGED
from exporter.evaluation.report_file import AnswerPair, Report, TaskScores

RELATIVE_TOLERANCE = 1e-9  # the order of summation may differ
ABSOLUTE_TOLERANCE = 1e-12


def answer_problems(report: Report) -> Iterator[str]:
    """One line per contradiction between answers, samples and scores, at most one per kind and task."""
    for task, of_task in report.samples.items():
        yield from _of_unchanged(task, of_task)
    for row in (*report.changed, *report.examples):
        samples = report.samples.get(row.task)
        problem = _row_problem(row, samples) if samples else "does not match its samples"
        if problem:
            yield f"the report lists an answer to {row.task} {row.id} that {problem}"
            return
    yield from _of_lists(report)


def _of_unchanged(task: str, of_task: TaskScores) -> Iterator[str]:
    """A problem when the two models have different scores of the same answer."""
    unchanged = set(range(len(of_task.ids))) - set(of_task.changed)
    for metric, scores in of_task.scores.items():
        wrong = [i for i in sorted(unchanged) if not same(scores.before[i], scores.after[i])]
        if wrong:
            yield (
                f"the report has two scores of {task} {metric} for {of_task.ids[wrong[0]]}, although the answers of "
                f"both models are the same ({len(wrong)} such samples)"
            )


def _row_problem(row: AnswerPair, of_task: TaskScores) -> str:
    """Why a listed answer cannot be that of its sample; empty when it can."""
    if row.id not in of_task.ids:
        return "does not match its samples"
    index, first = of_task.ids.index(row.id), of_task.scores[main_metric(row.task, of_task.scores)]
    pair = (first.before[index], first.after[index])
    if (row.image, row.kind, row.scores) != (of_task.pictures[index], of_task.kinds[index], pair):
        return "does not match its samples"
    if (row.question is None) == (row.task == "vqa"):
        return "has no question" if row.question is None else "has a question"
    if (row.before != row.after) != (index in of_task.changed):
        return "is listed as unchanged, but differs" if row.before != row.after else "is listed as changed, but is not"
    return "has other scores than its text" if _scored_otherwise(row, index, of_task) else ""


def _scored_otherwise(row: AnswerPair, index: int, of_task: TaskScores) -> bool:
    """Whether a score that depends only on this answer differs from the score of its text."""
    sample = Sample(row.id, lambda: Image.new("RGB", (1, 1)), row.question, row.references, row.kind)
    task = TASKS[row.task]
    try:
        scored = task.score([row.before, row.after], [sample, sample])
    except DataError:  # without references no score is possible
        return True
    stored = {metric: scores for metric, scores in of_task.scores.items() if metric in task.ALONE}
    return any(
        not same(tuple(scored[metric]), (scores.before[index], scores.after[index]))
        for metric, scores in stored.items()
    )


def _of_lists(report: Report) -> Iterator[str]:
    """Problems unless the lists have the first samples of each task, and the changed ones with the largest loss."""
    lists: list[list[tuple[str, str]]] = []
    for task, of_task in report.samples.items():
        first = of_task.scores[main_metric(task, of_task.scores)]
        losses = {i: first.before[i] - first.after[i] for i in of_task.changed}
        lists.append([(task, of_task.ids[i]) for i in sorted(losses, key=losses.__getitem__, reverse=True)])
        examples = [row.id for row in report.examples if row.task == task]
        if examples != list(of_task.ids[:EXAMPLES]):
            yield f"the listed examples of {task} are not its first samples"
    expected = [row for group in zip_longest(*lists) for row in group if row][:MAX_CHANGED]
    listed = [(row.task, row.id) for row in report.changed]
    if sorted(listed) != sorted(expected):
        task = next(iter(sorted({task for task, _ in set(listed) ^ set(expected)}) or [listed[0][0]]))
        yield f"the listed answers of {task} are not the changed ones with the largest loss"


def same(stored: Any, computed: Any) -> bool:
    """Whether two values are equal, with a tolerance for floating-point numbers."""
    if isinstance(stored, dict) and isinstance(computed, dict):
        return stored.keys() == computed.keys() and all(same(stored[key], computed[key]) for key in stored)
    if isinstance(stored, tuple) and isinstance(computed, tuple):
        return len(stored) == len(computed) and all(map(same, stored, computed))
    if isinstance(stored, float) and isinstance(computed, float):
        return math.isclose(stored, computed, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)
    return bool(stored == computed)
