"""Records of a report about how the scores were measured: data, prompts, models, bootstrap."""

from collections.abc import Container
from typing import Annotated

from pydantic import ConfigDict, Field, StringConstraints

from exporter.artifact.manifest import Count, Document, Line, PromptRecord
from exporter.planning.prompts import prompts_line

MetricName = Annotated[str, StringConstraints(pattern="^[a-z0-9_]{1,50}$")]  # name of a task or a metric
Positive = Annotated[int, Field(ge=1, lt=2**53)]


class Closed(Document):
    """A part of the report in which unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


class AnswersRecord(Document):
    """Identity of the answers of one model. weights, processor: digests. Other keys: generation settings, versions."""

    model_config = ConfigDict(extra="allow")

    weights: Line
    processor: Line | None = None
    backend: Line = ""
    dtype: Line | None = None
    device: Line | None = None


class BaselineRecord(Closed):
    """The model of the full-precision scores. differs: differences from the artifact's source (`baseline.Baseline`)."""

    model: Line
    is_source: bool
    differs: tuple[Line, ...]


class Bootstrap(Closed):
    """Parameters of the bootstrap intervals."""

    resamples: Positive
    confidence: Annotated[float, Field(gt=0, lt=1)]
    seed: int


class EvaluationRecord(Document):
    """Settings of the evaluation. seed: of the selected samples. searched: pool sizes of retrieval."""

    model_config = ConfigDict(extra="allow")

    data: Line | None = None
    samples: Positive | None = None
    seed: int | None = None
    scoring: dict[MetricName, dict[Line, Line]] = Field(default_factory=dict)
    searched: dict[MetricName, Count] | None = None
    overrides: dict[Line, Line] = Field(default_factory=dict)
    prompts: dict[MetricName, PromptRecord] = Field(default_factory=dict)
    bootstrap: Bootstrap | None = None
    baseline: BaselineRecord | None = None
    models: dict[Line, AnswersRecord] = Field(default_factory=dict)

    def prompts_text(self, tasks: Container[str]) -> str:
        """The prompts of these tasks in one line; empty for reports of an older mmq."""
        return prompts_line({task: record.model_dump() for task, record in self.prompts.items() if task in tasks})
