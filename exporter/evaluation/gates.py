"""Verdicts of gates from confidence intervals, as pure functions of numbers."""

from collections.abc import Collection
from typing import Literal, get_args

Verdict = Literal["failed", "not comparable", "not measured", "not resolved", "passed"]  # worst first
Overall = Literal[Verdict, "no gates"]


def interval_verdict(low: float, high: float, max_drop: float) -> Verdict:
    """Verdict of a gate from the interval `low` to `high` of the change, relative to the full-precision score.

    A drop is a negative change. passed: the whole interval is within the bound. failed: the whole interval is beyond
    it. not resolved: the interval contains the bound.
    """
    if low >= -max_drop:
        return "passed"
    return "failed" if high < -max_drop else "not resolved"


def worst(verdicts: Collection[Verdict]) -> Overall:
    """Verdict of a report: the worst verdict of its gates."""
    named: tuple[Verdict, ...] = get_args(Verdict)
    return next((verdict for verdict in named if verdict in verdicts), "no gates")
