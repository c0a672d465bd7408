"""Parts of an evaluation on small inputs: reports that are kept, hints, corpus metrics, old reports, and batches."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exporter.errors import DataError, GateFailed, GateNotResolved
from exporter.evaluation import cluster_answers, evaluate, report_upgrade
from exporter.evaluation.report_file import GateResult, Report
from exporter.events import Event


def report_on(data: str | None = "coco", prompts: str = "p", **counts: int) -> Any:
    """A report of these numbers of samples per task."""
    measures = [SimpleNamespace(task=task, samples=samples) for task, samples in counts.items()]
    return SimpleNamespace(evaluation=SimpleNamespace(data=data, prompts=prompts), measures=measures)


@pytest.mark.parametrize(
    ("new", "old", "is_on_fewer"),
    [
        (report_on(vqa=5), report_on(vqa=6), True),
        (report_on(vqa=6), report_on(vqa=6), False),
        (report_on(vqa=7), report_on(vqa=6), False),
        (report_on(vqa=5, captioning=9), report_on(vqa=6, captioning=9), True),
        (report_on(vqa=5, captioning=9), report_on(vqa=6, captioning=8), False),
        (report_on(vqa=6), report_on(vqa=6, captioning=8), True),
        (report_on(vqa=6, captioning=1), report_on(vqa=6), False),
        (report_on(), report_on(), False),
        (report_on("gqa", vqa=5), report_on(vqa=6), False),
        (report_on(prompts="q", vqa=5), report_on(vqa=6), False),
        (report_on(prompts="q", vqa=5), report_on(prompts="", vqa=6), True),  # an older mmq recorded no prompts
    ],
)
def test_a_report_is_on_fewer_samples_of_the_same_data(new: Any, old: Any, is_on_fewer: bool) -> None:
    assert evaluate._is_on_fewer(new, old) is is_on_fewer


def gate(verdict: str, needed: int | None = None, decide: str = "upper", change: float | None = None) -> GateResult:
    values: dict[str, Any] = {"verdict": verdict, "samples_needed": needed, "decide": decide, "change": change}
    return GateResult(task="vqa", metric="accuracy", max_drop=0.02, **values)


RESOLVE = "`decide: point` in the recipe's gate decides by the measured change"
MEASURE = "`mmq evaluate 'my out' --data SOURCE` measures the gates on data with samples of these tasks"
ANSWERS = "`mmq report 'my out'` shows answers of both models"


@pytest.mark.parametrize(
    ("gates", "hint"),
    [
        ([gate("not resolved")], RESOLVE),
        (
            [gate("not resolved", 1234), gate("not resolved", 560)],
            f"`mmq evaluate 'my out' --eval-samples 1300` runs only the additional samples; {RESOLVE}",
        ),
        ([gate("not measured", 1234)], MEASURE),
        ([gate("not comparable", 1234)], ANSWERS),
        ([gate("not comparable"), gate("not resolved"), gate("not measured")], f"{ANSWERS}; {RESOLVE}; {MEASURE}"),
    ],
)
def test_the_hint_for_gates_says_what_decides_them(gates: list[GateResult], hint: str) -> None:
    assert evaluate._resolution_hint(gates, Path("my out")) == hint


def report_with(*gates: GateResult) -> Report:
    return Report(passed=False, verdict="failed", measures=(), gates=gates)


@pytest.mark.parametrize(
    ("gates", "kind", "message"),
    [
        ([gate("failed"), gate("passed")], GateFailed, "out: 1 of 2 gates failed"),
        ([gate("failed"), gate("not resolved")], GateFailed, "out: 2 of 2 gates did not pass"),
        ([gate("not resolved"), gate("passed")], GateNotResolved, "out: 1 of 2 gates are not resolved"),
        ([gate("not comparable"), gate("not resolved")], GateNotResolved, "out: 2 of 2 gates could not be decided"),
        ([gate("not measured")], GateNotResolved, "out: 1 of 1 gates are not resolved"),
    ],
)
@pytest.mark.parametrize("listed", [False, True])
def test_open_gates_are_an_error_that_lists_them_once(
    gates: list[GateResult], kind: type[Exception], message: str, listed: bool
) -> None:
    with pytest.raises(kind) as caught:
        evaluate.raise_unless_accepted(report_with(*gates), Path("out"), listed)
    first, *lines = str(caught.value).splitlines()
    assert (type(caught.value), first) == (kind, message)
    assert len(lines) == (0 if listed else sum(gate.verdict != "passed" for gate in gates))


def test_accepted_gates_are_no_error() -> None:
    by_point = gate("not resolved", decide="point", change=0.01)
    evaluate.raise_unless_accepted(report_with(gate("passed"), by_point), Path("out"))


def test_corpus_metrics_are_those_that_are_no_means(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"cider": 0.75, "bleu": 0.5, "accuracy": 0.25, "accuracy of colors": 0.5}

    def corpus(answers: list[str], samples: Any) -> dict[str, float]:
        return {name: value * len(answers) for name, value in figures.items()}

    monkeypatch.setattr(evaluate, "TASKS", {"vqa": SimpleNamespace(corpus=corpus)})
    scores: Any = {
        "accuracy": SimpleNamespace(before=[0.0, 0.5]),  # its mean
        "cider": SimpleNamespace(before=[0.0, 0.5]),
        "empty": SimpleNamespace(before=[]),
    }
    assert evaluate._corpus("vqa", [], (["a"], ["a", "b"]), scores) == {"cider": (0.75, 1.5), "bleu": (0.5, 1.0)}
    assert evaluate._same(0.25, 0.25 * (1 + 1e-10))
    assert not evaluate._same(0.25, 0.25 * (1 + 1e-7))
    assert evaluate._same(0.0, 1e-13)
    assert not evaluate._same(0.25, None)


def test_scores_that_are_no_numbers_are_a_note_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate.retrieval, "count_not_finite", sum)
    events: list[Event] = []

    def check(before: list[Any], after: list[Any]) -> None:
        answers: Any = [{"retrieval": before}, {"retrieval": after}]
        evaluate._check_finite(("source", "artifact"), answers, events.append)

    check([0], [0])
    assert not events
    check([0], [2, 1])
    assert [(event.stage, event.message) for event in events] == [
        ("note", "artifact: scores of 3 samples are not finite numbers; they count as misses")
    ]
    with pytest.raises(DataError, match="source: scores of 4 samples are not finite numbers"):
        check([4], [0])
    evaluate._check_finite(("source", "artifact"), [{}, {}], events.append)  # no retrieval
    assert len(events) == 1


# Reports of version 1


def old_report(**difference: Any) -> dict[str, Any]:
    stored = {"before": 0.8, "after": 0.76, "drop": 0.04, "low": 0.02, "high": 0.06, "sd": 0.3, "other": 1}
    measure = {"task": "vqa", "metric": "accuracy", "samples": 400, "difference": stored | difference, "unknown": 1}
    gate = {"task": "vqa", "metric": "accuracy", "max_drop": 0.1, "decide": "upper", "passed": True}
    return {"measures": [measure], "gates": [gate], "changed": [{"id": "a", "task": "vqa", "extra": 1}], "counts": {}}


def test_an_old_report_gets_changes_and_verdicts() -> None:
    plain = report_upgrade.from_version_1(old_report())
    (measure,), (gate,) = plain["measures"], plain["gates"]
    assert measure == {
        "task": "vqa",
        "metric": "accuracy",
        "samples": 400,
        "difference": {"before": 0.8, "after": 0.76, "sd": 0.3, "change": -0.04, "low": -0.06, "high": -0.02},
    }
    assert gate == {
        "task": "vqa",
        "metric": "accuracy",
        "max_drop": 0.1,
        "decide": "upper",
        "verdict": "passed",
        "samples": 400,
        "before": 0.8,
        "change": -0.04 / 0.8,
        "low": -0.06 / 0.8,
        "high": -0.02 / 0.8,
    }
    assert (plain["format_version"], plain["verdict"], plain["passed"]) == (1, "passed", True)
    assert (plain["changed"], plain["counts"]) == ([{"id": "a", "task": "vqa"}], {})
    assert "examples" not in plain


@pytest.mark.parametrize(
    ("difference", "verdict", "bounds"),
    [
        ({"high": 0.09}, "not resolved", (-0.09 / 0.8, -0.02 / 0.8)),
        ({"drop": 0.087, "after": 0.713, "low": 0.085, "high": 0.09}, "failed", (-0.09 / 0.8, -0.085 / 0.8)),
        ({"before": 0.0}, "not comparable", None),
        ({"drop": "much"}, "not measured", None),
        # when no score differs, a loss that no sample showed is possible: 1 - 0.025 ** (1 / 400)
        ({"drop": 0.0, "low": 0.0, "high": 0.0, "sd": 0.0}, "passed", (-0.0091796 / 0.8, 0.0091796 / 0.8)),
    ],
)
def test_the_verdict_of_an_old_gate_is_that_of_its_interval(
    difference: dict[str, Any], verdict: str, bounds: tuple[float, float] | None
) -> None:
    plain = report_upgrade.from_version_1(old_report(**difference))
    (gate,) = plain["gates"]
    assert gate["verdict"] == plain["verdict"] == verdict
    assert plain["passed"] is (verdict == "passed")
    if bounds:
        assert (gate["low"], gate["high"]) == pytest.approx(bounds, rel=1e-4)
    else:
        assert "low" not in gate


def test_an_old_report_without_a_spread_counts_as_changed() -> None:
    """Without `sd` the width of the interval tells whether a score differs."""
    report = old_report(drop=0.0, low=-0.001, high=0.001)
    del report["measures"][0]["difference"]["sd"]
    (gate,) = report_upgrade.from_version_1(report)["gates"]
    assert gate["high"] == pytest.approx(0.001 / 0.8)  # the stored end: nothing widens it


def test_invalid_parts_of_an_old_report_are_left_for_the_schema() -> None:
    plain = report_upgrade.from_version_1({"measures": ["x", {"difference": 3}], "gates": "y", "changed": [4]})
    assert (plain["measures"], plain["gates"], plain["changed"]) == (["x", {"difference": 3}], ["y"], [4])
    assert (plain["verdict"], plain["passed"]) == ("no gates", False)
    (unmatched,) = report_upgrade.from_version_1({"measures": [], "gates": [{"task": "vqa", "max_drop": 0.1}]})["gates"]
    assert unmatched == {"task": "vqa", "max_drop": 0.1, "verdict": "not measured"}


# Answers of a cluster


def test_a_task_of_a_cluster_has_a_batch_or_a_whole_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_answers, "task_of", lambda sample: sample)
    cluster: Any = None
    model: Any = None
    backend = cluster_answers.ClusterBackend(cluster, {}, model, 2)
    samples: Any = ["vqa", "retrieval", "vqa", "retrieval", "vqa", "retrieval", "captioning"]
    assert backend._batches(samples) == [[6], [1, 3, 5], [0, 2], [4]]
    assert backend._batches([]) == []


def test_a_worker_keeps_its_model_until_another_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Opened:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> str:
            calls.append(f"open {self.name}")
            return self.name

        def __exit__(self, *error: object) -> None:
            calls.append(f"close {self.name}")

    def answerer(folder: Path, model: Any) -> Any:
        name = f"{folder} {model.second}"
        return SimpleNamespace(identity={"weights": "w"}, opened=lambda: Opened(name))

    monkeypatch.setattr(cluster_answers, "_answerer", answerer)
    worker = cluster_answers._OpenedModel()

    def model(second: bool, weights: str = "w") -> Any:
        return SimpleNamespace(second=second, identity={"weights": weights})

    first, second = Path("a"), Path("b")
    asked = [worker.backend(*call) for call in ((first, model(False)), (first, model(False)), (first, model(True)))]
    assert asked == ["a False", "a False", "a True"]
    assert worker.backend(second, model(True)) == "b True"
    assert calls == ["open a False", "close a False", "open a True", "close a True", "open b True"]
    with pytest.raises(DataError, match=r"this worker differs from the process that started the evaluation: .*weights"):
        worker.backend(first, model(False, "other"))
    assert worker.backend(second, model(True)) == "b True"
    assert calls[5:] == ["close b True", "open b True"]  # a refused model leaves none open


def test_answers_of_a_worker_have_the_numbers_of_the_whole_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    def pieces(samples: list[str]) -> Any:
        yield {1: samples[1].upper()}
        yield {0: samples[0].upper()}

    monkeypatch.setattr(cluster_answers, "received", lambda shipment: Path("place"))
    monkeypatch.setattr(cluster_answers, "_samples", lambda path: ["a", "b", "c", "d"])
    opened = SimpleNamespace(backend=lambda folder, model: SimpleNamespace(pieces=pieces))
    monkeypatch.setattr(cluster_answers, "_OPENED", opened)
    shipment: Any = None
    model: Any = None
    assert cluster_answers.answer_batch(shipment, model, [3, 1]) == {1: "B", 3: "D"}
