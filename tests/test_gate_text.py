"""Sentences about the verdicts of gates, and which verdicts an export accepts."""

from typing import Any

import pytest

from exporter.evaluation import gate_text
from exporter.evaluation.report_file import GateResult

LOSS = {"before": 0.8, "change": -0.025, "low": -0.0451, "high": 0.0}


def gate(verdict: str, **values: Any) -> GateResult:
    values = {"max_drop": 0.02, "decide": "upper", "samples": 1500} | values
    return GateResult(task="vqa", metric="accuracy", verdict=verdict, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (gate("not measured"), ", the evaluation has no samples of this task"),
        (
            gate("failed", **LOSS),
            ": changed by -2.5% of the full-precision score (95 % interval -4.5% to +0.0%), allowed -2.0%",
        ),
        (gate("passed", max_drop=0.0), ": allowed +0.0%"),
        (gate("passed", **LOSS | {"low": None}), ": allowed -2.0%"),
        (gate("passed", **LOSS | {"high": None}), ": allowed -2.0%"),
        (gate("passed", **LOSS | {"change": None}), ": allowed -2.0%"),
        (
            gate("not resolved", **LOSS, samples_needed=12_345),
            " with 1,500 samples: changed by -2.5% of the full-precision score (95 % interval -4.5% to +0.0%), allowed "
            "-2.0%; about 13,000 samples would resolve it (--eval-samples 13000)",
        ),
        (
            gate("not resolved", **LOSS),
            " with 1,500 samples: changed by -2.5% of the full-precision score (95 % interval -4.5% to +0.0%), allowed "
            "-2.0%; the measured change is too close to the bound for more samples to resolve it",
        ),
        (  # of a report that mmq did not write
            gate("not resolved", samples=None, samples_needed=5),
            ": allowed -2.0%; about 5 samples would resolve it (--eval-samples 5)",
        ),
        (
            gate("not comparable", before=0.25, chance=0.24),
            ", the full-precision model scores at chance level (0.2500 on 1,500 samples; answers that ignore the "
            "picture score 0.2400), so a relative change has no meaning; check prompt and data",
        ),
        (
            gate("not comparable", before=0.0),
            ", the full-precision model scores 0, so a relative change is undefined; check prompt and data",
        ),
        (
            gate("not comparable"),
            ", the full-precision model scores 0, so a relative change is undefined; check prompt and data",
        ),
    ],
)
def test_a_verdict_has_its_reason_with_figures(result: GateResult, reason: str) -> None:
    assert gate_text.sentence(result) == f"vqa accuracy: {result.verdict}{reason}"


@pytest.mark.parametrize(
    ("verdict", "decide", "change", "is_accepted"),
    [
        ("passed", "upper", -0.5, True),
        ("failed", "point", 0.5, False),
        ("not measured", "point", None, False),
        ("not resolved", "upper", 0.5, False),
        ("not resolved", "point", None, False),
        ("not resolved", "point", -0.02, True),
        ("not resolved", "point", -0.021, False),
    ],
)
def test_only_a_gate_that_decides_by_the_point_is_accepted_without_being_resolved(
    verdict: str, decide: str, change: float | None, is_accepted: bool
) -> None:
    assert gate_text.accepted(gate(verdict, decide=decide, change=change)) is is_accepted


@pytest.mark.parametrize(
    ("count", "rounded"), [(1, 1), (99, 99), (100, 100), (101, 110), (999, 1000), (3842, 3900), (10**6 + 1, 1_100_000)]
)
def test_counts_are_rounded_up_to_two_digits(count: int, rounded: int) -> None:
    assert gate_text.rounded_up(count) == rounded
