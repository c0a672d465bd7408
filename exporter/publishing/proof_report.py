"""A report beside what its own single scores say."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from exporter.evaluation.judge import Judgement, judge
from exporter.evaluation.report_file import AnswerPair, MetricScores, Report, TaskScores
from exporter.evaluation.statistics import CONFIDENCE, RESAMPLES
from exporter.planning.recipe import Recipe
from exporter.tasks import TASKS

LARGEST = {("captioning", "cider"): 10.0}  # scores of all other metrics are 0 to 1
SLACK = 1e-9  # sums in another order
ABSOLUTE = 1e-12


def against_scores(report: Report, recipe: Recipe) -> list[str]:
    """Everything in a report that differs from what follows from its scores and the recipe; empty when nothing does."""
    problems = [*_of_scores(report, recipe), *_of_bootstrap(report, recipe)]
    if problems:
        return problems  # what follows from wrong scores says nothing more
    judged = judge(report.samples, recipe.gates, recipe.evaluation.seed)
    return [*_of_figures(report, judged), *_of_rows(report)]


def _of_scores(report: Report, recipe: Recipe) -> Iterator[str]:
    """Scores that no evaluation gives: of unknown tasks or metrics, out of bounds, or of a gate without its chance."""
    gated = {(gate.task, gate.metric) for gate in recipe.gates}
    for task, found in report.samples.items():
        if task not in TASKS:
            yield f"its report has scores of '{task}', which is no task"
            continue
        metrics = TASKS[task].METRICS
        if metrics[0] not in found.scores:
            yield f"its report has no {metrics[0]} of {task}"
        if len(set(found.ids)) < len(found.ids):
            yield f"its report counts samples of {task} twice"
        for metric, scores in found.scores.items():
            if metric not in metrics:
                yield f"its report has scores of '{metric}', which is no metric of {task}"
                continue
            most = LARGEST.get((task, metric), 1.0)
            values = [*scores.before, *scores.after, *(scores.chance or ())]
            if not all(0 <= value <= most + SLACK for value in values):
                yield f"its report has scores of {task} {metric} that are not within 0 to {most:g}"
            if (task, metric) in gated and scores.chance is None:
                yield f"its report does not say what chance scores in {task} {metric}"


def _of_bootstrap(report: Report, recipe: Recipe) -> Iterator[str]:
    """Intervals must be those of the recipe's seed, and of as many samples as were asked for at most."""
    about = report.evaluation
    wanted = {"resamples": RESAMPLES, "confidence": CONFIDENCE, "seed": recipe.evaluation.seed}
    if about.bootstrap is None or about.bootstrap.model_dump() != wanted:
        yield f"its intervals are not those of {RESAMPLES:,} resamples with the recipe's seed {wanted['seed']}"
    if about.seed != recipe.evaluation.seed:
        yield f"its samples were not chosen by the recipe's seed {recipe.evaluation.seed}"
    most = max(len(found.ids) for found in report.samples.values())
    if about.samples is None or most > about.samples:
        yield f"its report has {most} samples of a task and says that {about.samples} were asked for"
    if "retrieval" in report.samples and not about.searched:
        yield "its report does not say how many pictures and texts were searched"


def _of_figures(report: Report, judged: Judgement) -> Iterator[str]:
    """Every figure that is computed from the scores."""
    for name, stored, computed in (
        ("measures", report.measures, judged.measures),
        ("gates", report.gates, judged.gates),
    ):
        if len(stored) != len(computed):
            yield f"its report has {len(stored)} {name}, and {len(computed)} follow from its scores and recipe"
        else:
            yield from _differences(f"{name[:-1]} of its report", stored, computed)
    if (report.verdict, report.passed) != (judged.verdict, judged.verdict == "passed"):
        said = "passed" if report.passed else "did not pass"
        yield f"its report says '{report.verdict}' and that it {said}, but by its gates it is '{judged.verdict}'"
    if not _same(report.by_kind, judged.by_kind):
        yield "its scores by question type do not follow from its scores"
    if report.counts != judged.counts:
        yield "its counts of changed answers do not follow from its scores"


def _differences(what: str, stored: Sequence[Any], computed: Sequence[Any]) -> Iterator[str]:
    for one, other in zip(stored, computed, strict=True):
        plain, right = one.model_dump(), other.model_dump()
        wrong = [key for key in right if not _same(plain[key], right[key])]
        if wrong:
            key = wrong[0]
            yield f"the {what} on {other.task} {other.metric} has {key} {plain[key]}, but {right[key]} is computed"


def _of_rows(report: Report) -> Iterator[str]:
    """Listed answers must be samples of the report, with their scores, and every sort of them must be there."""
    for row in (*report.changed, *report.examples):
        found = report.samples.get(row.task)
        if found is None or row.id not in found.ids or not _is_sample(row, found):
            yield f"its report lists an answer to {row.task} {row.id} that is not among its samples with these scores"
            return
    for task, found in report.samples.items():
        listed = [row.id for row in report.changed if row.task == task]
        if set(listed) - {found.ids[i] for i in found.changed} or bool(found.changed) > bool(listed):
            yield f"its listed answers of {task} are not those that changed"


def _is_sample(row: AnswerPair, found: TaskScores) -> bool:
    index = found.ids.index(row.id)
    scores: MetricScores = found.scores[TASKS[row.task].METRICS[0]]
    pair = (scores.before[index], scores.after[index])
    return (row.image, row.kind, row.scores) == (found.pictures[index], found.kinds[index], pair)


def _same(stored: Any, computed: Any) -> bool:
    """Equal, but for the last digits of floating-point sums."""
    if isinstance(stored, dict) and isinstance(computed, dict):
        return stored.keys() == computed.keys() and all(_same(stored[key], computed[key]) for key in stored)
    if isinstance(stored, tuple) and isinstance(computed, tuple):
        return len(stored) == len(computed) and all(map(_same, stored, computed))
    if isinstance(stored, float) and isinstance(computed, float):
        return math.isclose(stored, computed, rel_tol=SLACK, abs_tol=ABSOLUTE)
    return bool(stored == computed)
