"""What a setting is scored by: one forward pass over samples with their replies, without generating.

Greedy decoding gives a reply exactly when each of its tokens is the most likely one after those before it, so the share
of exact replies is that of greedy answers equal to the first reference. The pass also gives the reply's negative
log-likelihood, and how far the predictions are from the full model's (Kullback-Leibler divergence), which needs no
reference answers to be right and moves long before answers change.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exporter.families import Family
from exporter.predict import Conversations, conversations
from exporter.tasks.sample import Sample

Scores = dict[str, float]  # `TASK exact`, `TASK nll`, `TASK kl`, and over tasks `score` and `kl`


@dataclass
class Exam:
    """Prepared samples of each task, and the full model's log-probabilities at every reply token once they are known.

    truth: task -> one f32 `[reply tokens, vocabulary]` a batch.
    """

    tasks: Mapping[str, Sequence[Conversations]]
    truth: dict[str, list[Tensor]]


def prepare(processor: Any, family: Family, samples: Mapping[str, Sequence[Sample]], batch: int) -> Exam:
    """An exam of the samples of each task; ValueError when one has no reference."""
    return Exam({task: conversations(processor, family, chosen, batch) for task, chosen in samples.items()}, {})


def learn_truth(exam: Exam, model: Any, device: torch.device) -> None:
    """Keep the predictions of `model`, the full one, to compare others with."""
    for task, batches in exam.tasks.items():
        exam.truth[task] = [predictions(model, batch, device) for batch in batches]


def grade(exam: Exam, model: Any, device: torch.device) -> Scores:
    """Scores of a model: means over samples, tasks weigh the same. `kl` only once the truth is known."""
    scores: Scores = {}
    for task, batches in exam.tasks.items():
        exact: list[float] = []
        nll: list[float] = []
        kl: list[float] = []
        for i, batch in enumerate(batches):
            found = predictions(model, batch, device)
            told = torch.cat(batch.replies).to(found.device)
            sizes = [len(reply) for reply in batch.replies]
            hit = found.argmax(-1) == told
            lost = -found.gather(1, told[:, None]).squeeze(1)
            exact += [float(part.all()) for part in hit.split(sizes)]
            nll += [float(part.mean()) for part in lost.split(sizes)]
            if task in exam.truth:
                kl += [float(part.mean()) for part in divergence(exam.truth[task][i], found).split(sizes)]
        scores |= {f"{task} exact": _mean(exact), f"{task} nll": _mean(nll)} | ({f"{task} kl": _mean(kl)} if kl else {})
    scores["score"] = _mean([scores[f"{task} exact"] for task in exam.tasks])
    if exam.truth:
        scores["kl"] = _mean([scores[f"{task} kl"] for task in exam.tasks])
    return scores


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
