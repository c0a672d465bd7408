"""What cards and comparisons need of a report, checked before it is read: files may be anybody's."""

from collections.abc import Mapping
from typing import Any

NUMBER = (int, float)
RECIPE_FIELDS: dict[str, Any] = {"name": str, "model.repo": str, "quantize": list}
SERVING_FIELDS: dict[str, Any] = {
    "engine": str,
    "build": str,
    "questions": NUMBER,
    "bound": NUMBER,
    "problems": list,
    "schemes": dict,
    "kernels": list,
}
DISTANCE_FIELDS: dict[str, Any] = {"mean": NUMBER, "largest": NUMBER}
DISTANCES = {  # what a check measured, by its place in the report: what it says to a reader
    "compared.distance": "log-probabilities beside the dequantized weights'",
    "compared.floor": "the same of 16-bit sums alone",
    "control.moved": "control, the scales of one component doubled",
    "control.restored.distance": "control, doubled on both sides",
}
REPORT_FIELDS: dict[str, Any] = {"passed": bool, "measures": list, "gates": list}
MEASURE_FIELDS: dict[str, Any] = {"task": str, "metric": str, "samples": NUMBER} | {
    f"difference.{name}": NUMBER for name in ("before", "after", "drop", "low", "high")
}
GATE_FIELDS: dict[str, Any] = {
    "task": str,
    "metric": str,
    "lost": (*NUMBER, type(None)),
    "max_drop": NUMBER,
    "decide": str,
    "passed": bool,
}


def require(value: Any, fields: Mapping[str, Any], where: str) -> None:
    """ValueError naming the first field (`a.b`) that is missing or of another kind."""
    for path, kind in fields.items():
        found = value
        for part in path.split("."):
            if not isinstance(found, Mapping) or part not in found:
                raise ValueError(f"{where} has no {path}")
            found = found[part]
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            raise ValueError(f"{path} of {where} is {type(found).__name__}")


def distance(serving: Mapping[str, Any], path: str) -> Mapping[str, Any] | None:
    """What is at `a.b` of what a report says of serving; None when a step of the path is missing or null."""
    found: Mapping[str, Any] | None = serving
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def require_report(report: Any) -> None:
    """ValueError unless `report` has everything that is read of it later."""
    require(report, REPORT_FIELDS, "the report")
    for measure in report["measures"]:
        require(measure, MEASURE_FIELDS, "a measure of the report")
    for gate in report["gates"]:
        require(gate, GATE_FIELDS, "a gate of the report")
    if not isinstance(report.get("evaluation") or {}, Mapping):
        raise ValueError("evaluation of the report is no mapping")


def require_serving(report: Any) -> Mapping[str, Any] | None:
    """What a report says of serving, None when nothing; ValueError as above."""
    if not isinstance(report, Mapping):
        raise ValueError("the report is no mapping")
    found: Mapping[str, Any] | None = report.get("serving")
    if found is not None:
        require(found, SERVING_FIELDS, "serving of the report")
        for path in DISTANCES:
            if (measured := distance(found, path)) is not None:
                require(measured, DISTANCE_FIELDS, f"{path} of the report's serving")
    return found
