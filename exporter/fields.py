"""What cards and comparisons need of a manifest and a report, checked before it is read: files may be anybody's."""

from collections.abc import Mapping
from typing import Any

NUMBER = (int, float)
MANIFEST_FIELDS: dict[str, Any] = {
    "files": dict,
    "linears": dict,
    "errors": dict,
    "format": str,
    "family": str,
    "bits_per_weight": NUMBER,
    "bytes.before": NUMBER,
    "bytes.after": NUMBER,
    "versions": dict,
    "source.model": str,
    "recipe.sha256": str,
    "provenance.device": str,
    "provenance.calibration.data": str,
    "provenance.calibration.samples": list,
    "provenance.calibration.seed": NUMBER,
}
RECIPE_FIELDS: dict[str, Any] = {"name": str, "model.repo": str, "quantize": list}
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


def require_manifest(manifest: Any) -> None:
    """ValueError unless `manifest` has everything that is read of it later."""
    require(manifest, MANIFEST_FIELDS, "the manifest")
    if not all(isinstance(digest, str) for digest in manifest["files"].values()):
        raise ValueError("files of the manifest has something that is no hash")


def require_report(report: Any) -> None:
    """The same for a report."""
    require(report, REPORT_FIELDS, "the report")
    for measure in report["measures"]:
        require(measure, MEASURE_FIELDS, "a measure of the report")
    for gate in report["gates"]:
        require(gate, GATE_FIELDS, "a gate of the report")
    for key in ("evaluation", "serving"):
        if not isinstance(report.get(key) or {}, Mapping):
            raise ValueError(f"{key} of the report is no mapping")
