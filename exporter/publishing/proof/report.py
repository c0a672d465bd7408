"""Compare a report with the figures that follow from its scores of single samples."""

from collections.abc import Iterator, Sequence
from typing import Any

from exporter.data.tasks import TASKS
from exporter.evaluation.bootstrap import CONFIDENCE, RESAMPLES
from exporter.evaluation.judge import Judgement, judge
from exporter.evaluation.report_file import Report
from exporter.planning.recipe import Recipe
from exporter.publishing.proof.answers import RELATIVE_TOLERANCE, answer_problems, same

MAX_SCORES = {("captioning", "cider"): 10.0}  # all other metrics have scores from 0 to 1


def score_problems(report: Report, recipe: Recipe) -> list[str]:
    """One line per figure of a report that does not follow from its scores and the recipe; empty when all do."""
    problems = [*_of_scores(report, recipe), *_of_bootstrap(report, recipe)]
    if problems:
        return problems  # figures computed from invalid scores give no further information
    judged = judge(report.samples, recipe.gates, recipe.evaluation.seed)
    return [*_of_figures(report, judged), *_of_corpus(report), *answer_problems(report)]


def _of_scores(report: Report, recipe: Recipe) -> Iterator[str]:
    """Invalid scores: unknown tasks or metrics, values out of bounds, gated metrics without chance scores."""
    gated = {(gate.task, gate.metric) for gate in recipe.gates}
    for task, of_task in report.samples.items():
        if task not in TASKS:
            yield f"the report has scores of '{task}', which is not a task"
            continue
        metrics = TASKS[task].METRICS
        if absent := [metric for metric in TASKS[task].DEFAULT if metric not in of_task.scores]:
            yield f"the report has no {absent[0]} of {task}"
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
    if not same(report.by_kind, judged.by_kind):
        yield "the report's scores by question type do not follow from its scores"
    if report.counts != judged.counts:
        yield "the report's counts of changed answers do not follow from its scores"


def _differences(what: str, stored: Sequence[Any], computed: Sequence[Any]) -> Iterator[str]:
    for record, expected in zip(stored, computed, strict=True):
        actual, right = record.model_dump(), expected.model_dump()
        wrong = [key for key in right if not same(actual[key], right[key])]
        if wrong:
            key = wrong[0]
            name = f"{expected.task} {expected.metric}"
            yield f"the {what} of {name} has {key} {actual[key]}, but the scores give {right[key]}"


def _of_corpus(report: Report) -> Iterator[str]:
    """Corpus scores that are unknown, absent, out of bounds, or differ between models with the same answers."""
    for task in report.corpus.keys() | report.samples.keys():
        stored = report.corpus.get(task, {})
        if task not in report.samples:
            yield f"the report has corpus scores of {task}, but no scores of its samples"
            continue
        required, known = set(TASKS[task].CORPUS) - set(TASKS[task].METRICS), set(TASKS[task].CORPUS)
        if wrong := sorted((stored.keys() - known) | (required - stored.keys())):
            yield f"the report's corpus scores of {task} are not those of mmq: {wrong[0]}"
        for name, (before, after) in stored.items():
            most = MAX_SCORES.get((task, name), 1.0)
            if not (0 <= before <= most and 0 <= after <= most):
                yield f"the report's corpus score {name} of {task} is not within 0 to {most:g}"
            elif before != after and not report.samples[task].changed:
                yield f"the report's corpus score {name} of {task} differs, although no answer changed"
