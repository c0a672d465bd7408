"""`mmq_report.json` as typed data: scores of both models, gates, answers that changed, and what `mmq check` measured.

Anybody may have written the file, so it is checked when it is read. `samples` holds every score of both models:
measures, intervals and gates follow from it (`verdicts`), and `mmq publish` computes them again. Every change is
artifact minus full precision. Reports of version 1 had drops, full precision minus artifact, and no `samples`; they are
read with the signs of today.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from exporter.artifact.manifest import Count, Document, Line, Sha256, parse_document, parse_json, read_document
from exporter.evaluation.gates import Overall, Verdict
from exporter.evaluation.report_upgrade import from_version_1
from exporter.files.writing import write_text

REPORT = "mmq_report.json"
VERSION = 2

MetricName = Annotated[str, StringConstraints(pattern="^[a-z0-9_]{1,50}$")]  # of a task or a metric
Positive = Annotated[int, Field(ge=1, lt=2**53)]


class Closed(Document):
    """A part of the report in which unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


class MetricScores(Closed):
    """One metric of one task, a score a sample in the order of `TaskScores.ids`.

    before: full precision. after: artifact. chance: what an answer scores that does not depend on the picture; kept for
    the metrics of gates.
    """

    before: tuple[float, ...]
    after: tuple[float, ...]
    chance: tuple[float, ...] | None = None


class TaskScores(Closed):
    """Every sample of one task. pictures: `image_key` of each. changed: indices of samples whose answers differ."""

    ids: tuple[str, ...]
    pictures: tuple[Sha256, ...]
    kinds: tuple[str, ...]
    changed: tuple[Count, ...]
    scores: dict[MetricName, MetricScores]

    @model_validator(mode="after")
    def _same_length(self) -> Self:
        size = len(self.ids)
        if not size:
            raise ValueError("there are no samples")
        lists: dict[str, tuple[Any, ...] | None] = {"pictures": self.pictures, "kinds": self.kinds}
        for metric, scores in self.scores.items():
            lists |= {f"{metric} {key}": getattr(scores, key) for key in ("before", "after", "chance")}
        wrong = [f"{len(each)} {name}" for name, each in lists.items() if each is not None and len(each) != size]
        if wrong:
            raise ValueError(f"{size} ids, but {', '.join(wrong)}")
        if list(self.changed) != sorted(set(self.changed)) or (self.changed and self.changed[-1] >= size):
            raise ValueError("changed must be increasing indices of samples")
        return self


class StoredDifference(Closed):
    """Means of both models, their difference `change` (after - before), and the ends of its 95 % interval."""

    before: float
    after: float
    change: float
    low: float
    high: float
    sd: Annotated[float, Field(ge=0)] | None = None


class Measure(Closed):
    """One metric of one task. samples_to_resolve_one_percent: see `verdicts.needed`."""

    task: MetricName
    metric: MetricName
    samples: Positive
    difference: StoredDifference
    samples_to_resolve_one_percent: Positive | None = None


class GateResult(Closed):
    """One gate of the recipe and its verdict.

    change, low, high: the measured change and the ends of its 95 % interval, as shares of the full-precision score;
    None where nothing can be compared. chance: mean score of answers that do not depend on the picture.
    samples_needed: about how many would resolve it.
    """

    task: MetricName
    metric: MetricName
    max_drop: Annotated[float, Field(ge=0, le=1)]
    decide: Literal["point", "upper"]
    verdict: Verdict
    samples: Positive | None = None
    before: float | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    samples_needed: Positive | None = None


class Answered(Closed):
    """One sample with both answers.

    scores: of the task's first metric, before and after. image: `image_key`. file: in the data's folder.
    """

    task: MetricName
    id: str
    question: str | None
    references: tuple[str, ...]
    before: str
    after: str
    kind: str = ""
    image: Sha256 | None = None
    file: str = ""
    scores: tuple[float, float] | None = None


class Counts(Closed):
    """How many answers of a task changed, and how many samples lost or gained score."""

    changed: Count
    lost: Count
    gained: Count


class AnswersRecord(Document):
    """What identifies the answers of one model. weights, processor: digests. Other keys: how it was asked."""

    model_config = ConfigDict(extra="allow")

    weights: Line
    processor: Line | None = None
    backend: Line = ""
    dtype: Line | None = None
    device: Line | None = None


class BaselineRecord(Closed):
    """The model that the full-precision scores are of. differs: from the artifact's source; see `baseline.Baseline`."""

    model: Line
    is_source: bool
    differs: tuple[Line, ...]


class Bootstrap(Closed):
    """How intervals were computed."""

    resamples: Positive
    confidence: Annotated[float, Field(gt=0, lt=1)]
    seed: int


