"""Convert reports of version 1 to the current layout, as plain data.

Version 1 had drops (full precision minus artifact) and decided gates by the measured drop alone. The conversion negates
the drops and derives verdicts from the stored intervals. Keys that version 1 lacks stay absent.
"""

from collections.abc import Mapping
from typing import Any

from exporter.data.tasks import highest
from exporter.evaluation.bootstrap import Difference, gate_interval
from exporter.evaluation.gates import interval_verdict, worst

ANSWERED = ("task", "id", "question", "references", "before", "after", "kind", "image", "file", "scores")
PARTS = ("by_kind", "corpus", "counts", "evaluation")


def from_version_1(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report with current keys. Invalid parts are passed through; validation of the schema reports them."""
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
    difference, negated = old["difference"], {"change": "drop", "low": "high", "high": "low"}
    new = {key: difference[key] for key in ("before", "after", "sd") if key in difference}
    new |= {key: -difference[name] for key, name in negated.items() if isinstance(difference.get(name), int | float)}
    unchanged = ("task", "metric", "samples", "samples_to_resolve_one_percent")
    return {key: old[key] for key in unchanged if key in old} | {"difference": new}


def _gate(old: Any, measures: list[Any]) -> Any:
    """A gate with its verdict from the stored interval; `not measured` when its measure is missing or incomplete."""
    if not isinstance(old, Mapping):
        return old
    new = {key: old[key] for key in ("task", "metric", "max_drop", "decide") if key in old}
    matching = [m for m in measures if isinstance(m, dict) and _name(m) == _name(new)]
    try:
        return new | _verdict(new, matching[0]["difference"], int(matching[0]["samples"]))
    except (LookupError, TypeError, ValueError):
        return new | {"verdict": "not measured"}


def _name(part: Mapping[str, Any]) -> tuple[Any, Any]:
    return part.get("task"), part.get("metric")


def _verdict(gate: Mapping[str, Any], stored: Mapping[str, Any], samples: int) -> dict[str, Any]:
    change, low, high = (float(stored[key]) for key in ("change", "low", "high"))
    spread = float(stored.get("sd", high - low))  # 0 when no score differs
    before = float(stored["before"])
    if before <= 0:
        return {"verdict": "not comparable", "samples": samples, "before": before}
    difference = Difference(before, float(stored["after"]), change, low, high, spread)
    low, high = gate_interval(difference, samples, highest(str(gate["metric"])))
    verdict = interval_verdict(low / before, high / before, float(gate["max_drop"]))
    return {
        "verdict": verdict,
        "samples": samples,
        "before": before,
        "change": change / before,
        "low": low / before,
        "high": high / before,
    }
