"""What a setting of a retrieval model is scored by: recall at 1, and how far its scores are from the full model's.

Ranks are those that `mmq evaluate` finds: contrast chooses candidates, matching orders them. The divergence reads each
query's scores of the full model's candidates as log-odds, so that they make a distribution over what may be found, and
moves long before ranks change.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from exporter.inference.batch_size import BatchSize
from exporter.inference.retrieval import (
    PIECE,
    EncodedPool,
    candidates,
    encode_pool,
    format_ranks,
    pixels_of,
    score_pairs,
)
from exporter.inference.row_store import RowStore
from exporter.tasks import retrieval
from exporter.tasks.sample import Pool, Sample

SHOWN = ("r1", "text_r1", "image_r1")  # the first one is the score
LOWEST = -1e4  # stands for scores that are no finite numbers

Wanted = tuple[Tensor, Tensor, list[int]]  # pictures and texts of pairs, and how many of them each query has


@dataclass
class Search:
    """Samples of one pool. truth: for each picture the full model's candidates and their scores, float32 `[pairs]`."""

    processor: Any
    samples: Sequence[Sample]
    batch: int
    truth: list[tuple[Wanted, Tensor]] = field(default_factory=list)

    @property
    def pool(self) -> Pool:
        """What is searched."""
        pool = self.samples[0].among
        assert pool is not None
        return pool

    @cached_property
    def pixels(self) -> RowStore:
        """The pictures as the model takes them, drawn once."""
        drawn = RowStore(len(self.pool.samples))
        for start in range(0, len(self.pool.samples), self.batch):
            drawn.append(pixels_of(self.processor, self.pool.samples[start : start + self.batch]))
        return drawn

    @torch.inference_mode()
    def learn(self, model: Any, device: torch.device) -> None:
        """Keep the candidates of `model`, the full one, with their scores."""
        self.truth = []
        searched = self._search(model, device)
        for numbers in self._pieces():
            wanted = [candidates(self.pool, searched, number) for number in numbers]
            self.truth += list(zip(wanted, self._scored(model, searched, wanted, device), strict=True))

    @torch.inference_mode()
    def grade(self, model: Any, device: torch.device) -> dict[str, float]:
        """`r1` (the mean of both ways), `text_r1`, `image_r1`, and `kl` once the full model's scores are known."""
        searched = self._search(model, device)
        answers: list[str] = []
        lost: list[float] = []
        for start, numbers in zip(range(0, len(self.samples), PIECE), self._pieces(), strict=True):
            wanted = [candidates(self.pool, searched, number) for number in numbers]
            known = self.truth[start : start + PIECE]
            scores = self._scored(model, searched, [*wanted, *(pairs for pairs, _ in known)], device)
            answers += [format_ranks(searched, n, w, s) for n, w, s in zip(numbers, wanted, scores, strict=False)]
            rest = zip(known, scores[len(wanted) :], strict=True)
            lost += [divergence(truth, found, pairs[2]) for (pairs, truth), found in rest]
        means = {name: sum(v) / len(v) for name, v in retrieval.score(answers, self.samples).items() if name in SHOWN}
        return means | ({"kl": sum(lost) / len(lost)} if lost else {})

    def _search(self, model: Any, device: torch.device) -> EncodedPool:
        return encode_pool(model, self.processor, self.pool, device, BatchSize(self.batch), self.pixels)

    def _pieces(self) -> Iterator[list[int]]:
        """Places in the pool, a few pictures at a time."""
        places = {sample.identity: number for number, sample in enumerate(self.pool.samples)}
        numbers = [places[sample.identity] for sample in self.samples]
        return (numbers[start : start + PIECE] for start in range(0, len(numbers), PIECE))

    def _scored(
        self, model: Any, searched: EncodedPool, wanted: Sequence[Wanted], device: torch.device
    ) -> list[Tensor]:
        pairs = torch.cat([one[0] for one in wanted]), torch.cat([one[1] for one in wanted])
        scores = score_pairs(model, searched, pairs, device, BatchSize(self.batch))
        return list(scores.split([len(one[0]) for one in wanted]))


def divergence(truth: Tensor, found: Tensor, counts: Sequence[int]) -> float:
    """KL(truth || found), the mean over queries; both are float32 `[pairs]`, `counts` of them for each query."""

    def logs(scores: Tensor) -> list[Tensor]:
        finite = torch.where(scores.isfinite(), scores, LOWEST)
        return [part.log_softmax(0) for part in finite.split(list(counts))]

    pairs = zip(logs(truth), logs(found), strict=True)
    return sum(float((t.exp() * (t - f)).sum()) for t, f in pairs) / len(counts)
