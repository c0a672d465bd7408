"""Texts for the verdicts of gates, shared by the terminal, the HTML report and the model card."""

from exporter.evaluation.gates import Overall
from exporter.evaluation.report_file import GateResult

DECIDE_RULES = {  # `decide` of a gate -> what decides it
    "upper": "the whole interval",
    "point": "the measured change when the interval crosses the bound",
}


def accepted(gate: GateResult) -> bool:
    """Whether a gate passed, or is not resolved but `decide: point` accepts its measured change."""
    if gate.verdict == "not resolved" and gate.decide == "point":
        return gate.change is not None and gate.change >= -gate.max_drop
    return gate.verdict == "passed"


def sentence(gate: GateResult) -> str:
    """The gate, its verdict, and why."""
    return f"{gate.task} {gate.metric}: {gate.verdict}{_why(gate)}"


def _why(gate: GateResult) -> str:
    if gate.verdict == "not measured":
        return ", the evaluation has no samples of this task"
    if gate.verdict == "not comparable":
        return f", {incomparable(gate)}; check prompt and data"
    if gate.verdict != "not resolved":
        return f": {bounds(gate)}"
    counted = f" with {gate.samples:,} samples" if gate.samples else ""
    return f"{counted}: {bounds(gate)}; {more_samples(gate)}"


def bounds(gate: GateResult) -> str:
    """The measured change, its interval and the allowed change, relative to the full-precision score."""
    if gate.change is None or gate.low is None or gate.high is None:
        return f"allowed {-gate.max_drop:+z.1%}"
    interval = f"95 % interval {gate.low:+z.1%} to {gate.high:+z.1%}"
    return f"changed by {gate.change:+z.1%} of the full-precision score ({interval}), allowed {-gate.max_drop:+z.1%}"


def incomparable(gate: GateResult) -> str:
    """The reason why a relative change from this full-precision score has no meaning."""
    if gate.before is None or gate.before <= 0:
        return "the full-precision model scores 0, so a relative change is undefined"
    return (
        f"the full-precision model scores at chance level ({gate.before:.4f} on {gate.samples or 0:,} samples; answers "
        f"that ignore the picture score {gate.chance or 0:.4f}), so a relative change has no meaning"
    )


def more_samples(gate: GateResult) -> str:
    """The estimated number of samples that resolves a gate."""
    if gate.samples_needed is None:
        return "the measured change is too close to the bound for more samples to resolve it"
    needed = rounded_up(gate.samples_needed)
    return f"about {needed:,} samples would resolve it (--eval-samples {needed})"


def rounded_up(count: int) -> int:
    """Round a count up to two significant digits, the precision of the estimate."""
    step = int(10 ** max(0, len(str(count)) - 2))
    return -(-count // step) * step


VERDICT_SENTENCES: dict[Overall, str] = {
    "passed": "every gate passed",
    "failed": "a gate failed: the loss is larger than the recipe allows",
    "not comparable": "a gate could not be decided: the full-precision model itself scores at chance level or 0",
    "not measured": "a gate was not measured",
    "not resolved": "a gate is not resolved: with this number of samples the loss may be within its bound or beyond it",
    "no gates": "the recipe has no gates",
}
