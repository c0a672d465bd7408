"""Check how a report was measured: on which models, with which settings, on which data."""

from collections.abc import Iterator
from typing import Any

from exporter.artifact.artifact import Artifact
from exporter.data import BUILT_IN, image_key
from exporter.data.demo import samples as demo
from exporter.data.tasks import TASKS, retrieval
from exporter.evaluation.answers import digest
from exporter.evaluation.backends import ARTIFACT, SOURCE
from exporter.evaluation.evaluation_record import AnswersRecord
from exporter.evaluation.report_file import Report
from exporter.model.families import Family
from exporter.model.inference.predict_server import generation
from exporter.planning.prompts import prompted
from exporter.publishing.artifact_summary import Summary

AGAIN = "run `mmq evaluate` again"
SHARED_SETTINGS = ("backend", "device", "dtype", "generation", "processor", "versions")
BACKENDS = {"transformers": ("float32", "float16", "bfloat16"), "openai": (None,)}  # back end -> dtypes in its record
DRAWINGS = 30  # of the built-in test pictures that are compared with the report's


def evaluation_problems(summary: Summary, report: Report, artifact: Artifact, weights: str) -> list[str]:
    """One line per contradiction between the report's record and this artifact, its source, or what mmq does.

    weights: `weights_digest` of the artifact.
    """
    models = report.evaluation.models
    if models.keys() != {SOURCE, ARTIFACT}:
        return ["the report does not name the two models that answered"]
    return [
        *_of_weights(summary, report, weights),
        *_of_settings(models[SOURCE], models[ARTIFACT], summary, prompted_as(artifact.family, report)),
        *_of_scoring(report),
        *_of_data(report),
    ]


def _of_weights(summary: Summary, report: Report, weights: str) -> Iterator[str]:
    """Problems unless the report is about this artifact and its source."""
    source, baseline = summary.manifest.source, report.evaluation.baseline
    if report.evaluation.models[ARTIFACT].weights != weights:
        yield "the report was measured on other weights"
    if source.digest is None:
        yield "the manifest is from an older mmq and does not identify the full-precision model: export the model again"
    elif summary.other_baseline:
        yield f"the report compares the artifact with another model than its source: {summary.other_baseline}"
    elif baseline and baseline.differs:
        yield f"the report's baseline is the source, although it lists differences: {baseline.differs[0]}"


def prompted_as(family: Family, report: Report) -> Family:
    """The family with the prompts and answer lengths that a report records; an older mmq recorded none."""
    records = report.evaluation.prompts
    lengths = {task: record.max_new_tokens for task, record in records.items()}
    return prompted(family, {task: record.prompt for task, record in records.items()}, lengths)


def _of_settings(source: AnswersRecord, artifact: AnswersRecord, summary: Summary, family: Family) -> Iterator[str]:
    """Problems unless both models answered with the source's processor and mmq's own settings.

    family: with the prompts of the report.
    """
    processor = summary.manifest.source.processor
    if (processor or summary.manifest.source.digest) and artifact.processor != digest(processor):
        yield "the two models answered with another processor than the source's"
    before, after = (record.model_dump() for record in (source, artifact))
    differing = [key for key in SHARED_SETTINGS if before.get(key) != after.get(key)]
    if differing:
        yield f"the two models answered with different settings: {', '.join(differing)}"
    expected: dict[str, Any] = {task: generation(family, task) for task in family.max_new_tokens}
    if after.get("generation") != expected:
        yield f"the report's generation settings are not those of mmq for {family.name}: {AGAIN}"
    if artifact.dtype not in BACKENDS.get(artifact.backend, ()):
        yield f"the report has back end '{artifact.backend}' with dtype {artifact.dtype}, which mmq does not have"


def _of_scoring(report: Report) -> Iterator[str]:
    """Problems unless the scores were computed by the current methods of exactly these tasks."""
    methods = {task: dict(TASKS[task].method()) for task in report.samples if task in TASKS}
    if dict(report.evaluation.scoring) != methods:
        yield f"the report's settings of the scores differ from those of this mmq: {AGAIN}"
    if report.evaluation.searched and retrieval.NAME not in report.samples:
        yield "the report has a pool of retrieval, but no scores of retrieval"


def _of_data(report: Report) -> Iterator[str]:
    """Problems unless the report names its data, and names mmq's drawings where its pictures are those."""
    data = report.evaluation.data
    if not data:
        yield f"the report does not name the data that it was measured on: {AGAIN}"
    elif not set(data.split(", ")) & set(BUILT_IN) and _has_drawings(report):
        yield f"the report names {data} as its data, but has pictures of mmq's built-in drawings"


def _has_drawings(report: Report) -> bool:
    """Whether pictures of the report are among the first built-in test pictures."""
    pictures = {picture for scores in report.samples.values() for picture in scores.pictures}
    drawn = demo.samples("captioning", "test", DRAWINGS, report.evaluation.seed or 0)
    return any(image_key(sample.image()) in pictures for sample in drawn)
