"""BLEU (Papineni et al., 2002): n-gram precision of captions with a brevity penalty.

All constants are those of the COCO caption evaluation (pycocoevalcap): n = 1..4, the reference closest in length (the
shorter of two), precisions smoothed with 1e-15 and 1e-9. Corpus BLEU is not the mean of the captions' BLEU.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

ORDERS = 4
TINY, SMALL = 1e-15, 1e-9


@dataclass(frozen=True)
class _Counts:
    """N-gram counts per order (`correct`: also in a reference; `guessed`: all) and lengths in words."""

    correct: tuple[int, ...]
    guessed: tuple[int, ...]
    length: int
    reference: int


def bleu(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """BLEU-4 of each caption, 0 to 1. references: at least one per candidate."""
    return [_scores(_count(c, group))[-1] for c, group in zip(candidates, references, strict=True)]


def corpus_bleu(
    candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> tuple[float, ...]:
    """BLEU-1 to BLEU-4 of the whole set, 0 to 1, as papers report them."""
    counts = [_count(c, group) for c, group in zip(candidates, references, strict=True)]
    correct = tuple(sum(column) for column in zip(*(count.correct for count in counts), strict=True))
    guessed = tuple(sum(column) for column in zip(*(count.guessed for count in counts), strict=True))
    lengths = sum(count.length for count in counts), sum(count.reference for count in counts)
    return _scores(_Counts(correct or (0,) * ORDERS, guessed or (0,) * ORDERS, *lengths))


def _count(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> _Counts:
    """Counts of one caption. An n-gram counts at most as often as in the reference that has it most often."""
    most: Counter[tuple[str, ...]] = Counter()
    for reference in references:
        most |= _grams(reference)
    correct = [0] * ORDERS
    for gram, count in _grams(candidate).items():
        correct[len(gram) - 1] += min(count, most[gram])
    guessed = tuple(max(0, len(candidate) - n) for n in range(ORDERS))
    closest = min((abs(len(reference) - len(candidate)), len(reference)) for reference in references)[1]
    return _Counts(tuple(correct), guessed, len(candidate), closest)


def _grams(words: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(words) - n + 1))


def _scores(counts: _Counts) -> tuple[float, ...]:
    """BLEU-1 to BLEU-4."""
    ratio = (counts.length + TINY) / (counts.reference + SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for n, (correct, guessed) in enumerate(zip(counts.correct, counts.guessed, strict=True), start=1):
        product *= (correct + TINY) / (guessed + SMALL)
        scores.append(product ** (1 / n) * penalty)
    return tuple(scores)
