"""Scores of a setting of a retrieval model: recall at 1, and the divergence from the full-precision model.

Ranks are those of `mmq evaluate`: contrastive scores select candidates, matching scores order them. For the divergence,
the softmax of each query's matching scores is a distribution over the full-precision model's candidates. The divergence
grows before ranks change.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from exporter.data.tasks import retrieval
from exporter.data.tasks.sample import Pool, Sample
from exporter.model.inference.batch_size import BatchSize
from exporter.model.inference.retrieval import (
    PIECE,
    EncodedPool,
    candidates,
    encode_pool,
    format_ranks,
    pixels_of,
    score_pairs,
)
from exporter.model.inference.row_store import RowStore

SHOWN = ("r1", "text_r1", "image_r1")  # metrics of the exam; the first one is the score
LOWEST = -1e4  # replaces scores that are not finite

CandidatePairs = tuple[Tensor, Tensor, list[int]]  # picture indices, text indices, number of pairs of each query


@dataclass
class RetrievalExam:
    """The exam of retrieval on the samples of one pool.

    truth: per picture, the full-precision model's candidates and their scores, f32 `[pairs]`.
    """

    processor: Any
    samples: Sequence[Sample]
    batch: int
    truth: list[tuple[CandidatePairs, Tensor]] = field(default_factory=list)

    @property
    def pool(self) -> Pool:
        """The pool of pictures and texts to search."""
        pool = self.samples[0].among
        assert pool is not None
        return pool

    @cached_property
    def pixels(self) -> RowStore:
        """Preprocessed pictures of the pool, computed once."""
        rows = RowStore(len(self.pool.samples))
        for start in range(0, len(self.pool.samples), self.batch):
            rows.append(pixels_of(self.processor, self.pool.samples[start : start + self.batch]))
        return rows

    @torch.inference_mode()
    def learn(self, model: Any, device: torch.device) -> list[float]:
        """Store the candidates of `model`, the full-precision one, and their scores, as the reference of `kl`.

        Returns its `r1` for each sample.
        """
        self.truth = []
        answers: list[str] = []
        searched = self._search(model, device)
        for numbers in self._pieces():
            pairs_by_query = [candidates(self.pool, searched, number) for number in numbers]
            scores = self._scored(model, searched, pairs_by_query, device)
            self.truth += list(zip(pairs_by_query, scores, strict=True))
            answers += _ranks(searched, numbers, pairs_by_query, scores)
        return list(retrieval.score(answers, self.samples)[SHOWN[0]])

    @torch.inference_mode()
    def grade(self, model: Any, device: torch.device) -> dict[str, list[float]]:
        """`r1` (mean of both directions), `text_r1`, `image_r1` of each sample, and `kl` after `learn`."""
        searched = self._search(model, device)
        answers: list[str] = []
        divergences: list[float] = []
        for start, numbers in zip(range(0, len(self.samples), PIECE), self._pieces(), strict=True):
            pairs_by_query = [candidates(self.pool, searched, number) for number in numbers]
            references = self.truth[start : start + PIECE]
            scores = self._scored(model, searched, [*pairs_by_query, *(pairs for pairs, _ in references)], device)
            answers += _ranks(searched, numbers, pairs_by_query, scores[: len(pairs_by_query)])
            scored_references = zip(references, scores[len(pairs_by_query) :], strict=True)
            divergences += [divergence(reference, values, pairs[2]) for (pairs, reference), values in scored_references]
        values = {name: list(v) for name, v in retrieval.score(answers, self.samples).items() if name in SHOWN}
        return values | ({"kl": divergences} if divergences else {})

    def _search(self, model: Any, device: torch.device) -> EncodedPool:
        return encode_pool(model, self.processor, self.pool, device, BatchSize(self.batch), self.pixels)

    def _pieces(self) -> Iterator[list[int]]:
        """Indices of the samples in the pool, in groups of PIECE pictures."""
        places = {sample.identity: number for number, sample in enumerate(self.pool.samples)}
        numbers = [places[sample.identity] for sample in self.samples]
        return (numbers[start : start + PIECE] for start in range(0, len(numbers), PIECE))

    def _scored(
        self, model: Any, searched: EncodedPool, pairs_by_query: Sequence[CandidatePairs], device: torch.device
    ) -> list[Tensor]:
        pairs = (
            torch.cat([pairs_of_query[0] for pairs_of_query in pairs_by_query]),
            torch.cat([pairs_of_query[1] for pairs_of_query in pairs_by_query]),
        )
        scores = score_pairs(model, searched, pairs, device, BatchSize(self.batch))
        return list(scores.split([len(pairs_of_query[0]) for pairs_of_query in pairs_by_query]))


def _ranks(
    searched: EncodedPool, numbers: Sequence[int], pairs_by_query: Sequence[CandidatePairs], scores: Sequence[Tensor]
) -> list[str]:
    """The answers of queries. scores: per query, of its candidates, f32 `[pairs]`."""
    return [format_ranks(searched, *query) for query in zip(numbers, pairs_by_query, scores, strict=True)]


def divergence(truth: Tensor, other: Tensor, counts: Sequence[int]) -> float:
    """Mean over queries of KL(truth || other); both are f32 `[pairs]`. counts: number of pairs of each query."""

    def logs(scores: Tensor) -> list[Tensor]:
        finite = torch.where(scores.isfinite(), scores, LOWEST)
        return [part.log_softmax(0) for part in finite.split(list(counts))]

    pairs = zip(logs(truth), logs(other), strict=True)
    return sum(float((t.exp() * (t - f)).sum()) for t, f in pairs) / len(counts)
