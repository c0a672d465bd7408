"""Verdicts of gates in words, the same in the terminal, on the report's page and on the model card."""

from exporter.evaluation.gates import Overall
from exporter.evaluation.report_file import GateResult

RULES = {  # of `decide`: what a gate that is not resolved counts as
    "upper": "the whole interval",
    "point": "the measured change when the interval crosses the bound",
}


def accepted(gate: GateResult) -> bool:
    """Whether the recipe is content: the gate passed, or it lets the measured change decide and that is in bounds."""
    if gate.verdict == "not resolved" and gate.decide == "point":
        return gate.change is not None and gate.change >= -gate.max_drop
    return gate.verdict == "passed"


def sentence(gate: GateResult) -> str:
    """The gate, its verdict, and why."""
    return f"{gate.task} {gate.metric}: {gate.verdict}{_why(gate)}"


def _why(gate: GateResult) -> str:
    if gate.verdict == "not measured":
        return ", no samples of it were asked"
    if gate.verdict == "not comparable":
        return f", {incomparable(gate)}; check prompt and data"
    text = f" with {gate.samples:,} samples" if gate.verdict == "not resolved" else ""
    text += f": {bounds(gate)}"
    return f"{text}; {more_samples(gate)}" if gate.verdict == "not resolved" else text


def bounds(gate: GateResult) -> str:
    """The measured change, its interval and what is allowed, as shares of the full-precision score."""
    if gate.change is None or gate.low is None or gate.high is None:
        return f"allowed {-gate.max_drop:+z.1%}"
    interval = f"95 % interval {gate.low:+z.1%} to {gate.high:+z.1%}"
    return f"changed by {gate.change:+z.1%} of the full-precision score ({interval}), allowed {-gate.max_drop:+z.1%}"


def incomparable(gate: GateResult) -> str:
    """Why nothing can be compared with this full-precision score."""
    if gate.before is None or gate.before <= 0:
        return "the full-precision model scores 0, so nothing can be compared"
    return (
        f"the full-precision model scores at chance level ({gate.before:.4f} on {gate.samples or 0:,} samples; answers "
        f"that ignore the picture score {gate.chance or 0:.4f}), so nothing can be compared"
    )


def more_samples(gate: GateResult) -> str:
    """How many samples would resolve a gate that is not."""
    if gate.samples_needed is None:
        return "the measured change is too near to the bound to be resolved by more samples"
    needed = rounded_up(gate.samples_needed)
    return f"about {needed:,} samples would resolve it (--eval-samples {needed})"


def rounded_up(count: int) -> int:
    """A count with two digits that are not 0: what it is an estimate of is not known better."""
    step = int(10 ** max(0, len(str(count)) - 2))
    return -(-count // step) * step


SAYS: dict[Overall, str] = {
    "passed": "every gate passed",
    "failed": "a gate failed: more was lost than the recipe allows",
    "not comparable": "a gate could not be decided: the full-precision model itself scores at chance level or 0",
    "not measured": "a gate was not measured",
    "not resolved": "a gate is not resolved: with these samples the loss may be within its bound or beyond",
    "no gates": "the recipe names no gates",
}
