"""Baseline beside artifact on the same samples: metrics, paired intervals, and the recipe's gates."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from exporter.answers import Answers, Model, Store, ask
from exporter.artifact import REPORT
from exporter.checkpoint import write_text
from exporter.data import image_key
from exporter.errors import DataError, GateFailed
from exporter.events import Event
from exporter.recipe import Gate, Recipe
from exporter.statistics import (
    CONFIDENCE,
    RESAMPLES,
    Difference,
    paired_bootstrap,
    samples_to_exclude,
    samples_to_resolve,
    upper_end,
)
from exporter.strict_json import read_json
from exporter.tasks import TASKS, retrieval
from exporter.tasks.sample import Sample

CHANGED_KEPT = 200  # answers that changed in one report, the worst first; `counts` counts all
PERCENT = 0.01
EXAMPLES = 4  # samples of each task that are kept whatever became of them
KEPT_KEYS = ("serving",)  # what other commands wrote into a report and a new evaluation leaves there


@dataclass(frozen=True)
class Measure:
    """One metric of one task: full precision, artifact, and the paired difference with its interval."""

    task: str
    metric: str
    samples: int
    difference: Difference

    @property
    def needed(self) -> int | None:
        """Samples that would narrow the interval to +- 1 % of the full-precision score; None when that is 0.

        Where no score differs: samples that would put the upper end of `decide: upper` there if none differed either.
        """
        found = self.difference
        if found.before <= 0:
            return None
        if found.unchanged:
            return samples_to_exclude(PERCENT * found.before, found.cost)
        return samples_to_resolve(PERCENT * found.before, found.sd)


@dataclass(frozen=True)
class Verdict:
    """One gate: the share of the score that was lost (by the gate's rule) against what it allows."""

    gate: Gate
    lost: float
    passed: bool

    def __str__(self) -> str:
        """The verdict as a sentence."""
        name = f"{self.gate.task} {self.gate.metric}"
        if math.isnan(self.lost):
            return f"{name}: failed, the full-precision model scores 0, so nothing can be compared"
        word = "passed" if self.passed else "failed"
        by = "" if self.gate.decide == "point" else " (upper end of the 95 % interval)"
        return f"{name}: {word}, lost {self.lost:z.1%} of the full score{by}, allowed {self.gate.max_drop:.1%}"


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

    by_kind: task -> question type -> (before, after, samples) of the first metric.
    changed: samples whose answer changed, the tasks in turn, each with its largest loss first.
    examples: the first samples of each task.
    corpus: task -> figure of the whole set as papers report it -> (before, after), where it is no mean of samples.
    counts: task -> how many answers `changed`, and how many samples `lost` or `gained` score.
    about: how it was measured: data, seeds, and what identifies both models' answers.
    """

    measures: tuple[Measure, ...]
    verdicts: tuple[Verdict, ...]
    by_kind: Mapping[str, Mapping[str, tuple[float, float, int]]]
    changed: tuple[Mapping[str, Any], ...]
    examples: tuple[Mapping[str, Any], ...]
    corpus: Mapping[str, Mapping[str, tuple[float, float]]]
    counts: Mapping[str, Mapping[str, int]]
    about: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        """Whether every gate passed; false when there is none."""
        return bool(self.verdicts) and all(verdict.passed for verdict in self.verdicts)

    def as_json(self) -> dict[str, Any]:
        """Plain data for files and `--json`."""
        return {
            "passed": self.passed,
            "measures": [{**asdict(m), "samples_to_resolve_one_percent": m.needed} for m in self.measures],
            "gates": [
                {**v.gate.model_dump(), "lost": None if math.isnan(v.lost) else v.lost, "passed": v.passed}
                for v in self.verdicts
            ],
            "by_kind": {task: dict(kinds) for task, kinds in self.by_kind.items()},
            "changed": list(self.changed),
            "examples": list(self.examples),
            "corpus": {task: dict(figures) for task, figures in self.corpus.items()},
            "counts": {task: dict(counts) for task, counts in self.counts.items()},
            "evaluation": dict(self.about),
        }


def measure(
    before: Model,
    after: Model,
    samples: Mapping[str, Sequence[Sample]],
    recipe: Recipe,
    store: Store | None,
    on_event: Callable[[Event], None],
    about: Mapping[str, Any],
) -> Report:
    """Ask both models every task's samples and compare. about: what the caller knows of the data, for the report."""
    pictures = picture_keys(samples)
    answers = [ask(model, samples, pictures, store, on_event) for model in (before, after)]
    _judge_numbers((before.label, after.label), answers, on_event)
    report = compare(answers[0], answers[1], samples, recipe.gates, recipe.evaluation.seed, pictures)
    bootstrap = {"resamples": RESAMPLES, "confidence": CONFIDENCE, "seed": recipe.evaluation.seed}
    models = {model.label: dict(model.identity) for model in (before, after)}
    return replace(report, about={**about, "bootstrap": bootstrap, "models": models})


def _judge_numbers(labels: tuple[str, str], answers: Sequence[Answers], on_event: Callable[[Event], None]) -> None:
    """Scores that are not finite find nothing: of the artifact they are said aloud, a baseline of them is an error."""
    broken = [retrieval.without_numbers(given.get(retrieval.NAME, [])) for given in answers]
    counts = zip(labels, broken, strict=True)
    told = [f"{label}: scores of {count} samples are not finite numbers" for label, count in counts]
    if broken[0]:
        raise DataError(told[0], "its weights are damaged or overflow here: check the files, or try another device")
    if broken[1]:
        on_event(Event("note", 1, 1, f"{told[1]}; they count as not found"))


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
    measures, kinds, corpus, counts = [], {}, {}, {}
    changed: list[list[dict[str, Any]]] = []
    examples: list[dict[str, Any]] = []
    for task, found in samples.items():
        scores = TASKS[task].score(before[task], found), TASKS[task].score(after[task], found)
        for metric in TASKS[task].METRICS:
            difference = paired_bootstrap(scores[0][metric], scores[1][metric], seed=seed)
            measures.append(Measure(task, metric, len(found), difference))
        first = TASKS[task].METRICS[0]
        kinds[task] = _by_kind(found, scores[0][first], scores[1][first])
        corpus[task] = _corpus(task, found, (before[task], after[task]), scores)
        rows = _rows(task, found, keys[task], (before[task], after[task]), (scores[0][first], scores[1][first]))
        examples += rows[:EXAMPLES]
        changed.append(sorted((r for r in rows if r["before"] != r["after"]), key=_loss, reverse=True))
        counts[task] = _counts(rows)
    verdicts = [_decide(gate, measures) for gate in gates]
    in_turn = [row for turn in zip_longest(*changed) for row in turn if row]  # scores of two tasks do not compare
    kept = tuple(in_turn[:CHANGED_KEPT])
    return Report(tuple(measures), tuple(verdicts), kinds, kept, tuple(examples), corpus, counts, {})


def _loss(row: Mapping[str, Any]) -> float:
    """By how much the artifact scores less on one sample."""
    return float(row["scores"][0] - row["scores"][1])


def _counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    losses = [_loss(row) for row in rows]
    changed = sum(row["before"] != row["after"] for row in rows)
    return {"changed": changed, "lost": sum(loss > 0 for loss in losses), "gained": sum(loss < 0 for loss in losses)}


def _by_kind(
    samples: Sequence[Sample], before: Sequence[float], after: Sequence[float]
) -> dict[str, tuple[float, float, int]]:
    groups: dict[str, list[tuple[float, float]]] = {}
    for sample, b, a in zip(samples, before, after, strict=True):
        groups.setdefault(sample.kind, []).append((b, a))
    return {
        kind: (sum(b for b, _ in pairs) / len(pairs), sum(a for _, a in pairs) / len(pairs), len(pairs))
        for kind, pairs in sorted(groups.items())
    }


def _corpus(
    task: str,
    samples: Sequence[Sample],
    answers: tuple[Sequence[str], Sequence[str]],
    scores: tuple[Mapping[str, Sequence[float]], Mapping[str, Sequence[float]]],
) -> dict[str, tuple[float, float]]:
    """Figures of the whole set that the means do not show already; by kind there is `by_kind`."""
    before, after = (TASKS[task].corpus(given, samples) for given in answers)
    known = {metric: sum(values) / max(1, len(values)) for metric, values in scores[0].items()}
    names = [name for name, value in before.items() if " " not in name and not _same(value, known.get(name))]
    return {name: (before[name], after[name]) for name in names}


def _same(value: float, mean: float | None) -> bool:
    return mean is not None and math.isclose(value, mean, rel_tol=1e-9, abs_tol=1e-12)


def _rows(
    task: str,
    samples: Sequence[Sample],
    pictures: Sequence[str],
    answers: tuple[Sequence[str], Sequence[str]],
    scores: tuple[Sequence[float], Sequence[float]],
) -> list[dict[str, Any]]:
    """Every sample with both answers and what they scored; `image` is the hash of its picture's pixels."""
    return [
        {
            "task": task,
            "id": s.identity,
            "kind": s.kind,
            "image": image,
            "file": s.file,
            "question": s.question,
            "references": list(s.references),
            "before": b,
            "after": a,
            "scores": [before, after],
        }
        for s, image, b, a, before, after in zip(samples, pictures, *answers, *scores, strict=True)
    ]


def _decide(gate: Gate, measures: Sequence[Measure]) -> Verdict:
    """A gate compares a relative loss; a baseline of zero cannot be judged and fails."""
    measure = next(m for m in measures if (m.task, m.metric) == (gate.task, gate.metric))
    difference = measure.difference
    if difference.before <= 0:
        return Verdict(gate, math.nan, False)
    drop = difference.drop if gate.decide == "point" else upper_end(difference, measure.samples)
    lost = drop / difference.before
    return Verdict(gate, lost, lost <= gate.max_drop)


def write_report(folder: Path, report: Report) -> bool:
    """Put the report beside the weights it judges; what `mmq check` found in the engine stays.

    A report on the same data is not replaced by one that has fewer samples of a task and more of none: False then.
    """
    path = folder / REPORT
    old = read_json(path) if path.exists() else {}
    new = report.as_json()
    if old.get("evaluation", {}).get("data") == new["evaluation"].get("data"):
        had, has = ({m["task"]: m["samples"] for m in one.get("measures", [])} for one in (old, new))
        gained = [has.get(task, 0) - had.get(task, 0) for task in had | has]
        if min(gained, default=0) < 0 and max(gained) <= 0:
            return False
    kept = {key: old[key] for key in KEPT_KEYS if key in old}
    write_text(path, json.dumps(new | kept, indent=1, sort_keys=True) + "\n")
    return True


def raise_if_failed(report: Report, where: Path) -> None:
    """GateFailed when a gate failed, saying by how much."""
    failed = [verdict for verdict in report.verdicts if not verdict.passed]
    if failed:
        lines = "\n".join(f"  {verdict}" for verdict in failed)
        raise GateFailed(
            f"{where}: {len(failed)} of {len(report.verdicts)} gates failed\n{lines}",
            f"{REPORT} lists changed answers; more bits, smaller groups or another method may help",
        )
