"""The report schema: round trip, version 1, and errors for invalid values."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import ArtifactError
from exporter.evaluation.gates import interval_verdict, worst
from exporter.evaluation.report_file import (
    REPORT,
    VERSION,
    Report,
    ServingRecord,
    dump,
    parse_report,
    read_report,
    write_report,
)
from tests.test_evaluate import crafted

# As mmq wrote it before reports had a version: drops are full precision minus artifact, gates know two verdicts.
VERSION_1: dict[str, Any] = {
    "passed": True,
    "measures": [
        {
            "task": "vqa",
            "metric": "accuracy",
            "samples": 500,
            "difference": {"before": 0.8, "after": 0.78, "drop": 0.02, "low": 0.004, "high": 0.036, "sd": 0.18},
            "samples_to_resolve_one_percent": 1945,
        },
        {
            "task": "captioning",
            "metric": "cider",
            "samples": 500,
            "difference": {"before": 1.0, "after": 1.01, "drop": -0.01, "low": -0.02, "high": 0.001, "sd": 0.1},
        },
    ],
    "gates": [
        {"task": "vqa", "metric": "accuracy", "max_drop": 0.03, "decide": "point", "lost": 0.025, "passed": True},
        {"task": "captioning", "metric": "cider", "max_drop": 0.05, "decide": "upper", "lost": 0.001, "passed": True},
    ],
    "by_kind": {"vqa": {"color": [0.8, 0.78, 500]}},
    "changed": [
        {"task": "vqa", "id": "1", "question": "q?", "references": ["a"], "before": "a", "after": "b", "note": "old"}
    ],
    "examples": [],
    "corpus": {"vqa": {}},
    "counts": {"vqa": {"changed": 9, "lost": 9, "gained": 0}},
    "evaluation": {"data": "coco", "seed": 0, "samples": 500, "models": {"artifact": {"weights": "ab"}}},
}
SERVING: dict[str, Any] = {
    "engine": "0.32.0",
    "build": "cpu",
    "questions": 8,
    "bound": 0.015,
    "problems": [],
    "schemes": {"A": 2},
    "kernels": ["K for A"],
    "passed": True,
}


def parse(plain: Any) -> tuple[Report | None, ServingRecord | None]:
    return parse_report(json.dumps(plain).encode(), "the report")


def test_a_written_report_is_read_back_unchanged(tmp_path: Path) -> None:
    report, serving = crafted(1, 3), parse({"serving": SERVING})[1]
    for pair in ((report, serving), (report, None), (None, serving)):
        write_report(tmp_path, *pair)
        assert read_report(tmp_path) == pair
    (tmp_path / REPORT).unlink()
    assert read_report(tmp_path) == (None, None)


def test_scores_are_stored_compactly_and_exactly() -> None:
    """Each list of scores takes one line and keeps the exact floats."""
    report = crafted(1, 3, n=300)
    third = 1 / 3
    scores = report.samples["vqa"].scores["accuracy"].model_copy(update={"after": (third,) * 300})
    samples = {"vqa": report.samples["vqa"].model_copy(update={"scores": {"accuracy": scores}})}
    text = dump(report.model_copy(update={"samples": samples}), None)
    assert len([line for line in text.splitlines() if str(third) in line]) == 1
    parsed, _ = parse_report(text.encode(), "the report")
    assert parsed
    assert set(parsed.samples["vqa"].scores["accuracy"].after) == {third}


def test_version_1_is_read_with_current_signs_and_verdicts() -> None:
    """The first gate passed by its measured drop, but its interval contains the bound."""
    report, serving = parse(VERSION_1)
    assert report
    assert serving is None
    first, second = report.measures
    assert (first.difference.change, first.difference.low, first.difference.high) == (-0.02, -0.036, -0.004)
    assert (second.difference.change, second.difference.low, second.difference.high) == (0.01, -0.001, 0.02)
    assert (first.samples_to_resolve_one_percent, second.samples_to_resolve_one_percent) == (1945, None)
    assert [gate.verdict for gate in report.gates] == ["not resolved", "passed"]
    assert [gate.change for gate in report.gates] == pytest.approx([-0.025, 0.01])
    assert (report.verdict, report.passed, report.format_version) == ("not resolved", False, 1)
    assert report.changed[0].scores is None
    assert (report.samples, report.evaluation.bootstrap, report.gates[0].chance) == ({}, None, None)


def test_optional_keys_of_version_1_may_be_absent() -> None:
    old = copy.deepcopy(VERSION_1)
    for key in ("by_kind", "changed", "examples", "corpus", "counts", "evaluation"):
        del old[key]
    del old["measures"][0]["difference"]["sd"]
    report, _ = parse(old)
    assert report
    assert (report.by_kind, report.changed, report.counts, report.evaluation.data) == ({}, (), {}, None)
    assert report.measures[0].difference.sd is None


def test_a_gate_of_version_1_without_its_measure_is_not_measured() -> None:
    old = copy.deepcopy(VERSION_1)
    del old["measures"][0]
    report, _ = parse(old)
    assert report
    assert [gate.verdict for gate in report.gates] == ["not measured", "passed"]
    old["measures"][0]["difference"]["before"] = 0.0
    report, _ = parse(old)
    assert report
    assert report.gates[1].verdict == "not comparable"


def test_few_samples_of_version_1_resolve_nothing() -> None:
    """No score of 20 differs: the old interval is 0 to 0."""
    old = copy.deepcopy(VERSION_1)
    same = {"before": 0.8, "after": 0.8, "drop": 0.0, "low": 0.0, "high": 0.0, "sd": 0.0}
    old["measures"] = [old["measures"][0] | {"samples": 20, "difference": same}]
    report, _ = parse(old)
    assert report
    assert report.gates[0].verdict == "not resolved"


@pytest.mark.parametrize("key", ["passed", "verdict", "measures", "gates"])
def test_every_required_key_must_be_there(key: str) -> None:
    plain = json.loads(dump(crafted(1, 3), None))
    del plain[key]
    with pytest.raises(
        ArtifactError, match=f"the report is damaged, or a newer mmq wrote it:\n  {key}: Field required"
    ):
        parse(plain)


@pytest.mark.parametrize("key", ["measures", "gates"])
def test_version_1_must_have_measures_and_gates(key: str) -> None:
    with pytest.raises(ArtifactError, match=key):
        parse({name: value for name, value in VERSION_1.items() if name != key})


INVALID: list[tuple[str, Any]] = [
    ("format_version", VERSION + 1),
    ("format_version", "2"),
    ("passed", 1),
    ("passed", "true"),
    ("verdict", "fine"),
    ("measures", {}),
    ("measures", [1]),
    ("measures", [{}]),
    ("gates", [{}]),
    ("gates", [None]),
    ("samples", {"vqa": {}}),
    ("samples", {"../vqa": {}}),
    ("samples", {"vqa": {"ids": [], "pictures": [], "kinds": [], "changed": [], "scores": {}}}),
    ("samples", {"vqa": {"ids": ["a"], "pictures": ["0" * 64], "kinds": [""], "changed": [1], "scores": {}}}),
    ("samples", {"vqa": {"ids": ["a"], "pictures": ["0" * 63], "kinds": [""], "changed": [], "scores": {}}}),
    ("changed", [{"task": "vqa"}]),
    ("counts", {"vqa": {"changed": -1, "lost": 0, "gained": 0}}),
    ("by_kind", {"vqa": {"color": [0.1, float("nan"), 3]}}),
    ("by_kind", {"vqa": {"color": [0.1, 0.2, 0]}}),
    ("corpus", {"vqa": {"bleu4": [0.1, float("inf")]}}),
    ("evaluation", []),
    ("evaluation", {"data": "a\nb"}),
    ("evaluation", {"samples": -3}),
    ("evaluation", {"models": {"artifact": {}}}),
    ("stranger", 1),
    ("serving", [1]),
    ("serving", {"engine": "0.32.0"}),
    ("serving", SERVING | {"bound": float("nan")}),
    ("serving", SERVING | {"bound": -1.0}),
    ("serving", SERVING | {"passed": None}),
    ("serving", SERVING | {"problems": "none"}),
    ("serving", SERVING | {"stranger": 1}),
    ("serving", SERVING | {"compared": {"distance": {"mean": "x", "largest": 1.0}}}),
]


@pytest.mark.parametrize(("key", "value"), INVALID)
def test_invalid_values_are_refused_with_their_key(key: str, value: Any) -> None:
    plain = json.loads(dump(crafted(1, 3), None)) | {key: value}
    with pytest.raises(ArtifactError, match="is damaged, or a newer mmq wrote it") as refused:
        parse(plain)
    assert key in refused.value.message


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"passed": true, "passed": false}', '{"a": ' * 100_000])
def test_a_file_that_is_not_a_report_gives_one_error(content: str) -> None:
    with pytest.raises(ArtifactError, match="is damaged"):
        parse_report(content.encode(), "the report")


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.03, 0.0, "passed"),
        (-0.031, 0.0, "not resolved"),
        (-0.5, -0.03, "not resolved"),
        (-0.5, -0.031, "failed"),
        (0.01, 0.02, "passed"),
    ],
)
def test_a_verdict_follows_from_the_interval_and_the_bound(low: float, high: float, verdict: str) -> None:
    assert interval_verdict(low, high, 0.03) == verdict


def test_the_verdict_of_a_report_is_that_of_its_worst_gate() -> None:
    assert worst([]) == "no gates"
    assert worst(["passed", "passed"]) == "passed"
    assert worst(["passed", "not resolved"]) == "not resolved"
    assert worst(["not resolved", "not measured"]) == "not measured"
    assert worst(["not measured", "not comparable"]) == "not comparable"
    assert worst(["not comparable", "failed", "passed"]) == "failed"


@pytest.mark.parametrize("sd", [0.0, None])
def test_a_metric_without_any_change_has_the_interval_of_its_gate(sd: float | None) -> None:
    report = crafted(10, 10)
    (measure,), (gate,) = report.measures, report.gates
    difference = measure.difference.model_copy(update={"sd": sd})
    low, high = measure.model_copy(update={"difference": difference}).interval()
    assert gate.low is not None
    assert gate.high is not None
    assert (low, high) == pytest.approx((0.8 * gate.low, 0.8 * gate.high))
    assert low < -0.05 < 0.05 < high


@pytest.mark.parametrize("drop_sd", [False, True])
def test_a_changed_metric_has_the_interval_of_its_gate(drop_sd: bool) -> None:
    report = crafted(10, 13)
    (measure,), (gate,) = report.measures, report.gates
    if drop_sd:  # as in reports of older versions
        measure = measure.model_copy(update={"difference": measure.difference.model_copy(update={"sd": None})})
    assert gate.low is not None
    assert gate.high is not None
    assert measure.interval() == pytest.approx((0.8 * gate.low, 0.8 * gate.high))
