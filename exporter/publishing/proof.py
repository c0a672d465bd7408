"""Decide whether an artifact may be published, by recomputing the claims of its files.

Manifest and report are untrusted. mmq trusts the scores of single samples and recomputes measures, intervals and
verdicts from them; it derives the schemes of all linears from the recipe's plan, and compares the hashes of report,
weights and source. Each difference is a reason not to publish.
"""

import math
from collections.abc import Iterator
from pathlib import Path

from exporter.artifact.artifact import Artifact
from exporter.artifact.verify import verify
from exporter.device import Device
from exporter.errors import ArtifactError
from exporter.evaluation import report_file
from exporter.evaluation.answers import digest
from exporter.evaluation.backends import ARTIFACT, SOURCE, weights_digest
from exporter.evaluation.gate_text import accepted, sentence
from exporter.evaluation.report_file import Report, ServingRecord
from exporter.events import Listener
from exporter.model.processor_files import processor_files
from exporter.publishing.artifact_summary import Summary, drawings_note, folder_reader, read_summary
from exporter.publishing.proof_plan import plan_problems
from exporter.publishing.proof_report import score_problems
from exporter.serving.check import Control, distance_problems
from exporter.serving.reference import BOUND, Distance, EngineComparison

SHARED_SETTINGS = ("backend", "device", "dtype", "generation", "processor", "versions")


def prove(
    folder: Path, device: Device, on_event: Listener, accept_built_in: bool = False
) -> tuple[Summary, tuple[str, ...]]:
    """Summary of the artifact, and every reason not to publish it (ArtifactError when it cannot be read).

    accept_built_in: whether scores on the built-in drawings are sufficient evidence.
    """
    summary = read_summary(folder.name, folder_reader(folder))
    problems: list[str] = []
    try:
        verify(folder, device, on_event)
    except ArtifactError as error:
        problems.append(error.message.replace(str(folder), folder.name))
    problems += plan_problems(summary, Artifact.open(folder))
    source = summary.manifest.source.processor
    other = [name for name, checksum in processor_files(folder).items() if source and source.get(name) != checksum]
    problems += [
        f"{name} differs from the source's file: prompts or pictures may be processed otherwise" for name in other
    ]
    if summary.report is None:
        problems.append("the artifact was never evaluated")
    else:
        weights = weights_digest(Artifact.open(folder))
        problems += [
            *_of_report(summary, summary.report, weights),
            *_of_gates(summary, summary.report, accept_built_in),
        ]
    if summary.serving:
        problems += _of_serving(summary, summary.serving, weights_digest(Artifact.open(folder)))
    elif summary.manifest.serving:
        problems.append("the manifest has a verdict of `mmq check` but the report has none: run `mmq check` again")
    return summary, tuple(dict.fromkeys(problems))


def _of_report(summary: Summary, report: Report, weights: str) -> Iterator[str]:
    """Contradictions between the report and its scores, the recipe and the manifest."""
    if not report.samples:
        yield "the report is from an older mmq and has no scores of single samples: run `mmq evaluate` again"
        return
    yield from score_problems(report, summary.recipe)
    yield from _of_models(summary, report, weights)
    calibrated = {sample.image for sample in summary.manifest.provenance.calibration.samples}
    for task, scores in report.samples.items():
        shared = sum(picture in calibrated for picture in scores.pictures)
        if shared:
            yield f"{shared} test pictures of {task} are also calibration pictures: scores on them are no evidence"


def _of_models(summary: Summary, report: Report, weights: str) -> Iterator[str]:
    """Problems unless the report is about this artifact and its source, both with the same settings."""
    models = report.evaluation.models
    if models.keys() != {SOURCE, ARTIFACT}:
        yield "the report does not name the two models that answered"
        return
    if models[ARTIFACT].weights != weights:
        yield "the report was measured on other weights"
    source = summary.manifest.source
    if source.digest is None:
        yield "the manifest is from an older mmq and does not identify the full-precision model: export the model again"
    elif summary.other_baseline:
        yield f"the report compares the artifact with another model than its source: {summary.other_baseline}"
    if source.processor and models[ARTIFACT].processor != digest(source.processor):
        yield "the two models answered with another processor than the source's"
    before, after = (models[label].model_dump() for label in (SOURCE, ARTIFACT))
    differing = [key for key in SHARED_SETTINGS if before.get(key) != after.get(key)]
    if differing:
        yield f"the two models answered with different settings: {', '.join(differing)}"


def _of_gates(summary: Summary, report: Report, accept_built_in: bool) -> Iterator[str]:
    """Gates that the recipe does not accept, and evaluations on the built-in drawings."""
    if not summary.recipe.gates:
        yield "the recipe has no gates, so the allowed loss is undefined: add gates to the recipe"
    drawings = drawings_note(summary)
    if drawings and not accept_built_in:
        yield f"{drawings} `mmq evaluate --data SOURCE` measures the loss; --accept-built-in-data accepts these scores"
    for gate in report.gates:  # `score_problems` refuses reports whose gates do not follow from the scores
        excused = gate.verdict == "not measured" and bool(drawings) and accept_built_in
        if not accepted(gate) and not excused:
            yield f"gate {sentence(gate)}"


def _of_serving(summary: Summary, serving: ServingRecord, weights: str) -> Iterator[str]:
    """Problems unless the result of `mmq check` is about these weights and its verdict follows from its figures."""
    again = "run `mmq check` again"
    if serving.weights is None:
        yield f"the result of `mmq check` does not identify its weights: {again}"
    elif serving.weights != weights:
        yield f"the result of `mmq check` is about other weights: {again}"
    if serving.problems:
        yield "`mmq check` failed: the engine's answers differ from the reference"
    verdict = summary.manifest.serving
    if serving.passed == bool(serving.problems) or verdict is None or verdict.passed != serving.passed:
        yield f"the verdicts of `mmq check` in manifest and report contradict each other: {again}"
    elif serving.passed:
        yield from (f"`mmq check` passed, although {line}: {again}" for line in _unproven(summary, serving))


def _distance(stored: report_file.DistanceRecord) -> Distance:
    largest, mean = (math.nan if value is None else value for value in (stored.largest, stored.mean))
    return Distance(largest, mean, stored.tokens)


def _compared(stored: report_file.ComparisonRecord) -> EngineComparison:
    return EngineComparison(_distance(stored.distance), _distance(stored.floor))


def _unproven(summary: Summary, serving: ServingRecord) -> list[str]:
    """Reasons why a check with the verdict `passed` should have failed."""
    if not serving.questions or serving.compared is None or not serving.compared.distance.tokens:
        return ["no answers were compared"]
    stored = serving.control
    control = Control(stored.component, _distance(stored.moved), _compared(stored.restored)) if stored else None
    problems = distance_problems(_compared(serving.compared), control, min(serving.bound, BOUND))
    if summary.manifest.format == "compressed_tensors" and summary.manifest.linears and not serving.schemes:
        problems.append("the engine's log has no scheme")
    return problems
