"""Image-text retrieval: recall at 1, 5 and 10, picture to text and text to picture.

The answer of a picture is a string of ranks: in `1 | 1 3 -`, the picture's best own text has rank 1 among all texts,
and its three texts rank the picture 1, 3 and not among the candidates. `nan` marks a score that is not finite; it
counts as a miss. Contrastive scores select the candidates and the matching head orders them, as in BLIP-2 (Flickr30k
1K: 128 of 1,000 pictures or 5,000 texts).
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from exporter.data.tasks.sample import Pool, Sample
from exporter.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

NAME = "retrieval"
RANKS = (1, 5, 10)
METRICS = ("r1", *(f"{way}_r{k}" for k in RANKS for way in ("text", "image")))
DEFAULT = METRICS
ALONE = METRICS
CORPUS = (*METRICS[1:], "r_mean")
CANDIDATES = 128
MOST_WORDS = 50

_NOT_FOUND, _NO_NUMBER = "-", "nan"
_MARKS = re.compile(r'[.!"()*#:;~]')


def recalls(similarity: "Tensor", owners: Sequence[int]) -> dict[str, list[float]]:
    """`text_r1` .. `text_r10`, one value (0 or 1) per picture, and `image_r1` .. `image_r10`, one per text.

    similarity: float `[pictures, texts]`, higher is closer. owners: the picture of each text. `text_rK` is 1 if the
    best of a picture's own texts is among the first K. Ties count against the own text, so equal scores are misses.
    ValueError for mismatched shapes, pictures without text, or NaN similarities. Minus infinity is allowed: it marks
    pairs that were not scored.
    """
    import torch

    pictures, texts = similarity.shape
    if len(owners) != texts or set(owners) != set(range(pictures)):
        raise ValueError(f"{len(owners)} owners for {texts} texts of {pictures} pictures, each with at least one text")
    if bool(similarity.isnan().any()):
        raise ValueError("similarities contain NaN")
    owner = torch.tensor(owners)
    own = owner[None, :] == torch.arange(pictures)[:, None]  # [pictures, texts]
    lowest = float("-inf")
    best = similarity.masked_fill(~own, lowest).amax(dim=1)  # [pictures]
    text_ranks = ((similarity >= best[:, None]) & ~own).sum(dim=1)
    own_scores = similarity[owner, torch.arange(texts)]  # [texts]
    image_ranks = ((similarity >= own_scores[None, :]) & ~own).sum(dim=0)
    values = {f"text_r{k}": (text_ranks < k).float().tolist() for k in RANKS}
    return values | {f"image_r{k}": (image_ranks < k).float().tolist() for k in RANKS}


def prepare(caption: str) -> str:
    """Normalize a caption as BLIP-2's retrieval does: lower case, without most punctuation, at most 50 words."""
    words = _MARKS.sub(" ", caption.lower()).split()
    return " ".join(words[:MOST_WORDS])


def with_pool(samples: Sequence[Sample], candidates: int = CANDIDATES) -> list[Sample]:
    """The samples with normalized texts and a common pool in which retrieval searches."""
    _require_texts(samples)
    prepared = [replace(s, question=None, references=tuple(prepare(text) for text in s.references)) for s in samples]
    pool = Pool(tuple(prepared), candidates)
    return [replace(sample, among=pool) for sample in prepared]


def _require_texts(samples: Sequence[Sample]) -> None:
    bare = [sample.identity for sample in samples if not sample.references]
    if bare:
        raise DataError(f"{len(bare)} samples have no caption to search for, first {bare[0]}")


def format_answer(text_rank: float | None, image_ranks: Sequence[float | None]) -> str:
    """The answer string of one picture. Ranks start at 1; None: not among the candidates; NaN: score not finite."""
    words = [_word(rank) for rank in (text_rank, *image_ranks)]
    return f"{words[0]} | {' '.join(words[1:])}"


