"""A study: which units and settings are missing, who makes them, and what came out."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from exporter import data
from exporter.checkpoint import make_folder, write_text
from exporter.events import Event
from exporter.export import training_samples
from exporter.methods import METHODS
from exporter.recipe import Rule
from exporter.study.grid import Point
from exporter.study.pool import Pool
from exporter.study.records import Measured, Records, as_csv
from exporter.study.units import StudyUnit, units_of
from exporter.study.work import Opened, Setup, Spent, exam_samples, make_units, opened, score_point, store_of

Listener = Callable[[Event], None]


@dataclass(frozen=True)
class Outcome:
    """What a study found and what it took.

    found: the settings in the order asked for. scored, made: settings and units computed now, the others were there.
    named: units that the settings name in all, each as often as a setting uses it; units: different ones.
    sequential: every setting was quantized by itself, so `made` counts what the settings scored now hold.
    seconds: wall time by step. cpu_seconds: of this process and its workers, their start included.
    """

    found: tuple[Measured, ...]
    scored: int
    made: int
    units: int
    named: int
    seconds: Mapping[str, float]
    cpu_seconds: float
    sequential: bool = False


@dataclass(frozen=True)
class Job:
    """One setting on its way: its plan's size and units, and the name under which it is kept."""

    point: Point
    id: str
    bytes: int
    bits_per_weight: float
    units: tuple[StudyUnit, ...]


def run(setup: Setup, points: Sequence[Point], pool: Pool, on_event: Listener) -> Outcome:
    """Measure settings; those measured before are read. Stopped at any moment, the same call goes on.

    PlanError when a setting does not fit the model, DataError when calibration and exam share a picture.
    """
    begun, cpu = time.monotonic(), time.process_time()
    make_folder(setup.folder)
    model = opened(setup)
    source = model.checkpoint.digest()
    exam, calibration = _digests(setup, source)
    jobs = [_job(setup, model, point, source, exam, calibration) for point in points]
    with Records(setup.folder / f"{setup.table}.sqlite") as records:
        records.begin(exam)
        before = records.all()
        todo = _different(job for job in jobs if job.id not in before)
        laps = {"plan": time.monotonic() - begun}
        used: dict[str, float] = {}
        if setup.sequential:
            made = sum(len(job.units) for job in todo)
        else:
            made = _quantize(setup, todo, pool, on_event, laps, used)
        _score(setup, todo, exam, calibration, pool, on_event, records, laps, used)
        after = records.all()
    spent = Spent.since((begun, cpu), None)
    used[spent.process] = spent.cpu_seconds  # this process, with what it did itself
    write_text(setup.folder / f"{setup.table}.csv", as_csv(list(after.values())))
    found = tuple(replace(after[job.id], about=_about(setup, job.point)) for job in jobs)
    named = [unit.key for job in jobs for unit in job.units]
    return Outcome(found, len(todo), made, len(set(named)), len(named), laps, sum(used.values()), setup.sequential)


def _digests(setup: Setup, source: str) -> tuple[str, str]:
    """Of the exam, and of the calibration data; a shared picture is an error.

    Scores may stand in one table when their exams are equal: so that is the model, what it was calibrated on and which
    version of each method did that, beside the samples and how they are scored.
    """
    model = opened(setup)
    exam = exam_samples(setup)
    training = data.traces(training_samples(model.recipe, setup.places))
    if setup.split != "train":
        data.check_disjoint(training, [sample for samples in exam.values() for sample in samples])
    asked = {task: [sample.identity for sample in samples] for task, samples in exam.items()}
    chosen = setup.places or data.places(model.recipe.evaluation.data or model.recipe.calibration.data)
    how = [setup.how, setup.sequential, setup.split, [str(place) for place in chosen]]
    pictures = [(trace.identity, trace.key) for trace in training]
    calibration = _digest([pictures, model.recipe.calibration.model_dump(mode="json", exclude={"data"})])
    versions = {name: method.VERSION for name, method in METHODS.items()}
    return _digest([asked, how, source, calibration, versions]), calibration


def _digest(content: Any) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _job(setup: Setup, model: Opened, point: Point, source: str, exam: str, calibration: str) -> Job:
    plan = model.plan(point.rules)
    units = units_of(plan, source, calibration) if point.rules else ()
    name = _digest([source, exam, sorted(unit.key for unit in units)])
    return Job(point, name, plan.bytes_after, plan.bits_per_weight, units)


def _quantize(
    setup: Setup, jobs: Sequence[Job], pool: Pool, on_event: Listener, laps: dict[str, float], used: dict[str, float]
) -> int:
    """Make the units that some setting lacks, in parcels that each walk one component once."""
    store = store_of(setup)
    missing = {unit.key: unit for job in jobs for unit in job.units if not store.has(unit)}
    parcels: dict[tuple[str, str, int | str], list[StudyUnit]] = {}
    for unit in missing.values():
        rule = unit.rows[0].rule
        assert rule is not None
        parcels.setdefault((unit.component, rule.method, rule.bits), []).append(unit)
    tasks = [(setup, tuple(units)) for units in sorted(parcels.values(), key=len, reverse=True)]
    begun, done = time.monotonic(), 0
    for number, spent in pool(make_units, tasks):
        done += len(tasks[number][1])
        used[spent.process] = spent.process_seconds
        on_event(Event("study units", done, len(missing), "", left(begun, done, len(missing))))
    laps["quantize"] = time.monotonic() - begun
    return len(missing)


def _score(
    setup: Setup,
    jobs: Sequence[Job],
    exam: str,
    calibration: str,
    pool: Pool,
    on_event: Listener,
    records: Records,
    laps: dict[str, float],
    used: dict[str, float],
) -> None:
    """Score the settings that were never scored; each is kept at once."""
    begun = time.monotonic()
    tasks: list[tuple[Setup, tuple[Rule, ...], str, str]] = [
        (setup, job.point.rules, job.id, calibration) for job in jobs
    ]
    for done, (number, spent) in enumerate(pool(score_point, tasks), 1):
        job, took = jobs[number], _checked(spent)
        about = _about(setup, job.point)
        records.add(
            Measured(job.id, exam, about, job.bytes, job.bits_per_weight, took.seconds, took.cpu_seconds, took.result)
        )
        used[took.process] = took.process_seconds
        on_event(Event("study points", done, len(jobs), "", left(begun, done, len(jobs))))
    laps["score"] = time.monotonic() - begun


def _different(jobs: Iterable[Job]) -> list[Job]:
    """Jobs that are not the same work under another name; the first name stays (`all` comes before `front+middle`)."""
    found: dict[str, Job] = {}
    for job in jobs:
        found.setdefault(job.id, job)
    return list(found.values())


def _about(setup: Setup, point: Point) -> dict[str, str | int]:
    return {**dict(point.about), "sequential": int(setup.sequential)}


def _checked(spent: Any) -> Spent:
    assert isinstance(spent, Spent)
    return spent


def left(begun: float, done: int, total: int) -> dict[str, float]:
    """Seconds that are left when the rest goes as the part that is done."""
    return {"left": (time.monotonic() - begun) / max(done, 1) * (total - done)}


__all__ = ["Job", "Listener", "Outcome", "left", "run"]
