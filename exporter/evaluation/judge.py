"""From the kept scores of both models to measures, gates and their verdicts.

An evaluation and the proof before publishing compute them here from the same scores, so a report that holds other
figures than these was changed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from exporter.evaluation.gates import Overall, decided, worst
from exporter.evaluation.report_file import Counts, GateResult, Measure, MetricScores, StoredDifference, TaskScores
from exporter.evaluation.statistics import (
    Difference,
    ends,
    paired_bootstrap,
    samples_to_exclude,
    samples_to_resolve,
)
from exporter.planning.recipe import Gate
from exporter.tasks import TASKS

PERCENT = 0.01
MOST_SAMPLES = 10**7  # a gate that needs more is too near to its bound to be resolved by samples


@dataclass(frozen=True)
class Judged:
    """What follows from the scores; see `report_file.Report`."""

    measures: tuple[Measure, ...]
    gates: tuple[GateResult, ...]
    verdict: Overall
    by_kind: dict[str, dict[str, tuple[float, float, int]]]
    counts: dict[str, Counts]


def judge(samples: Mapping[str, TaskScores], gates: Sequence[Gate], seed: int) -> Judged:
    """Measures of every task and metric, and verdicts of the gates. seed: of all bootstraps."""
    measured = {
        (task, metric): paired_bootstrap(scores.before, scores.after, seed=seed)
        for task, found in samples.items()
        for metric, scores in found.scores.items()
    }
    results = [_judge_gate(gate, samples, measured.get((gate.task, gate.metric)), seed) for gate in gates]
    return Judged(
        tuple(_measure(name, difference, len(samples[name[0]].ids)) for name, difference in measured.items()),
        tuple(results),
        worst([result.verdict for result in results]),
        {task: _by_kind(found.kinds, _first(task, found)) for task, found in samples.items()},
        {task: _counts(found, _first(task, found)) for task, found in samples.items()},
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
    """Samples that would narrow the interval to +- 1 % of the full-precision score; None when that is next to 0.

    Where no score differs: samples that would exclude a loss of 1 % if none differed either.
    """
    if difference.before <= 0:
        return None
    one = PERCENT * difference.before
    spread = samples_to_resolve(one, difference.sd)
    needed = samples_to_exclude(one, difference.cost) if difference.unchanged else spread
    return needed if needed <= MOST_SAMPLES else None


def _judge_gate(gate: Gate, samples: Mapping[str, TaskScores], found: Difference | None, seed: int) -> GateResult:
    """A gate compares a relative change; a baseline of zero or at chance level cannot be judged."""
    named = GateResult(**gate.model_dump(), verdict="not measured")
    if found is None:
        return named
    count, scores = len(samples[gate.task].ids), samples[gate.task].scores[gate.metric]
    chance = sum(scores.chance) / count if scores.chance else None
    figures = {"samples": count, "before": found.before, "chance": chance}
    if found.before <= 0 or _at_chance(scores, seed):
        return named.model_copy(update={"verdict": "not comparable", **figures})
    low, high = (end / found.before for end in ends(found, count))
    verdict = decided(low, high, gate.max_drop)
    shares = {"change": found.change / found.before, "low": low, "high": high}
    needed = _to_resolve(found, gate.max_drop * found.before, count) if verdict == "not resolved" else None
    return named.model_copy(update={"verdict": verdict, **figures, **shares, "samples_needed": needed})


def _at_chance(scores: MetricScores, seed: int) -> bool:
    """Whether full precision is not shown to be better than answers that do not depend on the picture."""
    return scores.chance is not None and paired_bootstrap(scores.chance, scores.before, seed=seed).low <= 0


def _to_resolve(found: Difference, allowed: float, samples: int) -> int | None:
    """About how many samples would put the interval on one side of the bound, if they changed as these did.

    allowed: the largest drop. None when the measured change is too near to the bound.
    """
    margin = found.change + allowed
    if not margin or not 0 < allowed < found.cost:
        return None
    needed = samples_to_resolve(abs(margin), found.sd)
    if margin > 0:
        needed = max(needed, samples_to_exclude(allowed, found.cost))
    return max(needed, samples + 1) if needed <= MOST_SAMPLES else None


def _first(task: str, found: TaskScores) -> MetricScores:
    """Scores by the task's main metric."""
    return found.scores[TASKS[task].METRICS[0]]


def _by_kind(kinds: Sequence[str], scores: MetricScores) -> dict[str, tuple[float, float, int]]:
    groups: dict[str, list[tuple[float, float]]] = {}
    for kind, before, after in zip(kinds, scores.before, scores.after, strict=True):
        groups.setdefault(kind, []).append((before, after))
    return {
        kind: (sum(b for b, _ in pairs) / len(pairs), sum(a for _, a in pairs) / len(pairs), len(pairs))
        for kind, pairs in sorted(groups.items())
    }


def _counts(found: TaskScores, scores: MetricScores) -> Counts:
    pairs = list(zip(scores.before, scores.after, strict=True))
    return Counts(changed=len(found.changed), lost=sum(a < b for b, a in pairs), gained=sum(a > b for b, a in pairs))
