"""Baseline beside artifact on the same samples: metrics, paired intervals, and the recipe's gates."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exporter.artifact import REPORT
from exporter.checkpoint import write_text
from exporter.errors import GateFailed
from exporter.events import Event
from exporter.predict import Predictor
from exporter.recipe import Gate
from exporter.statistics import Difference, paired_bootstrap
from exporter.tasks import TASKS
from exporter.tasks.sample import Sample

Answers = dict[str, list[str]]  # task -> one answer a sample
CHANGED_SHOWN = 20


@dataclass(frozen=True)
class Measure:
    """One metric of one task: full precision, artifact, and the paired difference with its interval."""

    task: str
    metric: str
    samples: int
    difference: Difference


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
        return f"{name}: {word}, lost {self.lost:.1%} of the full score{by}, allowed {self.gate.max_drop:.1%}"


@dataclass(frozen=True)
class Report:
    """What an evaluation found. by_kind: task -> question type -> (before, after, samples) of the first metric."""

    measures: tuple[Measure, ...]
    verdicts: tuple[Verdict, ...]
    by_kind: Mapping[str, Mapping[str, tuple[float, float, int]]]
    changed: tuple[Mapping[str, Any], ...]

    @property
    def passed(self) -> bool:
        """Whether every gate passed; false when there is none."""
        return bool(self.verdicts) and all(verdict.passed for verdict in self.verdicts)

    def as_json(self) -> dict[str, Any]:
        """Plain data for files and `--json`."""
        return {
            "passed": self.passed,
            "measures": [{**asdict(m), "difference": asdict(m.difference)} for m in self.measures],
            "gates": [
                {**v.gate.model_dump(), "lost": None if math.isnan(v.lost) else v.lost, "passed": v.passed}
                for v in self.verdicts
            ],
            "by_kind": {task: dict(kinds) for task, kinds in self.by_kind.items()},
            "changed": list(self.changed),
        }


def answers(
    predictor: Predictor, samples: Mapping[str, Sequence[Sample]], on_event: Callable[[Event], None]
) -> Answers:
    """One model's answers to every task's samples."""
    return {task: predictor.answer(found, on_event) for task, found in samples.items()}


def compare(
    before: Answers, after: Answers, samples: Mapping[str, Sequence[Sample]], gates: Sequence[Gate], seed: int
) -> Report:
    """Score both sets of answers and decide the gates."""
    measures, kinds, changed = [], {}, []
    for task, found in samples.items():
        scores = TASKS[task].score(before[task], found), TASKS[task].score(after[task], found)
        for metric in TASKS[task].METRICS:
            difference = paired_bootstrap(scores[0][metric], scores[1][metric], seed=seed)
            measures.append(Measure(task, metric, len(found), difference))
        first = TASKS[task].METRICS[0]
        kinds[task] = _by_kind(found, scores[0][first], scores[1][first])
        changed += _changed(task, found, before[task], after[task])
    verdicts = [_decide(gate, measures) for gate in gates]
    return Report(tuple(measures), tuple(verdicts), kinds, tuple(changed[:CHANGED_SHOWN]))


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


def _changed(task: str, samples: Sequence[Sample], before: Sequence[str], after: Sequence[str]) -> list[dict[str, Any]]:
    """Samples whose answer is another one than at full precision."""
    return [
        {
            "task": task,
            "id": s.identity,
            "question": s.question,
            "references": list(s.references),
            "before": b,
            "after": a,
        }
        for s, b, a in zip(samples, before, after, strict=True)
        if b != a
    ]


def _decide(gate: Gate, measures: Sequence[Measure]) -> Verdict:
    """A gate compares a relative loss; a baseline of zero cannot be judged and fails."""
    difference = next(m.difference for m in measures if (m.task, m.metric) == (gate.task, gate.metric))
    if difference.before <= 0:
        return Verdict(gate, math.nan, False)
    drop = difference.drop if gate.decide == "point" else difference.high
    lost = drop / difference.before
    return Verdict(gate, lost, lost <= gate.max_drop)


def write_report(folder: Path, report: Report) -> None:
    """Put the report beside the weights it judges."""
    write_text(folder / REPORT, json.dumps(report.as_json(), indent=1, sort_keys=True) + "\n")


def raise_if_failed(report: Report, where: Path) -> None:
    """GateFailed when a gate failed, saying by how much."""
    failed = [verdict for verdict in report.verdicts if not verdict.passed]
    if failed:
        lines = "\n".join(f"  {verdict}" for verdict in failed)
        raise GateFailed(
            f"{where}: {len(failed)} of {len(report.verdicts)} gates failed\n{lines}",
            f"{REPORT} lists changed answers; more bits, smaller groups or another method may help",
        )
