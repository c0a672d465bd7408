"""Compute measures, gates and verdicts from the stored scores of both models.

`mmq evaluate` and the proof of `mmq publish` both call `judge` on the same scores; a report with other figures was
edited.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from exporter.data.tasks import highest, main_metric
from exporter.evaluation.bootstrap import (
    Difference,
    gate_interval,
    paired_bootstrap,
    samples_to_exclude,
    samples_to_resolve,
)
from exporter.evaluation.gates import Overall, interval_verdict, worst
from exporter.evaluation.report_file import Counts, GateResult, Measure, MetricScores, StoredDifference, TaskScores
from exporter.planning.recipe import Gate

PERCENT = 0.01
MOST_SAMPLES = 10**7  # a gate that needs more samples is too close to its bound to be resolved


@dataclass(frozen=True)
class Judgement:
    """Everything that `judge` computes from scores; see `report_file.Report`."""

    measures: tuple[Measure, ...]
    gates: tuple[GateResult, ...]
    verdict: Overall
    by_kind: dict[str, dict[str, tuple[float, float, int]]]
    counts: dict[str, Counts]


def judge(samples: Mapping[str, TaskScores], gates: Sequence[Gate], seed: int) -> Judgement:
    """Measures of every task and metric, and verdicts of the gates. seed: seed of all bootstraps."""
    measured = {
        (task, metric): paired_bootstrap(scores.before, scores.after, seed=seed)
        for task, of_task in samples.items()
        for metric, scores in of_task.scores.items()
    }
    results = [_judge_gate(gate, samples, measured.get((gate.task, gate.metric)), seed) for gate in gates]
    return Judgement(
        tuple(_measure(name, difference, len(samples[name[0]].ids)) for name, difference in measured.items()),
        tuple(results),
        worst([result.verdict for result in results]),
        {task: _by_kind(of_task.kinds, _first(task, of_task)) for task, of_task in samples.items()},
        {task: _counts(of_task, _first(task, of_task)) for task, of_task in samples.items()},
    )


def _measure(name: tuple[str, str], difference: Difference, samples: int) -> Measure:
    return Measure(
        task=name[0],
        metric=name[1],
        samples=samples,
        difference=StoredDifference(**asdict(difference)),
        samples_to_resolve_one_percent=_for_one_percent(difference),
    )


def _for_one_percent(difference: Difference) -> int | None:
    """Number of samples for an interval of +- 1 % of the full-precision score; None above `MOST_SAMPLES`.

    Where no score differs: number of samples that excludes a loss of 1 % if no score of the new samples differs.
    """
    if difference.before <= 0:
        return None
    percent = PERCENT * difference.before
    spread = samples_to_resolve(percent, difference.sd)
    needed = samples_to_exclude(percent, difference.cost) if difference.unchanged else spread
    return needed if needed <= MOST_SAMPLES else None


def _judge_gate(gate: Gate, samples: Mapping[str, TaskScores], difference: Difference | None, seed: int) -> GateResult:
    """Decide one gate by the relative change; a baseline of zero or at chance level is not comparable."""
    named = GateResult(**gate.model_dump(), verdict="not measured")
    if difference is None:
        return named
    count, scores = len(samples[gate.task].ids), samples[gate.task].scores[gate.metric]
    chance = sum(scores.chance) / count if scores.chance else None
    figures = {"samples": count, "before": difference.before, "chance": chance}
    if difference.before <= 0 or _at_chance(scores, seed):
        return named.model_copy(update={"verdict": "not comparable", **figures})
    low, high = (end / difference.before for end in gate_interval(difference, count, highest(gate.metric)))
    verdict = interval_verdict(low, high, gate.max_drop)
    shares = {"change": difference.change / difference.before, "low": low, "high": high}
    needed = _to_resolve(difference, gate.max_drop * difference.before, count) if verdict == "not resolved" else None
    return named.model_copy(update={"verdict": verdict, **figures, **shares, "samples_needed": needed})


def _at_chance(scores: MetricScores, seed: int) -> bool:
    """Whether full precision is not significantly better than answers that ignore the picture."""
    return scores.chance is not None and paired_bootstrap(scores.chance, scores.before, seed=seed).low <= 0


def _to_resolve(difference: Difference, allowed: float, samples: int) -> int | None:
    """Estimated number of samples that puts the interval on one side of the bound, if the scores vary as in these.

    allowed: largest allowed drop, in units of the score. None when the measured change is too close to the bound.
    """
    margin = difference.change + allowed
    if not margin or not 0 < allowed < difference.cost:
        return None
    needed = samples_to_resolve(abs(margin), difference.sd)
    if margin > 0:
        needed = max(needed, samples_to_exclude(allowed, difference.cost))
    return max(needed, samples + 1) if needed <= MOST_SAMPLES else None


def _first(task: str, scores: TaskScores) -> MetricScores:
    """Scores by the task's main metric."""
    return scores.scores[main_metric(task, scores.scores)]


def _by_kind(kinds: Sequence[str], scores: MetricScores) -> dict[str, tuple[float, float, int]]:
    groups: dict[str, list[tuple[float, float]]] = {}
    for kind, before, after in zip(kinds, scores.before, scores.after, strict=True):
        groups.setdefault(kind, []).append((before, after))
    return {
        kind: (sum(b for b, _ in pairs) / len(pairs), sum(a for _, a in pairs) / len(pairs), len(pairs))
        for kind, pairs in sorted(groups.items())
    }


def _counts(task: TaskScores, scores: MetricScores) -> Counts:
    pairs = list(zip(scores.before, scores.after, strict=True))
    return Counts(changed=len(task.changed), lost=sum(a < b for b, a in pairs), gained=sum(a > b for b, a in pairs))
