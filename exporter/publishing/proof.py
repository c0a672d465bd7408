"""Whether an artifact may be published: everything that its files claim and that can be computed is computed again.

A report or a manifest may be anybody's. Scores are what it is taken for; measures, intervals and verdicts follow from
them by the recipe's gates, the recipe's plan says what must be packed how, and hashes tie report, weights and source
together. Each difference is a reason not to publish.
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
from exporter.publishing.artifact_summary import Summary, built_in, folder_reader, read_summary
from exporter.publishing.proof_plan import against_plan
from exporter.publishing.proof_report import against_scores
from exporter.serving.check import Control, distance_problems
from exporter.serving.reference import BOUND, Compared, Distance

ASKED_ALIKE = ("backend", "device", "dtype", "generation", "processor", "versions")


def prove(
    folder: Path, device: Device, on_event: Listener, accept_built_in: bool = False
) -> tuple[Summary, tuple[str, ...]]:
    """The artifact's summary, and every reason not to publish it (ArtifactError when it is no artifact at all).

    accept_built_in: scores on the built-in drawings count, although they say little of this model.
    """
    summary = read_summary(folder.name, folder_reader(folder))
    problems: list[str] = []
    try:
        verify(folder, device, on_event)
    except ArtifactError as error:
        problems.append(error.message.replace(str(folder), folder.name))
    problems += against_plan(summary, Artifact.open(folder))
    source = summary.manifest.source.processor
    other = [name for name, found in processor_files(folder).items() if source and source.get(name) != found]
    problems += [f"{name} is not the source's: prompts or pictures may be read otherwise" for name in other]
    if summary.report is None:
        problems.append("it was never evaluated")
    else:
        weights = weights_digest(Artifact.open(folder))
        problems += [
            *_of_report(summary, summary.report, weights),
            *_of_gates(summary, summary.report, accept_built_in),
        ]
    if summary.serving:
        problems += _of_serving(summary, summary.serving, weights_digest(Artifact.open(folder)))
    elif summary.manifest.serving:
        problems.append("the manifest has a verdict of `mmq check`, the report has none: run `mmq check` again")
    return summary, tuple(dict.fromkeys(problems))


def _of_report(summary: Summary, report: Report, weights: str) -> Iterator[str]:
    """What the report says otherwise than its scores, its recipe and the manifest do."""
    if not report.samples:
        yield "its report is of an older mmq and holds no single scores, so nothing can be computed again"
        return
    yield from against_scores(report, summary.recipe)
    yield from _of_models(summary, report, weights)
    calibrated = {sample.image for sample in summary.manifest.provenance.calibration.samples}
    for task, scores in report.samples.items():
        shared = sum(picture in calibrated for picture in scores.pictures)
        if shared:
            yield f"{shared} pictures of {task} were also calibrated on: scores on them prove nothing"


def _of_models(summary: Summary, report: Report, weights: str) -> Iterator[str]:
    """The report must be about this artifact and its source, asked in the same way."""
    models = report.evaluation.models
    if models.keys() != {SOURCE, ARTIFACT}:
        yield "its report does not name the two models that answered"
        return
    if models[ARTIFACT].weights != weights:
        yield "its report was measured on other weights"
    source = summary.manifest.source
    if source.digest is None:
        yield "its manifest is of an older mmq and does not identify the full-precision model: export it again"
    elif summary.other_baseline:
        yield f"its report compares it with another model than its source: {summary.other_baseline}"
    if source.processor and models[ARTIFACT].processor != digest(source.processor):
        yield "its two models were asked by another processor than the source's"
    before, after = (models[label].model_dump() for label in (SOURCE, ARTIFACT))
    unlike = [key for key in ASKED_ALIKE if before.get(key) != after.get(key)]
    if unlike:
        yield f"its two models were not asked in the same way: {', '.join(unlike)} differ"


def _of_gates(summary: Summary, report: Report, accept_built_in: bool) -> Iterator[str]:
    """Gates that the recipe does not accept, and data that says little."""
    if not summary.recipe.gates:
        yield "its recipe has no gates, so nothing says what it may lose"
    drawings = built_in(summary)
    if drawings and not accept_built_in:
        yield f"{drawings} `mmq evaluate --data SOURCE` measures it; --accept-built-in-data publishes it as it is"
    for gate in report.gates:  # those that follow from the scores, or the report is refused already
        excused = gate.verdict == "not measured" and bool(drawings) and accept_built_in
        if not accepted(gate) and not excused:
            yield f"gate {sentence(gate)}"


def _of_serving(summary: Summary, serving: ServingRecord, weights: str) -> Iterator[str]:
    """What `mmq check` measured must be of these weights, and its verdict must follow from it."""
    again = "run `mmq check` again"
    if serving.weights is None:
        yield f"its check by an engine does not say of which weights it is: {again}"
    elif serving.weights != weights:
        yield f"its check by an engine is of other weights: {again}"
    if serving.problems:
        yield "`mmq check` measured that the engine answers otherwise"
    verdict = summary.manifest.serving
    if serving.passed == bool(serving.problems) or verdict is None or verdict.passed != serving.passed:
        yield f"the verdicts of its check contradict each other: {again}"
    elif serving.passed:
        yield from (f"its check passed, although {line}: {again}" for line in _unproven(summary, serving))


def _distance(stored: report_file.DistanceRecord) -> Distance:
    largest, mean = (math.nan if value is None else value for value in (stored.largest, stored.mean))
    return Distance(largest, mean, stored.tokens)


def _compared(stored: report_file.ComparisonRecord) -> Compared:
    return Compared(_distance(stored.distance), _distance(stored.floor))


def _unproven(summary: Summary, serving: ServingRecord) -> list[str]:
    """Why a check that passed should not have."""
    if not serving.questions or serving.compared is None or not serving.compared.distance.tokens:
        return ["nothing was compared"]
    found = serving.control
    control = Control(found.component, _distance(found.moved), _compared(found.restored)) if found else None
    problems = distance_problems(_compared(serving.compared), control, min(serving.bound, BOUND))
    if summary.manifest.format == "compressed_tensors" and summary.manifest.linears and not serving.schemes:
        problems.append("the engine's log named no scheme")
    return problems
