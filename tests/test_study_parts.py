"""Parts of studies without a model: seconds of steps, workers, data of an exam, and the data of plots."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from exporter.errors import DataError
from exporter.events import Event
from exporter.study import run, study_plots, worker_pool, worker_tasks
from exporter.study.grid import Setting
from exporter.study.records import PlottedSetting
from exporter.study.run import PendingSetting
from exporter.study.worker_tasks import CALIBRATION, TaskResult


def clock(monkeypatch: pytest.MonkeyPatch, *times: float) -> None:
    """The times that a run reads, in their order."""
    now = iter(times)
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: next(now)))


def pending(name: str, *units: Any) -> PendingSetting:
    return PendingSetting(Setting((), (("vision_bits", 4),)), name, 1000, 4.5, units)


def task_result(result: Any, process: str, process_seconds: float, notes: tuple[str, ...] = ()) -> TaskResult:
    return TaskResult(2.0, 1.5, process, process_seconds, result, notes)


def unit(key: str, component: str = "vision", bits: int = 4) -> Any:
    rule = SimpleNamespace(method="rtn", bits=bits)
    return SimpleNamespace(key=key, component=component, rows=[SimpleNamespace(rule=rule)])


def test_missing_units_are_quantized_in_one_task_per_pass_the_longest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, 10.0, 12.0, 16.0, 17.0)
    monkeypatch.setattr(run, "store_of", lambda setup: SimpleNamespace(has=lambda unit: unit.key == "stored"))
    tasks: list[list[str]] = []

    def workers(function: Any, calls: Any) -> Any:
        assert function is run.make_units
        tasks.extend([unit.key for unit in units] for _, units, _ in calls)
        yield 0, task_result(2, "host 1", 3.0)
        yield 1, task_result(1, "host 1", 5.0)

    shared = unit("b")
    settings = [pending("x", unit("a", bits=8), shared, unit("stored")), pending("y", shared, unit("c"))]
    seconds, by_process, events = {"plan": 1.0}, dict[str, float](), list[Event]()
    setup: Any = "setup"
    keys: Any = "keys"
    assert run._quantize(setup, settings, keys, workers, events.append, seconds, by_process) == 3
    assert tasks == [["b", "c"], ["a"]]
    assert (seconds, by_process) == ({"plan": 1.0, "quantize": 7.0}, {"host 1": 5.0})
    assert [(event.stage, event.done, event.total, event.numbers) for event in events] == [
        ("study units", 0, 3, {}),
        ("study units", 2, 3, {"left": 1.0}),
        ("study units", 3, 3, {"left": 0.0}),
    ]


def test_a_setting_is_recorded_when_it_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, 10.0, 13.0, 14.0, 15.0)
    records: list[Any] = []

    def workers(function: Any, calls: Any) -> Any:
        assert function is run.score_setting
        assert [name for _, _, name, _ in calls] == ["x", "y"]
        yield 1, task_result({"kl": 0.5}, "a", 3.0, ("unit z is damaged",))
        assert [row.id for row in records] == ["y"]
        yield 0, task_result({"kl": 0.25}, "b", 4.0)

    seconds, by_process, events = dict[str, float](), dict[str, float](), list[Event]()
    setup, keys, table = SimpleNamespace(sequential=True), SimpleNamespace(), SimpleNamespace(add=records.append)
    arguments: Any = (setup, [pending("x"), pending("y")], "exam", keys, workers, events.append, table)
    run._score(*arguments, seconds, by_process)
    first = records[0]
    assert (first.exam, first.about, first.scores) == ("exam", {"vision_bits": 4, "sequential": 1}, {"kl": 0.5})
    assert (first.bytes, first.bits_per_weight, first.seconds, first.cpu_seconds) == (1000, 4.5, 2.0, 1.5)
    assert (seconds, by_process) == ({"score": 5.0}, {"a": 3.0, "b": 4.0})
    assert [(event.stage, event.done, event.total) for event in events] == [
        ("study points", 0, 2),
        ("note", 0, 0),
        ("study points", 1, 2),
        ("study points", 2, 2),
    ]
    assert events[1].message == "unit z is damaged"
    assert [event.numbers["left"] for event in events[2:]] == [3.0, 0.0]


def test_the_remaining_time_is_that_of_the_mean_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    for done, left in ((0, 40.0), (1, 30.0), (2, 10.0), (4, 0.0)):
        clock(monkeypatch, 110.0)
        assert run.remaining(100.0, done, 4) == {"left": left}


def test_of_settings_with_equal_units_the_first_is_scored() -> None:
    settings = [pending("x"), pending("y"), pending("x", "other")]
    assert run._distinct(settings) == settings[:2]


def test_a_worker_has_one_thread_and_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Thread:
        def __init__(self, target: Any, daemon: bool) -> None:
            assert daemon
            self._target = target

        def start(self) -> None:
            self._target()

    parent = SimpleNamespace(join=lambda: calls.append("joined"))
    monkeypatch.setattr(
        worker_pool, "signal", SimpleNamespace(SIGINT="SIGINT", SIG_IGN="ignored", signal=record(calls))
    )
    monkeypatch.setattr(torch, "set_num_threads", record(calls))
    monkeypatch.setattr(worker_pool, "multiprocessing", SimpleNamespace(parent_process=lambda: parent))
    monkeypatch.setattr(worker_pool, "threading", SimpleNamespace(Thread=Thread))
    monkeypatch.setattr(worker_pool, "os", SimpleNamespace(_exit=record(calls)))
    worker_pool._begin()
    assert calls == [("SIGINT", "ignored"), (1,), "joined", (1,)]


def record(calls: list[Any]) -> Any:
    """A function that adds its arguments to `calls`."""
    return lambda *arguments: calls.append(arguments)


@pytest.mark.parametrize(("error", "terminated"), [(None, False), (ValueError(), True)])
def test_workers_finish_unless_there_is_an_error(
    error: Exception | None, terminated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    child = SimpleNamespace(terminate=lambda: calls.append("terminate"))
    monkeypatch.setattr(worker_pool, "multiprocessing", SimpleNamespace(active_children=lambda: [child]))
    workers = worker_pool.Processes(2)
    workers.__exit__(type(error) if error else None, error, None)  # none has been started
    assert not calls
    executor: Any = SimpleNamespace(shutdown=lambda wait, cancel_futures: calls.append(f"{wait} {cancel_futures}"))
    workers._executor = executor
    workers.__exit__(type(error) if error else None, error, None)
    assert calls == [*["terminate"] * terminated, "True True"]


def test_series_of_other_models_are_hollow_and_the_allocation_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    styles: list[dict[str, Any]] = []
    monkeypatch.setattr(study_plots, "_scatter", lambda axis, points, style: styles.append(style))
    monkeypatch.setattr(study_plots, "encode_figure", lambda figure, *texts: texts)
    points = [PlottedSetting(bits, 0.8 + bits / 50) for bits in (4.0, 8.0)]
    (texts,) = study_plots.pareto({"grid": points, "allocation": points}, {"paper": points}, "allocation")
    assert texts[:2] == ("pareto.png", "Score relative to full precision, by size")
    assert [(style["label"], style["linestyle"], style.get("markerfacecolor")) for style in styles] == [
        ("grid", "none", None),
        ("allocation", "-", None),
        ("paper", "none", "none"),
    ]
    assert [style["color"] for style in styles] == list(study_plots.COLORS[:3])
    assert [style["marker"] for style in styles] == list(study_plots.MARKERS[:3])


class Place:
    """A data source with samples of some tasks."""

    def __init__(self, *tasks: str) -> None:
        self.tasks = tasks

    def __str__(self) -> str:
        return "-".join(self.tasks)


def test_an_exam_has_the_tasks_of_the_study_that_the_data_has(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    evaluation, calibration = (
        SimpleNamespace(data=None, seed=7),
        SimpleNamespace(data="its data", tasks=("vqa", "captioning")),
    )
    recipe = SimpleNamespace(evaluation=evaluation, calibration=calibration)
    family = SimpleNamespace(name="llava", tasks=("vqa", "captioning"))
    monkeypatch.setattr(worker_tasks, "open_model", lambda setup: SimpleNamespace(recipe=recipe, family=family))
    monkeypatch.setattr(worker_tasks.data, "places", lambda text: [Place("vqa"), Place(str(text))])
    monkeypatch.setattr(worker_tasks.data, "samples_from", lambda *arguments: drawn.append(arguments[1:]) or ["s"])
    setup: Any = SimpleNamespace(packed=None, places=(), split="test", samples=5)
    assert worker_tasks.exam_samples(setup) == {"vqa": ["s"]}
    assert drawn == [("vqa", "test", 5, 7)]
    setup.places = (Place("captioning"), Place("vqa", "retrieval"))
    assert list(worker_tasks.exam_samples(setup)) == ["vqa", "captioning"]
    calibration.tasks = ("captioning",)
    assert list(worker_tasks.exam_samples(setup)) == ["captioning"]
    setup.places = (Place("retrieval"),)
    with pytest.raises(DataError, match=r"^retrieval: no data for a task of family llava") as caught:
        worker_tasks.exam_samples(setup)
    assert caught.value.hint == "pass data for vqa or captioning"


def test_packed_samples_are_those_of_the_exam_and_of_the_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = {CALIBRATION: ["c"], "vqa": ["v"]}
    monkeypatch.setattr(worker_tasks, "packed_groups", lambda path: groups)
    monkeypatch.setattr(worker_tasks, "training_samples", lambda recipe, places: [recipe, places])
    setup: Any = SimpleNamespace(packed="a file", places="places")
    model: Any = SimpleNamespace(recipe="recipe")
    assert worker_tasks.exam_samples(setup) == {"vqa": ["v"]}
    assert worker_tasks.study_training(setup, model) == ["c"]
    setup.packed = None
    assert worker_tasks.study_training(setup, model) == ["recipe", "places"]


def test_generated_answers_are_scored_by_each_task_s_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answers:
        def __init__(self, live: Any, processor: Any, family: Any, device: Any, batch: int) -> None:
            assert (live, processor, device, batch) == ("live", "processor", "cpu", 4)

        def answer(self, samples: list[str]) -> list[str]:
            return [sample.upper() for sample in samples]

    def score(answers: list[str], samples: list[str]) -> dict[str, list[float]]:
        assert answers == [sample.upper() for sample in samples]
        return {"accuracy": [1.0, 0.0, 0.0, 0.0][: len(samples)], "anls": [0.5] * len(samples)}

    metrics = {"vqa": ["accuracy", "anls"], "captioning": ["anls"]}
    monkeypatch.setattr(worker_tasks, "Predictor", Answers)
    monkeypatch.setattr(worker_tasks, "TASKS", dict.fromkeys(metrics, SimpleNamespace(score=score)))
    monkeypatch.setattr(worker_tasks, "measured", lambda task, samples: metrics[task])
    examiner = object.__new__(worker_tasks.Examiner)
    model = SimpleNamespace(family="family")
    values = {"_live": "live", "_processor": "processor", "_device": "cpu", "_batch": 4, "_model": model}
    vars(examiner).update(values, _samples={"vqa": ["a", "b", "c", "d"], "captioning": ["e", "f"]})
    scores = examiner._answers()
    assert {name: scores[name] for name in ("vqa accuracy", "vqa anls", "captioning anls", "score")} == {
        "vqa accuracy": 0.25,
        "vqa anls": 0.5,
        "captioning anls": 0.5,
        "score": 0.375,
    }
    assert "captioning accuracy" not in scores
    assert scores["samples"] == 6


def test_a_result_has_the_seconds_since_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_tasks, "time", SimpleNamespace(monotonic=lambda: 15.0, process_time=lambda: 4.0))
    result = TaskResult.since((12.0, 1.0), "x", ["note"])
    assert (result.seconds, result.cpu_seconds, result.process_seconds) == (3.0, 3.0, 4.0)
    assert (result.result, result.notes) == ("x", ("note",))
