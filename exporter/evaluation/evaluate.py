"""Baseline beside artifact on the same samples: every score of both, measures and gates, and answers that changed."""

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from exporter.data import image_key
from exporter.errors import DataError, GateFailed, GateNotResolved
from exporter.evaluation.answers import Answerer, Answers, Store, ask
from exporter.evaluation.gate_text import accepted, sentence
from exporter.evaluation.judge import judge
from exporter.evaluation.report_file import (
    REPORT,
    Answered,
    Bootstrap,
    EvaluationRecord,
    MetricScores,
    Report,
    TaskScores,
    read_report,
    write_report,
)
from exporter.evaluation.statistics import CONFIDENCE, RESAMPLES
from exporter.events import Event, Listener
from exporter.planning.recipe import Gate, Recipe
from exporter.tasks import TASKS, retrieval
from exporter.tasks.sample import Sample

CHANGED_KEPT = 200  # answers that changed in one report, the worst first; `counts` counts all
EXAMPLES = 4  # samples of each task that are kept whatever became of them


def measure(
    before: Answerer,
    after: Answerer,
    samples: Mapping[str, Sequence[Sample]],
    recipe: Recipe,
    store: Store | None,
    on_event: Listener,
    about: Mapping[str, Any],
) -> Report:
    """Ask both models every task's samples and compare. about: what the caller knows of the data, for the report."""
    pictures = picture_keys(samples)
    answers = [ask(model, samples, pictures, store, on_event) for model in (before, after)]
    _judge_numbers((before.label, after.label), answers, on_event)
    report = compare(answers[0], answers[1], samples, recipe.gates, recipe.evaluation.seed, pictures)
    bootstrap = Bootstrap(resamples=RESAMPLES, confidence=CONFIDENCE, seed=recipe.evaluation.seed)
    models = {model.label: dict(model.identity) for model in (before, after)}
    found = EvaluationRecord.model_validate({**about, "bootstrap": bootstrap, "models": models}, strict=False)
    return report.model_copy(update={"evaluation": found})


def _judge_numbers(labels: tuple[str, str], answers: Sequence[Answers], on_event: Listener) -> None:
    """Retrieval scores that are not finite count as misses: a note for the artifact, an error for the baseline."""
    broken = [retrieval.count_not_finite(given.get(retrieval.NAME, [])) for given in answers]
    counts = zip(labels, broken, strict=True)
    texts = [f"{label}: scores of {count} samples are not finite numbers" for label, count in counts]
    if broken[0]:
        raise DataError(texts[0], "its weights are damaged or overflow here: check the files, or try another device")
    if broken[1]:
        on_event(Event("note", 1, 1, f"{texts[1]}; they count as not found"))


def picture_keys(samples: Mapping[str, Sequence[Sample]]) -> dict[str, list[str]]:
    """Content hash of every sample's picture."""
    return {task: [image_key(sample.image()) for sample in found] for task, found in samples.items()}


def compare(
    before: Answers,
    after: Answers,
    samples: Mapping[str, Sequence[Sample]],
    gates: Sequence[Gate],
    seed: int,
    pictures: Mapping[str, Sequence[str]] | None = None,
) -> Report:
    """Score both sets of answers and decide the gates. pictures: `picture_keys` of the samples, where known already."""
    keys = picture_keys(samples) if pictures is None else pictures
    scored, corpus = {}, {}
    changed: list[list[Answered]] = []
    examples: list[Answered] = []
    for task, found in samples.items():
        gated = [gate.metric for gate in gates if gate.task == task]
        answers = (before[task], after[task])
        scored[task] = _scores(task, found, keys[task], answers, gated)
        corpus[task] = _corpus(task, found, answers, scored[task].scores)
        rows = _rows(task, found, keys[task], answers, scored[task].scores[TASKS[task].METRICS[0]])
        examples += rows[:EXAMPLES]
        changed.append(sorted((row for row in rows if row.before != row.after), key=_loss, reverse=True))
    judged = judge(scored, gates, seed)
    in_turn = [row for turn in zip_longest(*changed) for row in turn if row]  # scores of two tasks do not compare
    return Report(
        passed=judged.verdict == "passed",
        verdict=judged.verdict,
        measures=judged.measures,
        gates=judged.gates,
        samples=scored,
        by_kind=judged.by_kind,
        changed=tuple(in_turn[:CHANGED_KEPT]),
        examples=tuple(examples),
        corpus=corpus,
        counts=judged.counts,
    )