def _word(rank: float | None) -> str:
    if rank is None:
        return _NOT_FOUND
    return _NO_NUMBER if math.isnan(rank) else str(int(rank))


def count_not_finite(answers: Sequence[str]) -> int:
    """Number of answers in which the score of an own text or picture is not finite."""
    return sum(_NO_NUMBER in answer.split() for answer in answers)


def _parse_ranks(answer: str, texts: int) -> tuple[float, list[float]]:
    """Ranks in an answer string, infinity for misses. A malformed answer counts as all misses."""
    first, _, others = answer.partition(" | ")
    ranks = [float(word) if word.isdigit() else float("inf") for word in (first, *others.split())]
    return (ranks[0], ranks[1:]) if len(ranks) == texts + 1 else (float("inf"), [float("inf")] * texts)


def score(answers: Sequence[str], samples: Sequence[Sample]) -> dict[str, list[float]]:
    """`text_rK` (0 or 1), `image_rK` (share of a picture's texts that rank it among the first K), and their mean `r1`.

    One value per picture, so that the bootstrap resamples pictures: the texts of one picture are not independent. The
    means equal the recalls if all pictures have the same number of texts. See `exporter.data.tasks.Task`.
    """
    _require_texts(samples)
    scores: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for answer, sample in zip(answers, samples, strict=True):
        text, images = _parse_ranks(answer, len(sample.references))
        for k in RANKS:
            scores[f"text_r{k}"].append(float(text <= k))
            scores[f"image_r{k}"].append(sum(rank <= k for rank in images) / len(images))
        scores["r1"].append((scores["text_r1"][-1] + scores["image_r1"][-1]) / 2)
    return scores


def chance(answers: Sequence[str], samples: Sequence[Sample], metrics: Sequence[str]) -> dict[str, list[float]]:
    """Expected recalls of random ranks: k of the pool's pictures, and k of its texts."""
    pool = samples[0].among.samples if samples and samples[0].among else samples
    texts = sum(len(sample.references) for sample in pool)
    values: dict[str, list[float]] = {}
    for k in RANKS:
        values[f"image_r{k}"] = [min(1.0, k / len(pool))] * len(samples)
        values[f"text_r{k}"] = [1 - _miss_probability(len(sample.references), texts, k) for sample in samples]
    pairs = zip(values["text_r1"], values["image_r1"], strict=True)
    values["r1"] = [(text + image) / 2 for text, image in pairs]
    return {metric: values[metric] for metric in metrics}


def _miss_probability(own: int, texts: int, k: int) -> float:
    """Probability that k texts drawn without replacement contain none of a picture's own."""
    return math.comb(texts - own, k) / math.comb(texts, k) if k <= texts else 0.0


def corpus(answers: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
    """Recalls over all texts, and `r_mean`, the mean of all six."""
    pairs = [_parse_ranks(answer, len(sample.references)) for answer, sample in zip(answers, samples, strict=True)]
    texts, images = [text for text, _ in pairs], [rank for _, ranks in pairs for rank in ranks]
    recall = {f"text_r{k}": sum(rank <= k for rank in texts) / max(1, len(texts)) for k in RANKS}
    recall |= {f"image_r{k}": sum(rank <= k for rank in images) / max(1, len(images)) for k in RANKS}
    return recall | {"r_mean": sum(recall.values()) / len(recall)}


def pool_sizes(samples: Sequence[Sample]) -> dict[str, int]:
    """Number of pictures and texts in the pool and of candidates, on which recall depends; empty without a pool."""
    pool = samples[0].among if samples else None
    if pool is None:
        return {}
    texts = sum(len(sample.references) for sample in pool.samples)
    return {"pictures": len(pool.samples), "texts": texts, "candidates": pool.candidates}


def method() -> Mapping[str, str]:
    """Settings that scores depend on, besides answers and samples."""
    return {"texts": "lower case, no punctuation but commas, at most 50 words", "candidates": "by contrast"}
