"""Compare a report with the figures that follow from its scores of single samples."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from exporter.evaluation.judge import Judgement, judge
from exporter.evaluation.report_file import AnswerPair, MetricScores, Report, TaskScores
from exporter.evaluation.statistics import CONFIDENCE, RESAMPLES
from exporter.planning.recipe import Recipe
from exporter.tasks import TASKS

MAX_SCORES = {("captioning", "cider"): 10.0}  # all other metrics have scores from 0 to 1
RELATIVE_TOLERANCE = 1e-9  # the order of summation may differ
ABSOLUTE_TOLERANCE = 1e-12


def score_problems(report: Report, recipe: Recipe) -> list[str]:
    """One line per figure of a report that does not follow from its scores and the recipe; empty when all do."""
    problems = [*_of_scores(report, recipe), *_of_bootstrap(report, recipe)]
    if problems:
        return problems  # figures computed from invalid scores give no further information
    judged = judge(report.samples, recipe.gates, recipe.evaluation.seed)
    return [*_of_figures(report, judged), *_of_rows(report)]


def _of_scores(report: Report, recipe: Recipe) -> Iterator[str]:
    """Invalid scores: unknown tasks or metrics, values out of bounds, gated metrics without chance scores."""
    gated = {(gate.task, gate.metric) for gate in recipe.gates}
    for task, of_task in report.samples.items():
        if task not in TASKS:
            yield f"the report has scores of '{task}', which is not a task"
            continue
        metrics = TASKS[task].METRICS
        if metrics[0] not in of_task.scores:
            yield f"the report has no {metrics[0]} of {task}"
        if len(set(of_task.ids)) < len(of_task.ids):
            yield f"the report counts samples of {task} twice"
        for metric, scores in of_task.scores.items():
            if metric not in metrics:
                yield f"the report has scores of '{metric}', which is not a metric of {task}"
                continue
            most = MAX_SCORES.get((task, metric), 1.0)
            values = [*scores.before, *scores.after, *(scores.chance or ())]
            if not all(0 <= value <= most + RELATIVE_TOLERANCE for value in values):
                yield f"the report has scores of {task} {metric} that are not within 0 to {most:g}"
            if (task, metric) in gated and scores.chance is None:
                yield f"the report has no chance scores of {task} {metric}"


def _of_bootstrap(report: Report, recipe: Recipe) -> Iterator[str]:
    """Problems unless intervals use the recipe's seed and no task has more samples than the evaluation's limit."""
    record = report.evaluation
    expected = {"resamples": RESAMPLES, "confidence": CONFIDENCE, "seed": recipe.evaluation.seed}
    if record.bootstrap is None or record.bootstrap.model_dump() != expected:
        yield f"the report's intervals do not use {RESAMPLES:,} resamples with the recipe's seed {expected['seed']}"
    if record.seed != recipe.evaluation.seed:
        yield f"the report's samples were not selected with the recipe's seed {recipe.evaluation.seed}"
    most = max(len(of_task.ids) for of_task in report.samples.values())
    if record.samples is None or most > record.samples:
        yield f"the report has {most} samples of a task, but its limit is {record.samples}"
    if "retrieval" in report.samples and not record.searched:
        yield "the report does not have the pool size of retrieval"


def _of_figures(report: Report, judged: Judgement) -> Iterator[str]:
    """Differences in all figures that `judge` computes from the scores."""
    for name, stored, computed in (
        ("measures", report.measures, judged.measures),
        ("gates", report.gates, judged.gates),
    ):
        if len(stored) != len(computed):
            yield f"the report has {len(stored)} {name}, but its scores and the recipe give {len(computed)}"
        else:
            yield from _differences(f"report's {name[:-1]}", stored, computed)
    if (report.verdict, report.passed) != (judged.verdict, judged.verdict == "passed"):
        yield (
            f"the report has verdict '{report.verdict}' and passed {str(report.passed).lower()}, but its gates give "
            f"'{judged.verdict}'"
        )
    if not _same(report.by_kind, judged.by_kind):
        yield "the report's scores by question type do not follow from its scores"
    if report.counts != judged.counts:
        yield "the report's counts of changed answers do not follow from its scores"


def _differences(what: str, stored: Sequence[Any], computed: Sequence[Any]) -> Iterator[str]:
    for record, expected in zip(stored, computed, strict=True):
        actual, right = record.model_dump(), expected.model_dump()
        wrong = [key for key in right if not _same(actual[key], right[key])]
        if wrong:
            key = wrong[0]
            name = f"{expected.task} {expected.metric}"
            yield f"the {what} of {name} has {key} {actual[key]}, but the scores give {right[key]}"


def _of_rows(report: Report) -> Iterator[str]:
    """Problems unless the listed answers are samples of the report with the same scores, and include changed ones."""
    for row in (*report.changed, *report.examples):
        of_task = report.samples.get(row.task)
        if of_task is None or row.id not in of_task.ids or not _is_sample(row, of_task):
            yield f"the report lists an answer to {row.task} {row.id} that does not match its samples"
            return
    for task, of_task in report.samples.items():
        listed = [row.id for row in report.changed if row.task == task]
        if set(listed) - {of_task.ids[i] for i in of_task.changed} or bool(of_task.changed) > bool(listed):
            yield f"the listed answers of {task} are not the changed ones"


def _is_sample(row: AnswerPair, of_task: TaskScores) -> bool:
    """Whether picture, question type and scores of a listed answer equal those of its sample."""
    index = of_task.ids.index(row.id)
    scores: MetricScores = of_task.scores[TASKS[row.task].METRICS[0]]
    pair = (scores.before[index], scores.after[index])
    return (row.image, row.kind, row.scores) == (of_task.pictures[index], of_task.kinds[index], pair)


def _same(stored: Any, computed: Any) -> bool:
    """Whether two values are equal, with a tolerance for floating-point numbers."""
    if isinstance(stored, dict) and isinstance(computed, dict):
        return stored.keys() == computed.keys() and all(_same(stored[key], computed[key]) for key in stored)
    if isinstance(stored, tuple) and isinstance(computed, tuple):
        return len(stored) == len(computed) and all(map(_same, stored, computed))
    if isinstance(stored, float) and isinstance(computed, float):
        return math.isclose(stored, computed, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)
    return bool(stored == computed)