class EvaluationRecord(Document):
    """How it was measured. samples, seed: of the choice of samples. searched: sizes of retrieval's pool."""

    model_config = ConfigDict(extra="allow")

    data: Line | None = None
    samples: Positive | None = None
    seed: int | None = None
    scoring: dict[MetricName, dict[Line, Line]] = Field(default_factory=dict)
    searched: dict[MetricName, Count] | None = None
    bootstrap: Bootstrap | None = None
    baseline: BaselineRecord | None = None
    models: dict[Line, AnswersRecord] = Field(default_factory=dict)


class DistanceRecord(Closed):
    """Differences of log-probabilities; None where one was not a finite number."""

    mean: float | None
    largest: float | None
    tokens: Count = 0


class ComparisonRecord(Closed):
    """The engine beside the reference, and the reference in 16 bits beside itself."""

    distance: DistanceRecord
    floor: DistanceRecord


class ControlRecord(Closed):
    """The engine with doubled scales of one component, beside the reference without and with them."""

    component: Line
    moved: DistanceRecord
    restored: ComparisonRecord


class ServingRecord(Closed):
    """What the last `mmq check` measured. weights: of the artifact that was served; None in older reports."""

    engine: Line
    build: Line
    questions: Count
    bound: Annotated[float, Field(ge=0)]
    problems: tuple[str, ...]
    schemes: dict[Line, Count]
    kernels: tuple[Line, ...]
    passed: bool
    compared: ComparisonRecord | None = None
    control: ControlRecord | None = None
    startup_seconds: Annotated[float, Field(ge=0)] | None = None
    weights: Sha256 | None = None


class Report(Closed):
    """Everything an evaluation measured.

    samples: by task; empty in reports of version 1. by_kind: task -> question type -> (before, after, samples) of the
    first metric. changed: samples whose answer changed, the tasks in turn, each with its largest loss first. examples:
    the first samples of each task. corpus: task -> figure of the whole set that is no mean of samples -> both models'.
    """

    passed: bool
    verdict: Overall
    measures: tuple[Measure, ...]
    gates: tuple[GateResult, ...]
    samples: dict[MetricName, TaskScores] = Field(default_factory=dict)
    by_kind: dict[MetricName, dict[str, tuple[float, float, Positive]]] = Field(default_factory=dict)
    changed: tuple[Answered, ...] = ()
    examples: tuple[Answered, ...] = ()
    corpus: dict[MetricName, dict[Line, tuple[float, float]]] = Field(default_factory=dict)
    counts: dict[MetricName, Counts] = Field(default_factory=dict)
    evaluation: EvaluationRecord = EvaluationRecord()
    format_version: Annotated[int, Field(ge=1, le=VERSION)] = VERSION

    def plain(self) -> dict[str, Any]:
        """Plain data for `--json`, without the single scores."""
        return self.model_dump(mode="json", exclude={"samples"})


def parse_report(content: bytes, where: str) -> tuple[Report | None, ServingRecord | None]:
    """A report from a file's bytes: its evaluation (None when there was none) and its check (None when there was none).

    ArtifactError lists the problems; `where` names the file in it.
    """
    plain = parse_json(content, where)
    serving = plain.pop("serving", None)
    evaluated = None
    if plain.keys() - {"format_version"}:
        if plain.get("format_version", 1) == 1:
            plain = from_version_1(plain)
        evaluated = parse_document(Report, plain, where)
    return evaluated, None if serving is None else parse_document(ServingRecord, serving, f"{where}: serving")


def read_report(folder: Path) -> tuple[Report | None, ServingRecord | None]:
    """The report of an artifact's folder as `parse_report` gives it; both None when there is no file."""
    path = folder / REPORT
    if not path.exists():
        return None, None
    return parse_report(read_document(path), str(path))


def write_report(folder: Path, report: Report | None, serving: ServingRecord | None) -> None:
    """Put a report into an artifact's folder, atomically."""
    write_text(folder / REPORT, dump(report, serving))


def dump(report: Report | None, serving: ServingRecord | None) -> str:
    """The file's text: indented, but for the single scores, which take one line for each list."""
    plain: dict[str, Any] = report.plain() if report else {}
    if serving:
        plain["serving"] = serving.model_dump(mode="json")
    text = json.dumps({"format_version": VERSION, **plain}, indent=1, sort_keys=True)
    samples = _compact(report.samples) if report and report.samples else ""
    return text.removesuffix("\n}") + samples + "\n}\n"


def _compact(samples: Mapping[str, TaskScores]) -> str:
    tasks = []
    for task, scores in samples.items():
        plain = scores.model_dump(mode="json", exclude_none=True)
        metrics = plain.pop("scores")
        lines = [f'   "{key}": {json.dumps(value, separators=(",", ":"))}' for key, value in plain.items()]
        inner = [f'    "{metric}": {json.dumps(value, separators=(",", ":"))}' for metric, value in metrics.items()]
        lines.append('   "scores": {\n' + ",\n".join(inner) + "\n   }")
        tasks.append(f'  "{task}": {{\n' + ",\n".join(lines) + "\n  }")
    return ',\n "samples": {\n' + ",\n".join(tasks) + "\n }"
