"""Reports of version 1 in the layout of today, as plain data.

They had drops (full precision minus artifact) and gates that were decided by the measured drop alone. Signs are turned,
and verdicts follow from the intervals that are stored. What they did not hold stays absent.
"""

from collections.abc import Mapping
from typing import Any

from exporter.evaluation.gates import decided, worst
from exporter.evaluation.statistics import Difference, ends

ANSWERED = ("task", "id", "question", "references", "before", "after", "kind", "image", "file", "scores")
PARTS = ("by_kind", "corpus", "counts", "evaluation")


def from_version_1(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report with today's keys. Where it is not what version 1 was, the reader of its layout says so."""
    measures = [_measure(old) for old in _listed(report, "measures")]
    gates = [_gate(old, measures) for old in _listed(report, "gates")]
    rows = {key: [_row(old) for old in _listed(report, key)] for key in ("changed", "examples") if key in report}
    parts = {key: report[key] for key in PARTS if key in report}
    upgraded = {"format_version": 1, "measures": measures, "gates": gates, **rows, **parts}
    verdicts = [gate["verdict"] for gate in gates if isinstance(gate, dict)]
    return upgraded | {"verdict": worst(verdicts), "passed": worst(verdicts) == "passed"}


def _listed(report: Mapping[str, Any], key: str) -> list[Any]:
    value = report.get(key)
    return value if isinstance(value, list) else [value]


def _row(old: Any) -> Any:
    return {key: old[key] for key in ANSWERED if key in old} if isinstance(old, Mapping) else old


def _measure(old: Any) -> Any:
    if not isinstance(old, Mapping) or not isinstance(old.get("difference"), Mapping):
        return old
    difference, turned = old["difference"], {"change": "drop", "low": "high", "high": "low"}
    new = {key: difference[key] for key in ("before", "after", "sd") if key in difference}
    new |= {key: -difference[was] for key, was in turned.items() if isinstance(difference.get(was), int | float)}
    kept = ("task", "metric", "samples", "samples_to_resolve_one_percent")
    return {key: old[key] for key in kept if key in old} | {"difference": new}


def _gate(old: Any, measures: list[Any]) -> Any:
    """A gate with its verdict by the stored interval; `not measured` without a whole measure of its metric."""
    if not isinstance(old, Mapping):
        return old
    new = {key: old[key] for key in ("task", "metric", "max_drop", "decide") if key in old}
    named = [m for m in measures if isinstance(m, dict) and _name(m) == _name(new)]
    try:
        return new | _verdict(float(old["max_drop"]), named[0]["difference"], int(named[0]["samples"]))
    except (LookupError, TypeError, ValueError):
        return new | {"verdict": "not measured"}


def _name(part: Mapping[str, Any]) -> tuple[Any, Any]:
    return part.get("task"), part.get("metric")


def _verdict(max_drop: float, stored: Mapping[str, Any], samples: int) -> dict[str, Any]:
    change, low, high = (float(stored[key]) for key in ("change", "low", "high"))
    spread = float(stored.get("sd", high - low))  # 0 where no score differs
    before = float(stored["before"])
    if before <= 0:
        return {"verdict": "not comparable", "samples": samples, "before": before}
    low, high = ends(Difference(before, float(stored["after"]), change, low, high, spread), samples)
    verdict = decided(low / before, high / before, max_drop)
    return {
        "verdict": verdict,
        "samples": samples,
        "before": before,
        "change": change / before,
        "low": low / before,
        "high": high / before,
    }
