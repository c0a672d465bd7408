"""CIDEr-D (Vedantam et al., arXiv 1411.5726): n-gram similarity of captions, weighted by inverse document frequency.

All constants and details are those of the COCO caption evaluation (pycocoevalcap): n = 1..4, sigma 6 for the
difference in length, document frequencies from the references, scaled by 10.
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
    """One sentence, per order n: weights of its n-grams (count times log inverse document frequency) and their norm.

    length: in words.
    """

    weights: tuple[dict[Gram, float], ...]
    norms: tuple[float, ...]
    length: int


def cider(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """One score (0 to 10) per candidate; their mean is the corpus CIDEr-D.

    references: at least one per candidate. With a single image, every n-gram is in every document: all scores are 0.
    """
    counted = [[_count(words) for words in group] for group in references]
    frequency = Counter(gram for group in counted for gram in set().union(*group))
    images = math.log(max(len(references), 1))
    inverse = {gram: images - math.log(documents) for gram, documents in frequency.items()}
    scores = []
    for words, group in zip(candidates, counted, strict=True):
        candidate = _weigh(_count(words), inverse, images)
        total = sum(_similarity(candidate, _weigh(counts, inverse, images)) for counts in group)
        scores.append(SCALE * total / len(group))
    return scores


def _count(words: Sequence[str]) -> Counter[Gram]:
    """Counts of all n-grams of a sentence, n = 1..4."""
    return Counter(tuple(words[i : i + n]) for n in ORDERS for i in range(len(words) - n + 1))


def _weigh(counts: Counter[Gram], inverse: dict[Gram, float], unseen: float) -> _Vector:
    weights: tuple[dict[Gram, float], ...] = tuple({} for _ in ORDERS)
    for gram, count in counts.items():
        weights[len(gram) - 1][gram] = count * inverse.get(gram, unseen)
    norms = tuple(math.sqrt(sum(w * w for w in order.values())) for order in weights)
    return _Vector(weights, norms, sum(count for gram, count in counts.items() if len(gram) == 1))


def _similarity(candidate: _Vector, reference: _Vector) -> float:
    """Mean over the orders of the clipped cosine, damped by the difference in length; 0 to 1."""
    damping = math.exp(-((candidate.length - reference.length) ** 2) / (2 * SIGMA**2))
    total = 0.0
    for own, other, norm in zip(candidate.weights, reference.weights, _products(candidate, reference), strict=True):
        # Clipping limits the weight of a repeated n-gram to its weight in the reference.
        clipped = sum(min(w, other[gram]) * other[gram] for gram, w in own.items() if gram in other)
        total += clipped / norm if norm else 0.0
    return damping * total / len(ORDERS)


def _products(a: _Vector, b: _Vector) -> list[float]:
    return [x * y for x, y in zip(a.norms, b.norms, strict=True)]
