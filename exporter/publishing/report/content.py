"""Content of the report page as plain data, from the artifact's manifest, recipe and evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import yaml

from exporter.artifact.manifest import Manifest
from exporter.evaluation.evaluation_record import EvaluationRecord
from exporter.evaluation.gate_text import DECIDE_RULES, VERDICT_SENTENCES, accepted, incomparable, more_samples
from exporter.evaluation.report_file import AnswerPair, DistanceRecord, GateResult, Report, ServingRecord
from exporter.evaluation.speed_record import SpeedRecord
from exporter.evaluation.speed_table import conditions, figures_rows
from exporter.evaluation.word_differences import spans
from exporter.publishing.artifact_summary import Summary, component_of, drawings_note
from exporter.publishing.headline import headline, relative_change

CHANGED_SHOWN = 40  # number of changed samples on the page; mmq_report.json lists more
NEVER = "never evaluated"
TONES = {"passed": "passed", "failed": "failed", "not comparable": "failed"}  # class on the page; others are `open`


def collect(summary: Summary, pictures: Mapping[tuple[str, str], str]) -> dict[str, Any]:
    """All content of the page, JSON-compatible.

    pictures: (task, sample id) -> data URL of a small picture.
    """
    report, manifest, recipe = summary.report, summary.manifest, summary.recipe
    verdict = report.verdict if report else NEVER
    return {
        "name": summary.name,
        "source": summary.source,
        "recipe": {"name": recipe.name, "summary": recipe.description(), "overrides": recipe.changes()},
        "headline": headline(summary),
        "verdict": verdict,
        "verdict_tone": TONES.get(verdict, "open"),
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
        "prompts": report.evaluation.prompts_text(report.samples) if report else "",
        "asked_by": _backend_text(report.evaluation) if report else "",
        "serving": _serving_content(summary.serving) if summary.serving else None,
        "speed": _speed_content(summary.speed) if summary.speed else None,
        "plan": yaml.safe_dump(
            recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True
        ),
        "provenance": _provenance(manifest),
    }


def _gate(gate: GateResult) -> dict[str, Any]:
    """A gate for the page: its values, the CSS class of its verdict, and the samples that would resolve it."""
    return {
        **gate.model_dump(),
        "tone": gate_tone(gate),
        "rule": DECIDE_RULES[gate.decide],
        "accepted": accepted(gate),
        "more": more_samples(gate) if gate.verdict == "not resolved" else "",
        "why": incomparable(gate) if gate.verdict == "not comparable" else "",
    }


def gate_tone(gate: GateResult) -> str:
    """CSS class of a gate; `open` also for one that passed although its interval exceeds the bound."""
    uncertain = gate.verdict == "passed" and gate.low is not None and gate.low < -gate.max_drop
    return "open" if uncertain else TONES.get(gate.verdict, "open")


def scores(report: Report | None) -> list[dict[str, Any]]:
    """One row per metric; `relative` and `allowed` are shares of the full-precision score, as in gates."""
    if report is None:
        return []
    allowed = {(gate.task, gate.metric): -gate.max_drop for gate in report.gates}
    tones = {(gate.task, gate.metric): gate_tone(gate) for gate in report.gates}
    rows = []
    for measure in report.measures:
        difference = measure.difference
        low, high = measure.interval()
        absolute = {"change": difference.change, "low": low, "high": high}
        rows.append(
            {
                "name": f"{measure.task} {measure.metric}",
                "samples": measure.samples,
                "before": difference.before,
                "after": difference.after,
                "absolute": absolute,
                "relative": relative_change(report, measure),
                "allowed": allowed.get((measure.task, measure.metric)),
                "tone": tones.get((measure.task, measure.metric), "none"),
                "needed": measure.samples_to_resolve_one_percent,
            }
        )
    return rows


def blocks(manifest: Manifest) -> dict[str, list[dict[str, Any]]]:
    """Component -> its blocks in order: relative error of every linear, and their mean and maximum."""
    blocks_by_component: dict[str, dict[str, dict[str, float]]] = {}
    for unit in manifest.units:
        unit_errors = {name: error for name, error in manifest.errors.items() if name.startswith(f"{unit}.")}
        if unit_errors:
            component = component_of(next(iter(unit_errors)), manifest.family)
            linear_errors = {name.removeprefix(f"{unit}."): float(error) for name, error in sorted(unit_errors.items())}
            blocks_by_component.setdefault(component, {})[unit] = linear_errors
    return {
        component: [
            {
                "block": unit,
                "mean": sum(errors.values()) / len(errors),
                "largest": max(errors.values()),
                "linears": errors,
            }
            for unit, errors in units.items()
        ]
        for component, units in blocks_by_component.items()
    }


def _serving_content(serving: ServingRecord) -> dict[str, Any]:
    """Result of `mmq check`: verdict, problems, and rows of name -> text."""
    rows = {"engine": f"vllm {serving.engine}, {serving.build} build", "questions": f"{serving.questions:,}"}
    rows |= {name: _distance_text(distance) for name, distance in _distances(serving).items()}
    rows |= {f"linears that run as {name}": f"{count:,}" for name, count in sorted(serving.schemes.items())}
    if serving.kernels:
        rows["kernels"] = ", ".join(serving.kernels)
    return {
        "passed": serving.passed and not serving.problems,
        "problems": list(serving.problems),
        "rows": rows,
        "record": serving.model_dump(),
    }


def _speed_content(speed: SpeedRecord) -> dict[str, Any]:
    """Result of `mmq bench`: how it was measured, rows of the table, and the figures."""
    rows = [list(row) for row in figures_rows(speed.artifact, speed.source)]
    return {"about": conditions(speed), "rows": rows, "figures": speed.model_dump(mode="json", exclude_none=True)}


def _distances(serving: ServingRecord) -> dict[str, DistanceRecord]:
    """Label -> distance of every comparison of the check."""
    distances = {}
    if serving.compared:
        distances["log-probabilities against the dequantized weights"] = serving.compared.distance
        distances["16-bit rounding alone"] = serving.compared.floor
    if serving.control:
        distances["control, scales of one component doubled"] = serving.control.moved
        distances["control, doubled on both sides"] = serving.control.restored.distance
    return distances


def _distance_text(distance: DistanceRecord) -> str:
    mean, largest = ("not finite" if value is None else f"{value:.4f}" for value in (distance.mean, distance.largest))
    return f"mean difference {mean}, largest {largest}"


def _backend_text(evaluation: EvaluationRecord) -> str:
    """Backend, dtype and device of both models as text."""
    backends = {
        f"{model.backend} in {model.dtype} on {model.device}" if model.device else f"an {model.backend} server"
        for model in evaluation.models.values()
    }
    return ", ".join(sorted(backends))


def _with_pictures(rows: Sequence[AnswerPair], pictures: Mapping[tuple[str, str], str]) -> list[dict[str, Any]]:
    return [
        row.model_dump(mode="json")
        | {
            "picture": pictures.get((row.task, row.id)),
            "words": [asdict(span) | {"differs": span.differs} for span in spans(row.before, row.after)],
        }
        for row in rows
    ]


def _provenance(manifest: Manifest) -> dict[str, Any]:
    """Origin of the artifact, with the number instead of the list of calibration samples."""
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
