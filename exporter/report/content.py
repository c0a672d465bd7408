"""What a report says, as plain data: from the artifact's manifest, recipe and evaluation alone."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import yaml

from exporter.artifact.manifest import Manifest
from exporter.evaluation.gate_text import DECIDE_RULES, VERDICT_SENTENCES, accepted, incomparable, more_samples
from exporter.evaluation.report_file import (
    AnswerPair,
    DistanceRecord,
    EvaluationRecord,
    GateResult,
    Report,
    ServingRecord,
)
from exporter.publishing.artifact_summary import Summary, component_of, drawings_note

CHANGED_SHOWN = 40  # samples with pictures on the page; the artifact's own report lists more
NEVER = "never evaluated"
TONES = {"passed": "passed", "failed": "failed", "not comparable": "failed"}  # class on the page; others are `open`


def collect(summary: Summary, pictures: Mapping[tuple[str, str], str]) -> dict[str, Any]:
    """Everything the page shows, ready for JSON.

    pictures: (task, sample id) -> data URL of a small picture; samples without one are shown without.
    """
    report, manifest = summary.report, summary.manifest
    word = report.verdict if report else NEVER
    return {
        "name": summary.name,
        "source": summary.source,
        "recipe": {"name": summary.recipe.name, "summary": summary.recipe.summary},
        "verdict": word,
        "verdict_tone": TONES.get(word, "open"),
        "verdict_says": VERDICT_SENTENCES[report.verdict] if report else "it was never evaluated",
        "built_in": drawings_note(summary),
        "other_baseline": summary.other_baseline,
        "gates": [_gate(gate) for gate in report.gates] if report else [],
        "bytes": manifest.bytes.model_dump(),
        "bits_per_weight": manifest.bits_per_weight,
        "parts": [asdict(part) | {"methods": list(part.methods)} for part in summary.parts],
        "scores": scores(report),
        "by_kind": report.by_kind if report else {},
        "corpus": {task: figures for task, figures in report.corpus.items() if figures} if report else {},
        "counts": {task: counts.model_dump() for task, counts in report.counts.items()} if report else {},
        "blocks": blocks(manifest),
        "changed": _with_pictures(report.changed[:CHANGED_SHOWN] if report else (), pictures),
        "changed_total": sum(counts.changed for counts in report.counts.values()) if report else 0,
        "examples": _with_pictures(report.examples if report else (), pictures),
        "evaluation": report.evaluation.model_dump(exclude_none=True) if report else {},
        "asked_by": _asked_by(report.evaluation) if report else "",
        "serving": _served(summary.serving) if summary.serving else None,
        "plan": yaml.safe_dump(summary.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        "provenance": _provenance(manifest),
    }


def _gate(gate: GateResult) -> dict[str, Any]:
    """A gate for the page: its figures, the class of its verdict, and what would resolve it."""
    return {
        **gate.model_dump(),
        "tone": TONES.get(gate.verdict, "open"),
        "rule": DECIDE_RULES[gate.decide],
        "accepted": accepted(gate),
        "more": more_samples(gate) if gate.verdict == "not resolved" else "",
        "why": incomparable(gate) if gate.verdict == "not comparable" else "",
    }


def scores(report: Report | None) -> list[dict[str, Any]]:
    """One row a metric; `change`, `low`, `high` and `allowed` are shares of the full-precision score, as in gates."""
    if report is None:
        return []
    allowed = {(gate.task, gate.metric): -gate.max_drop for gate in report.gates}
    rows = []
    for measure in report.measures:
        found = measure.difference
        absolute = {"change": found.change, "low": found.low, "high": found.high}
        rows.append(
            {
                "name": f"{measure.task} {measure.metric}",
                "samples": measure.samples,
                "before": found.before,
                "after": found.after,
                "absolute": absolute,
                "relative": {k: v / found.before for k, v in absolute.items()} if found.before > 0 else None,
                "allowed": allowed.get((measure.task, measure.metric)),
                "needed": measure.samples_to_resolve_one_percent,
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


def _served(found: ServingRecord) -> dict[str, Any]:
    """What `mmq check` measured: its verdict, and rows of a name and what was seen."""
    rows = {"engine": f"vllm {found.engine}, {found.build} build", "questions": f"{found.questions:,}"}
    rows |= {name: _distance(distance) for name, distance in _distances(found).items()}
    rows |= {f"linears that run as {name}": f"{count:,}" for name, count in sorted(found.schemes.items())}
    if found.kernels:
        rows["kernels"] = ", ".join(found.kernels)
    return {
        "passed": found.passed and not found.problems,
        "problems": list(found.problems),
        "rows": rows,
        "found": found.model_dump(),
    }


def _distances(found: ServingRecord) -> dict[str, DistanceRecord]:
    """Every comparison that was made, by what it says to a reader."""
    distances = {}
    if found.compared:
        distances["log-probabilities beside the dequantized weights'"] = found.compared.distance
        distances["the same of 16-bit sums alone"] = found.compared.floor
    if found.control:
        distances["control, the scales of one component doubled"] = found.control.moved
        distances["control, doubled on both sides"] = found.control.restored.distance
    return distances


def _distance(found: DistanceRecord) -> str:
    mean, largest = ("not finite" if value is None else f"{value:.4f}" for value in (found.mean, found.largest))
    return f"mean difference {mean}, largest {largest}"


def _asked_by(about: EvaluationRecord) -> str:
    """Which back end both models answered through."""
    named = {
        f"{model.backend} in {model.dtype} on {model.device}" if model.device else f"an {model.backend} server"
        for model in about.models.values()
    }
    return ", ".join(sorted(named))


def _with_pictures(rows: Sequence[AnswerPair], pictures: Mapping[tuple[str, str], str]) -> list[dict[str, Any]]:
    return [row.model_dump(mode="json") | {"picture": pictures.get((row.task, row.id))} for row in rows]


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
