"""Schema of `mmq_report.json`: scores of both models, gates, changed answers, and the result of `mmq check`.

Files from the hub are untrusted, so every value is validated on reading. `samples` holds every score of both models;
`judge` computes measures, intervals and gates from it, and `mmq publish` recomputes them. A change is artifact minus
full precision. Reports of version 1 have drops (full precision minus artifact) and no `samples`; `report_upgrade`
converts them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from exporter.artifact.manifest import (
    Count,
    Line,
    Sha256,
    parse_document,
    parse_json,
    read_document,
)
from exporter.data.tasks import highest
from exporter.evaluation.bootstrap import Difference, gate_interval
from exporter.evaluation.evaluation_record import Closed, EvaluationRecord, MetricName, Positive
from exporter.evaluation.gates import Overall, Verdict
from exporter.evaluation.report_upgrade import from_version_1
from exporter.evaluation.speed_record import KEY as SPEED_KEY
from exporter.evaluation.speed_record import SpeedRecord, plain_speed, read_speed
from exporter.files.writing import write_text

REPORT = "mmq_report.json"
VERSION = 2


class MetricScores(Closed):
    """One metric of one task, one score per sample in the order of `TaskScores.ids`.

    before: full precision. after: artifact. chance: of answers that ignore the picture; only for metrics of gates.
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
            raise ValueError("ids is empty; a task has at least one sample")
        lists: dict[str, tuple[Any, ...] | None] = {"pictures": self.pictures, "kinds": self.kinds}
        for metric, scores in self.scores.items():
            lists |= {f"{metric} {key}": getattr(scores, key) for key in ("before", "after", "chance")}
        wrong = [f"{len(part)} {name}" for name, part in lists.items() if part is not None and len(part) != size]
        if wrong:
            raise ValueError(f"{size} ids, but {', '.join(wrong)}")
        if list(self.changed) != sorted(set(self.changed)) or (self.changed and self.changed[-1] >= size):
            raise ValueError("changed must be increasing indices of samples")
        return self


class StoredDifference(Closed):
    """Means of both models, their difference `change` (after - before) and its 95 % interval `low` to `high`.

    sd: standard deviation of the changes per sample.
    """

    before: float
    after: float
    change: float
    low: float
    high: float
    sd: Annotated[float, Field(ge=0)] | None = None


class Measure(Closed):
    """One metric of one task. samples_to_resolve_one_percent: number of samples for an interval of +- 1 %."""

    task: MetricName
    metric: MetricName
    samples: Positive
    difference: StoredDifference
    samples_to_resolve_one_percent: Positive | None = None

    def interval(self) -> tuple[float, float]:
        """95 % interval of the change in units of the score, by which a gate on this metric is decided."""
        d = self.difference
        sd = d.sd if d.sd is not None else float(d.low < d.high)  # older reports lack it: 0 where no score differs
        return gate_interval(
            Difference(d.before, d.after, d.change, d.low, d.high, sd), self.samples, highest(self.metric)
        )


class GateResult(Closed):
    """One gate of the recipe and its verdict.

    change, low, high: measured change and its 95 % interval, relative to the full-precision score; None when the gate
    is not comparable. chance: mean score of answers that ignore the picture. samples_needed: estimated number of
    samples that resolves the gate.
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


class AnswerPair(Closed):
    """One sample with both answers.

    scores: (before, after) of the task's first metric. image: `image_key`. file: path in the data source's folder.
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
    """Numbers of changed answers of a task, and of samples with a lower and a higher score."""

    changed: Count
    lost: Count
    gained: Count


class DistanceRecord(Closed):
    """Absolute differences of log-probabilities; None when one of them was not finite."""

    mean: float | None
    largest: float | None
    tokens: Count = 0


class ComparisonRecord(Closed):
    """distance: engine against the reference. floor: reference in 16 bits against the reference in float32."""

    distance: DistanceRecord
    floor: DistanceRecord


class ControlRecord(Closed):
    """Control with doubled scales. moved: distance to the true reference. restored: comparison with a doubled one."""

    component: Line
    moved: DistanceRecord
    restored: ComparisonRecord


class ServingRecord(Closed):
    """Result of the last `mmq check`. weights: digest of the served artifact; None in older reports."""

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
    """Result of an evaluation.

    samples: task -> scores; empty in reports of version 1. by_kind: task -> question type -> (before, after, samples)
    of the first metric. changed: samples with a changed answer, alternating between tasks, largest loss first.
    examples: first samples of each task. corpus: task -> corpus metric -> (before, after).
    """

    passed: bool
    verdict: Overall
    measures: tuple[Measure, ...]
    gates: tuple[GateResult, ...]
    samples: dict[MetricName, TaskScores] = Field(default_factory=dict)
    by_kind: dict[MetricName, dict[str, tuple[float, float, Positive]]] = Field(default_factory=dict)
    changed: tuple[AnswerPair, ...] = ()
    examples: tuple[AnswerPair, ...] = ()
    corpus: dict[MetricName, dict[Line, tuple[float, float]]] = Field(default_factory=dict)
    counts: dict[MetricName, Counts] = Field(default_factory=dict)
    evaluation: EvaluationRecord = EvaluationRecord()
    format_version: Annotated[int, Field(ge=1, le=VERSION)] = VERSION

    def plain(self) -> dict[str, Any]:
        """Plain data for `--json`, without the scores of single samples."""
        return self.model_dump(mode="json", exclude={"samples"})


def parse_report(content: bytes, where: str) -> tuple[Report | None, ServingRecord | None]:
    """Parse a report: its evaluation and its `mmq check` result, each None when the file has none.

    ArtifactError lists the problems; `where` is the file's name in it.
    """
    plain = parse_json(content, where)
    serving = plain.pop("serving", None)
    plain.pop(SPEED_KEY, None)  # `speed_record.parse_speed` reads it
    evaluated = None
    if plain.keys() - {"format_version"}:
        if plain.get("format_version", 1) == 1:
            plain = from_version_1(plain)
        evaluated = parse_document(Report, plain, where)
    return evaluated, None if serving is None else parse_document(ServingRecord, serving, f"{where}: serving")


def read_report(folder: Path) -> tuple[Report | None, ServingRecord | None]:
    """Read the report of an artifact's folder (see `parse_report`); both None when there is no file."""
    path = folder / REPORT
    if not path.exists():
        return None, None
    return parse_report(read_document(path), str(path))


def write_report(folder: Path, report: Report | None, serving: ServingRecord | None) -> None:
    """Write a report into an artifact's folder, atomically; the result of `mmq bench` in the folder's report stays."""
    write_text(folder / REPORT, dump(report, serving, read_speed(folder / REPORT)))


def write_speed(folder: Path, speed: SpeedRecord) -> None:
    """Write the result of `mmq bench` into an artifact's report, atomically; the rest of the report stays."""
    write_text(folder / REPORT, dump(*read_report(folder), speed))


def dump(report: Report | None, serving: ServingRecord | None, speed: SpeedRecord | None = None) -> str:
    """Text of the report file: indented JSON, with the scores of single samples in one line per list."""
    plain: dict[str, Any] = (report.plain() if report else {}) | plain_speed(speed)
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
