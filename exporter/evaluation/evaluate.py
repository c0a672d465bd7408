"""Evaluate baseline and artifact on the same samples: scores of both, measures, gates and changed answers."""

import math
import shlex
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from exporter.artifact.output_folder import updating
from exporter.data import image_key
from exporter.data.tasks import TASKS, main_metric, measured, retrieval
from exporter.data.tasks.sample import Sample
from exporter.errors import DataError, GateFailed, GateNotResolved
from exporter.evaluation.answers import Answerer, Answers, Store, collect_answers
from exporter.evaluation.bootstrap import CONFIDENCE, RESAMPLES
from exporter.evaluation.evaluation_record import Bootstrap, EvaluationRecord
from exporter.evaluation.gate_text import accepted, rounded_up, sentence
from exporter.evaluation.judge import judge
from exporter.evaluation.report_file import (
    REPORT,
    AnswerPair,
    GateResult,
    MetricScores,
    Report,
    TaskScores,
    read_report,
    write_report,
)
from exporter.events import Listener, notice
from exporter.planning.recipe import Gate, Recipe

MAX_CHANGED = 200  # changed answers in one report, largest loss first; `counts` counts all of them
EXAMPLES = 4  # samples per task in the report, whether their answers changed or not


def measure(
    before: Answerer,
    after: Answerer,
    samples: Mapping[str, Sequence[Sample]],
    recipe: Recipe,
    store: Store | None,
    on_event: Listener,
    about: Mapping[str, Any],
) -> Report:
    """Run both models on the samples of every task and compare. about: facts about the data, for the report."""
    pictures = picture_keys(samples)
    answers = [collect_answers(model, samples, pictures, store, on_event) for model in (before, after)]
    _check_finite((before.label, after.label), answers, on_event)
    report = compare(answers[0], answers[1], samples, recipe.gates, recipe.evaluation.seed, pictures)
    bootstrap = Bootstrap(resamples=RESAMPLES, confidence=CONFIDENCE, seed=recipe.evaluation.seed)
    models = {model.label: dict(model.identity) for model in (before, after)}
    record = EvaluationRecord.model_validate({**about, "bootstrap": bootstrap, "models": models}, strict=False)
    return report.model_copy(update={"evaluation": record})


def _check_finite(labels: tuple[str, str], answers: Sequence[Answers], on_event: Listener) -> None:
    """Check retrieval scores: non-finite scores of the artifact give a note, those of the baseline a DataError."""
    broken = [retrieval.count_not_finite(of_model.get(retrieval.NAME, [])) for of_model in answers]
    counts = zip(labels, broken, strict=True)
    texts = [f"{label}: scores of {count} samples are not finite numbers" for label, count in counts]
    if broken[0]:
        raise DataError(
            texts[0], "the weights are damaged or overflow on this device: check the files, or try another device"
        )
    if broken[1]:
        on_event(notice(f"{texts[1]}; they count as misses"))


def picture_keys(samples: Mapping[str, Sequence[Sample]]) -> dict[str, list[str]]:
    """Content hash of every sample's picture."""
    return {task: [image_key(sample.image()) for sample in of_task] for task, of_task in samples.items()}


def compare(
    before: Answers,
    after: Answers,
    samples: Mapping[str, Sequence[Sample]],
    gates: Sequence[Gate],
    seed: int,
    pictures: Mapping[str, Sequence[str]] | None = None,
) -> Report:
    """Score both sets of answers and decide the gates. pictures: `picture_keys` of the samples; None computes them."""
    keys = picture_keys(samples) if pictures is None else pictures
    scored, corpus = {}, {}
    changed: list[list[AnswerPair]] = []
    examples: list[AnswerPair] = []
    for task, of_task in samples.items():
        gated = [gate.metric for gate in gates if gate.task == task]
        answers = (before[task], after[task])
        scored[task] = _scores(task, of_task, keys[task], answers, gated)
        corpus[task] = _corpus(task, of_task, answers, scored[task].scores)
        rows = _rows(task, of_task, keys[task], answers, scored[task].scores[main_metric(task, scored[task].scores)])
        examples += rows[:EXAMPLES]
        changed.append(sorted((row for row in rows if row.before != row.after), key=_loss, reverse=True))
    judged = judge(scored, gates, seed)
    # Scores of different tasks are not comparable, so the changed answers alternate between the tasks.
    alternating = [row for group in zip_longest(*changed) for row in group if row]
    return Report(
        passed=judged.verdict == "passed",
        verdict=judged.verdict,
        measures=judged.measures,
        gates=judged.gates,
        samples=scored,
        by_kind=judged.by_kind,
        changed=tuple(alternating[:MAX_CHANGED]),
        examples=tuple(examples),
        corpus=corpus,
        counts=judged.counts,
    )


