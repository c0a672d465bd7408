"""Scores of a setting from one forward pass over samples with their replies, without generation.

Greedy decoding returns a reply if and only if each token of the reply is the most likely one after its predecessors, so
the share of exact replies equals the share of greedy answers that match the first reference. The pass also computes the
negative log-likelihood of the reply, and the Kullback-Leibler divergence from the full-precision model. The divergence
does not depend on the quality of the references, and it grows before answers change.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from exporter.data.tasks import retrieval
from exporter.data.tasks.sample import Sample
from exporter.model.families import Family
from exporter.model.inference.predict import Conversations, conversations
from exporter.study.records import CHANGE, CHANGE_ERROR, ERROR, SAMPLES
from exporter.study.retrieval_exam import RetrievalExam

# `TASK exact`, `TASK nll`, `TASK kl`, and over tasks `score`, `kl`, ERROR (standard error of `score`) and SAMPLES;
# after `learn` also CHANGE (`score` minus the full-precision model's) and CHANGE_ERROR (its standard error).
ExamScores = dict[str, float]


class TaskExam(Protocol):
    """The exam of one task."""

    def learn(self, model: Any, device: torch.device) -> Sequence[float]:
        """Store the predictions of `model`, the full-precision one, as the reference of `kl`.

        Returns its main metric for each sample.
        """

    def grade(self, model: Any, device: torch.device) -> Mapping[str, Sequence[float]]:
        """Metric -> value for each sample (of `kl` also for each group of samples), the main metric first.

        `kl` only after `learn`.
        """


@dataclass
class Replies:
    """The exam of a task with text replies.

    truth: the full-precision model's log-probabilities, one f32 `[reply tokens, vocabulary]` per batch.
    """

    batches: Sequence[Conversations]
    truth: list[Tensor] = field(default_factory=list)

    def learn(self, model: Any, device: torch.device) -> Sequence[float]:
        """See `TaskExam`."""
        self.truth = [predictions(model, batch, device) for batch in self.batches]
        return [
            value
            for batch, log_probabilities in zip(self.batches, self.truth, strict=True)
            for value in exact_replies(batch, log_probabilities)
        ]

    def grade(self, model: Any, device: torch.device) -> Mapping[str, Sequence[float]]:
        """See `TaskExam`."""
        exact: list[float] = []
        nll: list[float] = []
        kl: list[float] = []
        for i, batch in enumerate(self.batches):
            log_probabilities = predictions(model, batch, device)
            reply_tokens = torch.cat(batch.replies).to(log_probabilities.device)
            sizes = [len(reply) for reply in batch.replies]
            losses = -log_probabilities.gather(1, reply_tokens[:, None]).squeeze(1)
            exact += exact_replies(batch, log_probabilities)
            nll += [float(part.mean()) for part in losses.split(sizes)]
            if self.truth:
                kl += [float(part.mean()) for part in divergence(self.truth[i], log_probabilities).split(sizes)]
        return {"exact": exact, "nll": nll} | ({"kl": kl} if kl else {})


@dataclass(frozen=True)
class Exam:
    """The exams of all tasks. full: after `learn`, the full-precision model's main metric per task and sample."""

    tasks: Mapping[str, TaskExam]
    full: list[Sequence[float]] = field(default_factory=list)

    def learn(self, model: Any, device: torch.device) -> None:
        """Store the predictions of `model`, the full-precision one, as the reference of `kl` and of changes."""
        self.full[:] = [task_exam.learn(model, device) for task_exam in self.tasks.values()]

    def grade(self, model: Any, device: torch.device) -> ExamScores:
        """Scores of a model: means over the samples of each task, and means of these over tasks."""
        values_by_task = {task: task_exam.grade(model, device) for task, task_exam in self.tasks.items()}
        scores = {
            f"{task} {metric}": _mean(values)
            for task, metrics in values_by_task.items()
            for metric, values in metrics.items()
        }
        scores |= overall([next(iter(metrics.values())) for metrics in values_by_task.values()], self.full)
        if all("kl" in metrics for metrics in values_by_task.values()):
            scores["kl"] = _mean([scores[f"{task} kl"] for task in values_by_task])
        return scores


def overall(values_by_task: Sequence[Sequence[float]], full: Sequence[Sequence[float]] = ()) -> ExamScores:
    """`score`, the mean over tasks of the means over samples, with its standard error and the number of samples.

    full: the full-precision model's values on the same samples. With them, also the change of the score and its
    standard error, from the differences of each sample, in which the difficulty of the sample cancels.
    """
    scores = {
        "score": _mean([_mean(values) for values in values_by_task]),
        ERROR: _standard_error(values_by_task),
        SAMPLES: float(sum(len(values) for values in values_by_task)),
    }
    if full:
        changes = [
            [value - before for value, before in zip(values, values_before, strict=True)]
            for values, values_before in zip(values_by_task, full, strict=True)
        ]
        scores |= {CHANGE: _mean([_mean(values) for values in changes]), CHANGE_ERROR: _standard_error(changes)}
    return scores


def _standard_error(values_by_task: Sequence[Sequence[float]]) -> float:
    """Standard error of the mean over tasks of the means over samples."""
    squares = [statistics.variance(values) / len(values) if len(values) > 1 else 0.0 for values in values_by_task]
    return math.sqrt(sum(squares)) / max(len(values_by_task), 1)


def prepare(processor: Any, family: Family, samples: Mapping[str, Sequence[Sample]], batch: int) -> Exam:
    """An exam from the samples of each task. Raises ValueError for a sample without a reference."""

    def exam_of(task: str, task_samples: Sequence[Sample]) -> TaskExam:
        if task == retrieval.NAME:
            return RetrievalExam(processor, task_samples, batch)
        return Replies(conversations(processor, family, task_samples, batch))

    return Exam({task: exam_of(task, task_samples) for task, task_samples in samples.items()})


def exact_replies(batch: Conversations, log_probabilities: Tensor) -> list[float]:
    """1 for each reply whose tokens all are the most likely ones, else 0; f32 `[reply tokens, vocabulary]`."""
    correct = log_probabilities.argmax(-1) == torch.cat(batch.replies).to(log_probabilities.device)
    return [float(part.all()) for part in correct.split([len(reply) for reply in batch.replies])]


@torch.inference_mode()
def predictions(model: Any, batch: Conversations, device: torch.device) -> Tensor:
    """Log-probabilities at the position of every reply token of a batch, f32 `[reply tokens, vocabulary]`."""
    dtype = next(model.parameters()).dtype
    inputs = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in batch.inputs.items()}
    logits = model(**inputs, use_cache=False).logits  # [batch, tokens, vocabulary]
    rows = [
        logits[row, start - 1 : start - 1 + len(reply)]
        for row, (start, reply) in enumerate(zip(batch.starts, batch.replies, strict=True))
    ]
    return torch.cat(rows).float().log_softmax(-1)


def divergence(truth: Tensor, other: Tensor) -> Tensor:
    """KL(truth || other) of each token, `[tokens]`; both are log-probabilities f32 `[tokens, vocabulary]`."""
    return (truth.exp() * (truth - other)).sum(-1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
