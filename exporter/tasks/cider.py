"""CIDEr-D (Vedantam et al., arXiv 1411.5726): agreement of n-grams, weighed by how rare they are.

Every constant and detail is that of the COCO caption evaluation (pycocoevalcap): n = 1..4, sigma 6 over the
difference in length, document frequencies from the references, times 10.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

ORDERS = (1, 2, 3, 4)
SIGMA = 6.0
SCALE = 10.0

Gram = tuple[str, ...]


@dataclass(frozen=True)
class _Vector:
    """One sentence, per order: weights (count times log inverse document frequency) of its n-grams, and their norm.

    length: in words.
    """

    weights: tuple[dict[Gram, float], ...]
    norms: tuple[float, ...]
    length: int


def cider(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """One score (0 to 10) a candidate; the mean is the corpus' CIDEr-D.

    references: at least one a candidate. With a single image every n-gram is in every document: all scores are 0.
    """
    counted = [[_count(words) for words in group] for group in references]
    frequency = Counter(gram for group in counted for gram in set().union(*group))
    images = math.log(max(len(references), 1))
    inverse = {gram: images - math.log(found) for gram, found in frequency.items()}
    scores = []
    for words, group in zip(candidates, counted, strict=True):
        candidate = _weigh(_count(words), inverse, images)
        total = sum(_similarity(candidate, _weigh(counts, inverse, images)) for counts in group)
        scores.append(SCALE * total / len(group))
    return scores


def _count(words: Sequence[str]) -> Counter[Gram]:
    """All n-grams of a sentence, every order."""
    return Counter(tuple(words[i : i + n]) for n in ORDERS for i in range(len(words) - n + 1))


def _weigh(counts: Counter[Gram], inverse: dict[Gram, float], unseen: float) -> _Vector:
    weights: tuple[dict[Gram, float], ...] = tuple({} for _ in ORDERS)
    for gram, count in counts.items():
        weights[len(gram) - 1][gram] = count * inverse.get(gram, unseen)
    norms = tuple(math.sqrt(sum(w * w for w in order.values())) for order in weights)
    return _Vector(weights, norms, sum(count for gram, count in counts.items() if len(gram) == 1))


def _similarity(candidate: _Vector, reference: _Vector) -> float:
    """Mean over the orders of a clipped cosine, damped when the lengths differ; 0 to 1."""
    damping = math.exp(-((candidate.length - reference.length) ** 2) / (2 * SIGMA**2))
    total = 0.0
    for mine, theirs, norm in zip(candidate.weights, reference.weights, _products(candidate, reference), strict=True):
        # Clipping keeps a repeated word from counting more often than the reference says it.
        clipped = sum(min(w, theirs[gram]) * theirs[gram] for gram, w in mine.items() if gram in theirs)
        total += clipped / norm if norm else 0.0
    return damping * total / len(ORDERS)


def _products(a: _Vector, b: _Vector) -> list[float]:
    return [x * y for x, y in zip(a.norms, b.norms, strict=True)]