def _loss(row: AnswerPair) -> float:
    """Score of full precision minus score of the artifact on one sample."""
    assert row.scores
    return row.scores[0] - row.scores[1]


def _scores(
    task: str,
    samples: Sequence[Sample],
    pictures: Sequence[str],
    answers: tuple[Sequence[str], Sequence[str]],
    gated: Sequence[str],
) -> TaskScores:
    """Every score of both models, and for gated metrics the score of answers that ignore the picture."""
    before, after = (TASKS[task].score(of_model, samples) for of_model in answers)
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
            for metric in measured(task, samples, gated)
        },
    )


def _corpus(
    task: str,
    samples: Sequence[Sample],
    answers: tuple[Sequence[str], Sequence[str]],
    scores: Mapping[str, MetricScores],
) -> dict[str, tuple[float, float]]:
    """Corpus metrics of both models that are not means of the scores; `by_kind` has those per question type."""
    before, after = (TASKS[task].corpus(of_model, samples) for of_model in answers)
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
) -> list[AnswerPair]:
    """Every sample with both answers and their scores by the task's first metric."""
    return [
        AnswerPair(
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


def store_report(folder: Path, report: Report) -> bool:
    """Write the report into the artifact's folder, with the results of `mmq check` from the old report.

    Return False and keep the old report when it is on the same data with the same prompts, and the new one has fewer
    samples of some task and more of none.
    """
    with updating(folder):
        old, serving = read_report(folder)
        if old and _is_on_fewer(report, old):
            return False
        write_report(folder, report, serving)
    return True


def _is_on_fewer(report: Report, old: Report) -> bool:
    """Whether both reports are on the same data with the same prompts, and the new one has only fewer samples."""
    prompts = report.evaluation.prompts
    if old.evaluation.data != report.evaluation.data or (old.evaluation.prompts or prompts) != prompts:
        return False
    before, after = ({m.task: m.samples for m in stored.measures} for stored in (old, report))
    gained = [after.get(task, 0) - before.get(task, 0) for task in before | after]
    return min(gained, default=0) < 0 and max(gained) <= 0


def raise_unless_accepted(report: Report, where: Path, listed: bool = False) -> None:
    """GateFailed when a gate failed, GateNotResolved when none failed but one is not decided.

    listed: the gates' sentences are printed already; the message leaves them out.
    """
    open_gates = [gate for gate in report.gates if not accepted(gate)]
    if not open_gates:
        return
    lines = "" if listed else "".join(f"\n  {sentence(gate)}" for gate in open_gates)
    verdicts = {gate.verdict for gate in open_gates}
    count = f"{where}: {len(open_gates)} of {len(report.gates)} gates"
    if "failed" in verdicts:
        hint = f"{REPORT} lists changed answers; more bits, smaller groups or another method may help"
        raise GateFailed(f"{count} {'failed' if verdicts == {'failed'} else 'did not pass'}{lines}", hint)
    state = "could not be decided" if "not comparable" in verdicts else "are not resolved"
    raise GateNotResolved(f"{count} {state}{lines}", _resolution_hint(open_gates, where))


def _resolution_hint(gates: Sequence[GateResult], where: Path) -> str:
    """Hint for gates that neither passed nor failed: the command that resolves them, where more samples can."""
    command, verdicts = f"mmq evaluate {shlex.quote(str(where))}", {gate.verdict for gate in gates}
    comparable = "not comparable" not in verdicts
    hints = [] if comparable else [f"`mmq report {shlex.quote(str(where))}` shows answers of both models"]
    open_counts = [gate.samples_needed for gate in gates if gate.verdict == "not resolved"]
    needed = [rounded_up(count) for count in open_counts if count is not None]
    if needed:
        hints.append(f"`{command} --eval-samples {max(needed)}` runs only the additional samples")
    if "not resolved" in verdicts:
        hints.append("`decide: point` in the recipe's gate decides by the measured change")
    if "not measured" in verdicts:
        hints.append(f"`{command} --data SOURCE` measures the gates on data with samples of these tasks")
    return "; ".join(hints)
