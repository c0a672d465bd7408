"""Decide whether an artifact may be published, by recomputing the claims of its files.

Manifest and report are untrusted. mmq trusts the scores of single samples and recomputes measures, intervals and
verdicts from them, and the scores of listed answers from their texts; it derives the schemes of all linears from the
recipe's plan, and compares the hashes of report, weights and source. Each difference is a reason not to publish.
"""

from collections.abc import Iterator
from pathlib import Path

from exporter.artifact.artifact import Artifact
from exporter.artifact.verify import verify
from exporter.device import Device
from exporter.errors import ArtifactError
from exporter.evaluation.backends import weights_digest
from exporter.evaluation.gate_text import accepted, sentence
from exporter.evaluation.report_file import Report
from exporter.events import Listener
from exporter.publishing.artifact_summary import Summary, drawings_note, folder_reader, read_summary
from exporter.publishing.proof.evaluation import evaluation_problems
from exporter.publishing.proof.files import file_problems
from exporter.publishing.proof.plan import plan_problems
from exporter.publishing.proof.report import score_problems
from exporter.publishing.proof.serving import serving_problems, speed_problems


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
    artifact = Artifact.open(folder)
    problems += plan_problems(summary, artifact) + file_problems(artifact)
    if summary.report is None:
        problems.append("the artifact was never evaluated")
    else:
        problems += [
            *_of_report(summary, summary.report, artifact),
            *_of_gates(summary, summary.report, accept_built_in),
        ]
    if summary.serving:
        problems += serving_problems(summary, summary.serving, artifact, weights_digest(artifact))
    elif summary.manifest.serving:
        problems.append("the manifest has a verdict of `mmq check` but the report has none: run `mmq check` again")
    if summary.speed:
        problems += speed_problems(summary, weights_digest(artifact))
    return summary, tuple(dict.fromkeys(problems))


def _of_report(summary: Summary, report: Report, artifact: Artifact) -> Iterator[str]:
    """Contradictions between the report and its scores, the recipe and the manifest."""
    if not report.samples:
        yield "the report is from an older mmq and has no scores of single samples: run `mmq evaluate` again"
        return
    yield from score_problems(report, summary.recipe)
    yield from evaluation_problems(summary, report, artifact, weights_digest(artifact))
    calibrated = {sample.image for sample in summary.manifest.provenance.calibration.samples}
    for task, scores in report.samples.items():
        shared = sum(picture in calibrated for picture in scores.pictures)
        if shared:
            yield f"{shared} test pictures of {task} are also calibration pictures: scores on them are no evidence"


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
