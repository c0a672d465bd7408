"""What a setting is scored by: one forward pass over samples with their replies, without generating.

Greedy decoding gives a reply exactly when each of its tokens is the most likely one after those before it, so the share
of exact replies is that of greedy answers equal to the first reference. The pass also gives the reply's negative
log-likelihood, and how far the predictions are from the full model's (Kullback-Leibler divergence), which needs no
reference answers to be right and moves long before answers change.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from exporter.inference.predict import Conversations, conversations
from exporter.model.families import Family
from exporter.study.search_exam import Search
from exporter.tasks import retrieval
from exporter.tasks.sample import Sample

ExamScores = dict[str, float]  # `TASK exact`, `TASK nll`, `TASK kl`, and over tasks `score` and `kl`


class TaskExam(Protocol):
    """The exam of one task."""

    def learn(self, model: Any, device: torch.device) -> None:
        """Keep the predictions of the full model, to compare others with."""

    def grade(self, model: Any, device: torch.device) -> ExamScores:
        """Metric -> value, what counts first; `kl` only once the full model's predictions are known."""


@dataclass
class Replies:
    """Samples whose replies are texts. truth: one f32 `[reply tokens, vocabulary]` a batch."""

    batches: Sequence[Conversations]
    truth: list[Tensor] = field(default_factory=list)

    def learn(self, model: Any, device: torch.device) -> None:
        """See `Part`."""
        self.truth = [predictions(model, batch, device) for batch in self.batches]

    def grade(self, model: Any, device: torch.device) -> ExamScores:
        """See `Part`."""
        exact: list[float] = []
        nll: list[float] = []
        kl: list[float] = []
        for i, batch in enumerate(self.batches):
            found = predictions(model, batch, device)
            told = torch.cat(batch.replies).to(found.device)
            sizes = [len(reply) for reply in batch.replies]
            hit = found.argmax(-1) == told
            lost = -found.gather(1, told[:, None]).squeeze(1)
            exact += [float(part.all()) for part in hit.split(sizes)]
            nll += [float(part.mean()) for part in lost.split(sizes)]
            if self.truth:
                kl += [float(part.mean()) for part in divergence(self.truth[i], found).split(sizes)]
        return {"exact": _mean(exact), "nll": _mean(nll)} | ({"kl": _mean(kl)} if kl else {})


@dataclass(frozen=True)
class Exam:
    """The exam of each task."""

    tasks: Mapping[str, TaskExam]

    def learn(self, model: Any, device: torch.device) -> None:
        """Keep the predictions of `model`, the full one, to compare others with."""
        for part in self.tasks.values():
            part.learn(model, device)

    def grade(self, model: Any, device: torch.device) -> ExamScores:
        """Scores of a model: means over samples, tasks weigh the same."""
        found = {task: part.grade(model, device) for task, part in self.tasks.items()}
        scores = {f"{task} {metric}": value for task, part in found.items() for metric, value in part.items()}
        scores["score"] = _mean([next(iter(part.values())) for part in found.values()])
        if all("kl" in part for part in found.values()):
            scores["kl"] = _mean([part["kl"] for part in found.values()])
        return scores


def prepare(processor: Any, family: Family, samples: Mapping[str, Sequence[Sample]], batch: int) -> Exam:
    """An exam of the samples of each task; ValueError when one has no reference."""

    def part(task: str, chosen: Sequence[Sample]) -> TaskExam:
        if task == retrieval.NAME:
            return Search(processor, chosen, batch)
        return Replies(conversations(processor, family, chosen, batch))

    return Exam({task: part(task, chosen) for task, chosen in samples.items()})


@torch.inference_mode()
def predictions(model: Any, batch: Conversations, device: torch.device) -> Tensor:
    """Log-probabilities of the next token before every reply token of a batch, f32 `[reply tokens, vocabulary]`."""
    dtype = next(model.parameters()).dtype
    inputs = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in batch.inputs.items()}
    logits = model(**inputs, use_cache=False).logits  # [batch, tokens, vocabulary]
    rows = [
        logits[row, start - 1 : start - 1 + len(reply)]
        for row, (start, reply) in enumerate(zip(batch.starts, batch.replies, strict=True))
    ]
    return torch.cat(rows).float().log_softmax(-1)


def divergence(truth: Tensor, found: Tensor) -> Tensor:
    """KL(truth || found) of each token, `[tokens]`; both are log-probabilities f32 `[tokens, vocabulary]`."""
    return (truth.exp() * (truth - found)).sum(-1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
