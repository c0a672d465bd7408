"""Check that the verdict of `mmq check` in a report follows from its figures and is about these weights."""

import math
from collections.abc import Iterator

from exporter.artifact.artifact import Artifact
from exporter.evaluation.report_file import ComparisonRecord, DistanceRecord, ServingRecord
from exporter.planning.vllm_rules import engine_classes
from exporter.publishing.artifact_summary import Summary
from exporter.serving.comparison import Control, distance_problems
from exporter.serving.negative_control import modules_of
from exporter.serving.reference import BOUND, Distance, EngineComparison

AGAIN = "run `mmq check` again"


def serving_problems(summary: Summary, serving: ServingRecord, artifact: Artifact, weights: str) -> Iterator[str]:
    """One line per contradiction. weights: `weights_digest` of the artifact."""
    if serving.weights is None:
        yield f"the result of `mmq check` does not identify its weights: {AGAIN}"
    elif serving.weights != weights:
        yield f"the result of `mmq check` is about other weights: {AGAIN}"
    if serving.problems:
        yield "`mmq check` failed: the engine's answers differ from the reference"
    verdict = summary.manifest.serving
    if serving.passed == bool(serving.problems) or verdict is None or verdict.passed != serving.passed:
        yield f"the verdicts of `mmq check` in manifest and report contradict each other: {AGAIN}"
    elif serving.passed:
        yield from (f"`mmq check` passed, although {line}: {AGAIN}" for line in _unproven(serving, artifact))


def speed_problems(summary: Summary, weights: str) -> Iterator[str]:
    """One line if the result of `mmq bench` is about other weights. weights: `weights_digest` of the artifact."""
    if summary.speed is not None and summary.speed.weights != weights:
        yield "the result of `mmq bench` is about other weights: run `mmq bench` again"


def _unproven(serving: ServingRecord, artifact: Artifact) -> Iterator[str]:
    """Reasons why a check with the verdict `passed` should have failed."""
    compared, control = serving.compared, serving.control
    if compared is None or not serving.questions or compared.distance.tokens < serving.questions:
        yield "no answers were compared" if compared is None or not serving.questions else "answers have no tokens"
        return
    distances = [compared.distance, compared.floor]
    if control is None and artifact.manifest.linears:
        yield "it ran without its negative control"
    if control:
        distances += [control.moved, control.restored.distance, control.restored.floor]
        if control.component not in {c.name for c in artifact.family.components if modules_of(artifact, c.name)}:
            yield f"its control doubled the scales of {control.component}, which has no packed linears"
    if not all(map(_is_possible, distances)):
        yield "its differences of log-probabilities are impossible"
    doubled = Control(control.component, _distance(control.moved), _compared(control.restored)) if control else None
    yield from distance_problems(_compared(compared), doubled, min(serving.bound, BOUND))
    if artifact.manifest.format == "compressed_tensors" and artifact.manifest.linears:
        yield from _of_schemes(serving, artifact)


def _of_schemes(serving: ServingRecord, artifact: Artifact) -> Iterator[str]:
    """A problem unless the engine's log has the scheme of every packed linear."""
    if not serving.schemes:
        yield "the engine's log has no scheme"
        return
    linears: dict[tuple[str, ...], set[str]] = {}
    for module in artifact.manifest.linears:
        classes = engine_classes(artifact.scheme_of(module))
        linears.setdefault(classes, set()).add(artifact.family.engine_name(module))
    for classes, names in linears.items():
        logged = sum(serving.schemes.get(name, 0) for name in classes)
        if logged < len(names):
            yield f"the engine's log has scheme {' or '.join(classes)} for {logged} of {len(names)} linears"


def _is_possible(stored: DistanceRecord) -> bool:
    """Whether a mean and a largest absolute difference can be of the same finite numbers."""
    if stored.mean is None or stored.largest is None:
        return False
    return 0 <= stored.mean <= stored.largest * (1 + 1e-9)


def _distance(stored: DistanceRecord) -> Distance:
    largest, mean = (math.nan if value is None else value for value in (stored.largest, stored.mean))
    return Distance(largest, mean, stored.tokens)


def _compared(stored: ComparisonRecord) -> EngineComparison:
    return EngineComparison(_distance(stored.distance), _distance(stored.floor))