def _loss(row: Answered) -> float:
    """By how much the artifact scores less on one sample."""
    assert row.scores
    return row.scores[0] - row.scores[1]


def _scores(
    task: str,
    samples: Sequence[Sample],
    pictures: Sequence[str],
    answers: tuple[Sequence[str], Sequence[str]],
    gated: Sequence[str],
) -> TaskScores:
    """Every score of both models, and for the metrics of gates what chance would score."""
    before, after = (TASKS[task].score(given, samples) for given in answers)
    chance = TASKS[task].chance(answers[0], samples, gated)
    return TaskScores(
        ids=tuple(sample.identity for sample in samples),
        pictures=tuple(pictures),
        kinds=tuple(sample.kind for sample in samples),
        changed=tuple(i for i, (b, a) in enumerate(zip(*answers, strict=True)) if b != a),
        scores={
            metric: MetricScores(
                before=tuple(before[metric]),
                after=tuple(after[metric]),
                chance=tuple(chance[metric]) if metric in chance else None,
            )
            for metric in TASKS[task].METRICS
        },
    )


def _corpus(
    task: str,
    samples: Sequence[Sample],
    answers: tuple[Sequence[str], Sequence[str]],
    scores: Mapping[str, MetricScores],
) -> dict[str, tuple[float, float]]:
    """Figures of the whole set that the means do not show already; by kind there is `by_kind`."""
    before, after = (TASKS[task].corpus(given, samples) for given in answers)
    known = {metric: sum(values.before) / max(1, len(values.before)) for metric, values in scores.items()}
    names = [name for name, value in before.items() if " " not in name and not _same(value, known.get(name))]
    return {name: (before[name], after[name]) for name in names}


def _same(value: float, mean: float | None) -> bool:
    return mean is not None and math.isclose(value, mean, rel_tol=1e-9, abs_tol=1e-12)


def _rows(
    task: str,
    samples: Sequence[Sample],
    pictures: Sequence[str],
    answers: tuple[Sequence[str], Sequence[str]],
    scores: MetricScores,
) -> list[Answered]:
    """Every sample with both answers and what they scored by the task's first metric."""
    return [
        Answered(
            task=task,
            id=s.identity,
            question=s.question,
            references=tuple(s.references),
            before=before,
            after=after,
            kind=s.kind,
            image=image,
            file=s.file,
            scores=(full, artifact),
        )
        for s, image, before, after, full, artifact in zip(
            samples, pictures, *answers, scores.before, scores.after, strict=True
        )
    ]


def keep_report(folder: Path, report: Report) -> bool:
    """Put the report beside the weights it judges; what `mmq check` measured stays.

    A report on the same data is not replaced by one that has fewer samples of a task and more of none: False then.
    """
    old, serving = read_report(folder)
    if old and old.evaluation.data == report.evaluation.data:
        had, has = ({m.task: m.samples for m in each.measures} for each in (old, report))
        gained = [has.get(task, 0) - had.get(task, 0) for task in had | has]
        if min(gained, default=0) < 0 and max(gained) <= 0:
            return False
    write_report(folder, report, serving)
    return True


def raise_unless_accepted(report: Report, where: Path) -> None:
    """GateFailed when a gate failed or could not be decided, GateNotResolved when one needs more samples or data."""
    rest = [gate for gate in report.gates if not accepted(gate)]
    if not rest:
        return
    lines = "\n".join(f"  {sentence(gate)}" for gate in rest)
    verdicts = {gate.verdict for gate in rest}
    count = f"{where}: {len(rest)} of {len(report.gates)} gates"
    if "failed" in verdicts:
        hint = f"{REPORT} lists changed answers; more bits, smaller groups or another method may help"
        raise GateFailed(f"{count} {'failed' if verdicts == {'failed'} else 'did not pass'}\n{lines}", hint)
    if "not comparable" in verdicts:
        raise GateFailed(f"{count} could not be decided\n{lines}", "ask the full-precision model a few samples by hand")
    raise GateNotResolved(f"{count} are not resolved\n{lines}", _more(verdicts))


def _more(verdicts: Collection[str]) -> str:
    """What resolves gates that neither passed nor failed."""
    samples = "`mmq evaluate --eval-samples N` asks only the new ones; `decide: point` in a recipe's gate accepts this"
    data = "`mmq evaluate --data SOURCE` measures them on data that has these tasks"
    return "; ".join([samples] * ("not resolved" in verdicts) + [data] * ("not measured" in verdicts))
