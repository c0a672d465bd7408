"""Relaxed accuracy: answers read from charts, where numbers may be slightly off.

Masry et al., ChartQA, Findings of ACL 2022 (arXiv 2203.10244), after Methani et al. 2020: a number is correct within
5 % of the reference; any other answer must equal the reference. As in published evaluations, `25%` is 0.25, upper and
lower case are equal, and numbers with thousands separators or units are texts.
"""

import re
from collections.abc import Sequence

TOLERANCE = 0.05
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?(?P<percent>\s*%)?", re.ASCII)


def relaxed_accuracy(answer: str, references: Sequence[str]) -> float:
    """1 if an answer equals a reference, or as a number is within 5 % of it; else 0. An empty answer scores 0."""
    plain = answer.strip().lower()
    return float(bool(plain) and any(_correct(plain, reference.strip().lower()) for reference in references))


def _correct(answer: str, reference: str) -> bool:
    number, expected = _number(answer), _number(reference)
    if number is None or expected is None:
        return answer == reference
    return abs(number - expected) <= TOLERANCE * abs(expected)


def _number(text: str) -> float | None:
    """The value of a number or percentage; None for other texts."""
    match = _NUMBER.fullmatch(text)
    if not match:
        return None
    value = float(text.rstrip("% \t"))
    return value / 100 if match["percent"] else value
