"""Parts of studies without a model: seconds of steps, workers, warnings, and the data of plots."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from exporter.events import Event
from exporter.study import allocation_run, run, study_plots, worker_pool
from exporter.study.grid import Setting
from exporter.study.records import PlottedSetting
from exporter.study.run import PendingSetting
from exporter.study.worker_tasks import TaskResult


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
        ("note", 0, 0),
        ("study points", 1, 2),
        ("study points", 2, 2),
    ]
    assert events[0].message == "unit z is damaged"
    assert [event.numbers["left"] for event in events[1:]] == [3.0, 0.0]


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


@pytest.mark.parametrize(
    ("change", "confirmed", "max_drop", "warning"),
    [
        (math.nan, True, 0.1, "the loss on real tasks is unknown: the full-precision model scores 0 there"),
        (math.nan, False, None, "the loss on the validation split is unknown"),
        (-0.1, True, 0.1, ""),
        (-0.101, True, 0.1, "the allocation loses 10.1% on real tasks, more than 10.0%: allow a larger size"),
        (-0.051, False, None, "the allocation loses 5.1% on the validation split, more than 5.0%: allow a larger"),
        (-0.05, False, None, ""),
        (-0.2, True, 0.0, "the allocation loses 20.0% on real tasks, more than 0.0%"),
    ],
)
def test_a_loss_beyond_the_allowed_one_is_a_warning(
    change: float, confirmed: bool, max_drop: float | None, warning: str
) -> None:
    warnings = allocation_run._warnings(change, confirmed, max_drop)
    assert len(warnings) == bool(warning)
    assert all(text.startswith(warning) for text in warnings)


def test_series_of_other_models_are_hollow_and_the_allocation_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    styles: list[dict[str, Any]] = []
    monkeypatch.setattr(study_plots, "_scatter", lambda axis, points, style: styles.append(style))
    points = [PlottedSetting(bits, 0.8 + bits / 50) for bits in (4.0, 8.0)]
    study_plots.pareto({"grid": points, "allocation": points}, {"paper": points}, "allocation")
    assert [(style["label"], style["linestyle"], style.get("markerfacecolor")) for style in styles] == [
        ("grid", "none", None),
        ("allocation", "-", None),
        ("paper", "none", "none"),
    ]
    assert [style["color"] for style in styles] == list(study_plots.COLORS[:3])
    assert [style["marker"] for style in styles] == list(study_plots.MARKERS[:3])
