"""What a report says, as plain data: from the artifact's manifest, recipe and evaluation alone."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import yaml

from exporter.facts import Facts, component_of
from exporter.fields import DISTANCES, distance
from exporter.manifest import Manifest

CHANGED_SHOWN = 40  # samples with pictures on the page; the artifact's own report lists more


def collect(facts: Facts, pictures: Mapping[tuple[str, str], str]) -> dict[str, Any]:
    """Everything the page shows, ready for JSON.

    pictures: (task, sample id) -> data URL of a small picture; samples without one are shown without.
    """
    report = facts.report or {}
    manifest = facts.manifest
    return {
        "name": facts.name,
        "source": facts.source,
        "recipe": {"name": str(facts.recipe.get("name", "")), "summary": str(facts.recipe.get("summary", ""))},
        "verdict": verdict(facts.report),
        "other_baseline": facts.other_baseline,
        "gates": report.get("gates", []),
        "bytes": manifest.bytes.model_dump(),
        "bits_per_weight": manifest.bits_per_weight,
        "parts": [asdict(part) | {"methods": list(part.methods)} for part in facts.parts],
        "scores": scores(report),
        "by_kind": report.get("by_kind", {}),
        "corpus": {task: figures for task, figures in report.get("corpus", {}).items() if figures},
        "counts": report.get("counts", {}),
        "blocks": blocks(manifest),
        "changed": _with_pictures(report.get("changed", [])[:CHANGED_SHOWN], pictures),
        "changed_total": sum(counts["changed"] for counts in report.get("counts", {}).values()),
        "examples": _with_pictures(report.get("examples", []), pictures),
        "evaluation": report.get("evaluation", {}),
        "asked_by": _asked_by(report.get("evaluation", {})),
        "serving": _served(facts.serving) if facts.serving else None,
        "plan": yaml.safe_dump(dict(facts.recipe), sort_keys=False, allow_unicode=True),
        "provenance": _provenance(manifest),
    }


def verdict(report: Mapping[str, Any] | None) -> str:
    """`passed`, `failed`, or `unproven` when nothing was measured or no gate was named."""
    if not report or not report.get("gates"):
        return "unproven"
    return "passed" if report["passed"] else "failed"


def scores(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a metric; `change`, `low`, `high` and `allowed` are shares of the full-precision score, as in gates."""
    gates = {(gate["task"], gate["metric"]): gate for gate in report.get("gates", [])}
    rows = []
    for measure in report.get("measures", []):
        found = measure["difference"]
        base = found["before"]
        gate = gates.get((measure["task"], measure["metric"]))
        share = {"change": -found["drop"], "low": -found["high"], "high": -found["low"]}
        rows.append(
            {
                "name": f"{measure['task']} {measure['metric']}",
                "samples": measure["samples"],
                "before": base,
                "after": found["after"],
                "absolute": share,
                "relative": {key: value / base for key, value in share.items()} if base > 0 else None,
                "allowed": -gate["max_drop"] if gate else None,
                "needed": measure.get("samples_to_resolve_one_percent"),
            }
        )
    return rows


def blocks(manifest: Manifest) -> dict[str, list[dict[str, Any]]]:
    """Component -> its blocks in order: every linear's relative error, their mean and the largest."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for unit in manifest.units:
        inside = {name: error for name, error in manifest.errors.items() if name.startswith(f"{unit}.")}
        if inside:
            component = component_of(next(iter(inside)), manifest.family)
            short = {name.removeprefix(f"{unit}."): float(error) for name, error in sorted(inside.items())}
            found.setdefault(component, {})[unit] = short
    return {
        component: [
            {"block": unit, "mean": sum(e.values()) / len(e), "largest": max(e.values()), "linears": e}
            for unit, e in units.items()
        ]
        for component, units in found.items()
    }


def _served(found: Mapping[str, Any]) -> dict[str, Any]:
    """What `mmq check` found: its verdict, and rows of a name and what was seen."""
    rows = {"engine": f"vllm {found['engine']}, {found['build']} build", "questions": f"{found['questions']:,}"}
    for path, says in DISTANCES.items():
        if d := distance(found, path):
            rows[says] = f"mean difference {d['mean']:.4f}, largest {d['largest']:.4f}"
    rows |= {f"linears that run as {name}": f"{count:,}" for name, count in sorted(found["schemes"].items())}
    if found["kernels"]:
        rows["kernels"] = ", ".join(found["kernels"])
    return {"passed": not found["problems"], "problems": list(found["problems"]), "rows": rows, "found": dict(found)}


def _asked_by(about: Mapping[str, Any]) -> str:
    """Which back end both models answered through."""
    models = about.get("models", {}).values()
    named = {
        f"{model['backend']} in {model['dtype']} on {model['device']}"
        if "device" in model
        else f"an {model['backend']} server"
        for model in models
    }
    return ", ".join(sorted(named))


def _with_pictures(rows: list[Mapping[str, Any]], pictures: Mapping[tuple[str, str], str]) -> list[dict[str, Any]]:
    empty = {"kind": "", "scores": None, "image": None, "file": ""}  # an older report lacks them
    return [{**empty, **row, "picture": pictures.get((row["task"], row["id"]))} for row in rows]


def _provenance(manifest: Manifest) -> dict[str, Any]:
    """Where it came from, without the long list of calibration samples."""
    calibration = manifest.provenance.calibration
    return {
        "source": manifest.source.model_dump(),
        "calibration": {
            **calibration.model_dump(exclude={"samples"}, exclude_none=True),
            "number of samples": len(calibration.samples),
        },
        "device": manifest.provenance.device,
        "versions": manifest.versions,
        "recipe sha256": manifest.recipe.sha256,
        "fingerprint": manifest.fingerprint,
        "notes": list(manifest.notes),
    }
