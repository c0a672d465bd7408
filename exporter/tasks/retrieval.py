"""Retrieval of texts by picture and of pictures by text: recall at 1, 5 and 10, both ways.

The answer about a picture is where things were found, in words: `1 | 1 3 -` says that the best of its own texts came
first among all texts, and that its three texts found it first, third and not among the candidates; `nan` is what the
model gave no finite score, and counts as not found. Contrast chooses
the candidates and the matching head orders them, as in BLIP-2 (on Flickr30k 1K: 128 of 1,000 pictures or 5,000 texts).
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from exporter.errors import DataError
from exporter.tasks.sample import Pool, Sample

NAME = "retrieval"
RANKS = (1, 5, 10)
METRICS = ("r1", *(f"{way}_r{k}" for k in RANKS for way in ("text", "image")))
CANDIDATES = 128
MOST_WORDS = 50

_NOT_FOUND, _NO_NUMBER = "-", "nan"
_MARKS = re.compile(r'[.!"()*#:;~]')


def recalls(similarity: Tensor, owners: Sequence[int]) -> dict[str, list[float]]:
    """`text_r1` .. `text_r10`, one value (0 or 1) a picture, and `image_r1` .. `image_r10`, one a text.

    similarity: float `[pictures, texts]`, higher is closer. owners: the picture of each text. A picture finds a text
    when the best of its own is among the first k; a text that is none of its own and scores the same counts as before
    it, so scores that are all equal find nothing. ValueError for shapes that do not fit, pictures without text, or
    similarities that are not numbers (minus infinity is one: it marks pairs that were not scored).
    """
    pictures, texts = similarity.shape
    if len(owners) != texts or set(owners) != set(range(pictures)):
        raise ValueError(f"{len(owners)} owners for {texts} texts of {pictures} pictures, each with at least one text")
    if bool(similarity.isnan().any()):
        raise ValueError("similarities that are not numbers")
    owner = torch.tensor(owners)
    own = owner[None, :] == torch.arange(pictures)[:, None]  # [pictures, texts]
    lowest = float("-inf")
    best = similarity.masked_fill(~own, lowest).amax(dim=1)  # [pictures]
    text_ranks = ((similarity >= best[:, None]) & ~own).sum(dim=1)
    mine = similarity[owner, torch.arange(texts)]  # [texts]
    image_ranks = ((similarity >= mine[None, :]) & ~own).sum(dim=0)
    found = {f"text_r{k}": (text_ranks < k).float().tolist() for k in RANKS}
    return found | {f"image_r{k}": (image_ranks < k).float().tolist() for k in RANKS}


def prepare(caption: str) -> str:
    """A caption as BLIP-2's retrieval reads it: lower case, without most punctuation, at most 50 words."""
    words = _MARKS.sub(" ", caption.lower()).split()
    return " ".join(words[:MOST_WORDS])


def pooled(samples: Sequence[Sample], candidates: int = CANDIDATES) -> list[Sample]:
    """Samples that are searched among each other, with their texts as retrieval reads them."""
    _require_texts(samples)
    read = [replace(s, question=None, references=tuple(prepare(text) for text in s.references)) for s in samples]
    pool = Pool(tuple(read), candidates)
    return [replace(sample, among=pool) for sample in read]


def _require_texts(samples: Sequence[Sample]) -> None:
    bare = [sample.identity for sample in samples if not sample.references]
    if bare:
        raise DataError(f"{len(bare)} samples have no caption to search for, first {bare[0]}")


def written(text_rank: float | None, image_ranks: Sequence[float | None]) -> str:
    """The answer about one picture: ranks from 1, None for what was not among the candidates, NaN for what has none."""
    words = [_word(rank) for rank in (text_rank, *image_ranks)]
    return f"{words[0]} | {' '.join(words[1:])}"


def _word(rank: float | None) -> str:
    if rank is None:
        return _NOT_FOUND
    return _NO_NUMBER if math.isnan(rank) else str(int(rank))


def without_numbers(answers: Sequence[str]) -> int:
    """In how many answers the model's scores of something wanted were not finite."""
    return sum(_NO_NUMBER in answer.split() for answer in answers)


def _found(answer: str, texts: int) -> tuple[float, list[float]]:
    """Ranks of an answer; infinity for what was not found. An answer of another form found nothing."""
    first, _, rest = answer.partition(" | ")
    ranks = [float(word) if word.isdigit() else float("inf") for word in (first, *rest.split())]
    return (ranks[0], ranks[1:]) if len(ranks) == texts + 1 else (float("inf"), [float("inf")] * texts)


def score(answers: Sequence[str], samples: Sequence[Sample]) -> dict[str, list[float]]:
    """`text_r1` (0 or 1), `image_r1` (the share of a picture's texts that found it), their mean `r1`, and so on.

    One value a picture, so pictures are what a bootstrap draws: the texts of one picture hang together. Means are
    recalls where every picture has the same number of texts. See `exporter.tasks.Task`.
    """
    _require_texts(samples)
    scores: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for answer, sample in zip(answers, samples, strict=True):
        text, images = _found(answer, len(sample.references))
        for k in RANKS:
            scores[f"text_r{k}"].append(float(text <= k))
            scores[f"image_r{k}"].append(sum(rank <= k for rank in images) / len(images))
        scores["r1"].append((scores["text_r1"][-1] + scores["image_r1"][-1]) / 2)
    return scores


def chance(answers: Sequence[str], samples: Sequence[Sample], metrics: Sequence[str]) -> dict[str, list[float]]:
    """Recalls of ranks drawn at random: k of the pool's pictures, and k of its texts of which a picture has some."""
    pool = samples[0].among.samples if samples and samples[0].among else samples
    texts = sum(len(sample.references) for sample in pool)
    found: dict[str, list[float]] = {}
    for k in RANKS:
        found[f"image_r{k}"] = [min(1.0, k / len(pool))] * len(samples)
        found[f"text_r{k}"] = [1 - _missed(len(sample.references), texts, k) for sample in samples]
    pairs = zip(found["text_r1"], found["image_r1"], strict=True)
    found["r1"] = [(text + image) / 2 for text, image in pairs]
    return {metric: found[metric] for metric in metrics}


def _missed(own: int, texts: int, k: int) -> float:
    """Probability that k texts drawn without replacement are none of a picture's own."""
    return math.comb(texts - own, k) / math.comb(texts, k) if k <= texts else 0.0


def corpus(answers: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
    """Recalls over all texts, and `r_mean`, the mean of all six."""
    found = [_found(answer, len(sample.references)) for answer, sample in zip(answers, samples, strict=True)]
    texts, images = [text for text, _ in found], [rank for _, ranks in found for rank in ranks]
    recall = {f"text_r{k}": sum(rank <= k for rank in texts) / max(1, len(texts)) for k in RANKS}
    recall |= {f"image_r{k}": sum(rank <= k for rank in images) / max(1, len(images)) for k in RANKS}
    return recall | {"r_mean": sum(recall.values()) / len(recall)}


def searched(samples: Sequence[Sample]) -> dict[str, int]:
    """What recall depends on besides the model: how many pictures and texts are searched, and how many are matched.

    Empty without a pool.
    """
    pool = samples[0].among if samples else None
    if pool is None:
        return {}
    texts = sum(len(sample.references) for sample in pool.samples)
    return {"pictures": len(pool.samples), "texts": texts, "candidates": pool.candidates}


def method() -> Mapping[str, str]:
    """What scores depend on besides answers and samples."""
    return {"texts": "lower case, no punctuation but commas, at most 50 words", "candidates": "by contrast"}
