"""ANLS, average normalized Levenshtein similarity: answers read from documents, with misread characters.

Biten et al., Scene Text Visual Question Answering, ICCV 2019 (arXiv 1905.13648): the similarity of an answer and a
reference is 1 - NL if NL < 0.5, else 0. NL is the Levenshtein distance divided by the length of the longer text. The
score of an answer is its largest similarity to a reference. Upper and lower case are equal; spaces count.
"""

from collections.abc import Sequence
from functools import lru_cache

THRESHOLD = 0.5
REMEMBERED = 2**14  # texts or pairs of texts whose scores are kept: many samples have the same short answers


def anls(answer: str, references: Sequence[str]) -> float:
    """The largest similarity of an answer to a reference, 0 or above 0.5 up to 1; an empty answer scores 0."""
    plain = _plain(answer)
    return max((_similarity(plain, _plain(reference)) for reference in references), default=0.0) if plain else 0.0


def _plain(text: str) -> str:
    """Lower case, without spaces at the ends and repeated spaces."""
    return " ".join(text.lower().split())


@lru_cache(maxsize=REMEMBERED)
def _similarity(first: str, second: str) -> float:
    longest = max(len(first), len(second))
    if abs(len(first) - len(second)) >= THRESHOLD * longest:  # the distance is at least the difference of the lengths
        return 0.0
    distance = levenshtein(first, second) / longest
    return 1 - distance if distance < THRESHOLD else 0.0


def levenshtein(first: str, second: str) -> int:
    """Smallest number of inserted, deleted and replaced characters that turn one text into the other."""
    previous = list(range(len(second) + 1))
    for i, left in enumerate(first, start=1):
        row = [i]
        for j, right in enumerate(second, start=1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (left != right)))
        previous = row
    return previous[-1]
