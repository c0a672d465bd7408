"""What the interval of a change says of a gate, as pure functions of numbers."""

from collections.abc import Collection
from typing import Literal, get_args

Verdict = Literal["failed", "not comparable", "not measured", "not resolved", "passed"]  # the worst first
Overall = Literal[Verdict, "no gates"]


def decided(low: float, high: float, max_drop: float) -> Verdict:
    """A gate's verdict by the interval of the change. All are shares of the full score; a drop is a negative change.

    passed: the whole interval is within the bound. failed: the whole interval is beyond it. not resolved: it crosses.
    """
    if low >= -max_drop:
        return "passed"
    return "failed" if high < -max_drop else "not resolved"


def worst(verdicts: Collection[Verdict]) -> Overall:
    """The verdict of a report from those of its gates."""
    named: tuple[Verdict, ...] = get_args(Verdict)
    return next((verdict for verdict in named if verdict in verdicts), "no gates")
