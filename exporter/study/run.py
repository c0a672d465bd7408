"""A study: which units and settings are missing, who makes them, and what came out."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from exporter import data
from exporter.errors import CheckpointError
from exporter.evaluation.answers import digest
from exporter.events import Event, Listener
from exporter.files.writing import make_folder, write_text
from exporter.methods import METHODS
from exporter.model.processor import load_processor
from exporter.pipeline.samples import training_samples
from exporter.planning.recipe import Rule
from exporter.quantization.identity import method_versions, of_source
from exporter.study.grid import Point
from exporter.study.keys import Keys, calibration_digest, exam_digest, keys_of
from exporter.study.pool import WorkerPool
from exporter.study.records import Measured, Records, as_csv
from exporter.study.units import StudyUnit, units_of
from exporter.study.work import CHANGED, Opened, Setup, Spent, exam_samples, make_units, opened, score_point, store_of


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
class PendingSetting:
    """One setting on its way: its plan's size and units, and the name under which it is kept."""

    point: Point
    id: str
    bytes: int
    bits_per_weight: float
    units: tuple[StudyUnit, ...]


def run(setup: Setup, points: Sequence[Point], pool: WorkerPool, on_event: Listener) -> Outcome:
    """Measure settings; those measured before are read. Stopped at any moment, the same call goes on.

    PlanError when a setting does not fit the model, DataError when calibration and exam share a picture.
    """
    begun, cpu = time.monotonic(), time.process_time()
    make_folder(setup.folder)
    opened.cache_clear()  # a process may run several studies, and the model may have changed between them
    model = opened(setup)
    keys = keys_of_run(setup, model, on_event)
    exam = _exam(setup, keys)
    jobs = [_job(model, point, keys, exam) for point in points]
    with Records(setup.folder / f"{setup.table}.sqlite") as records:
        records.begin(exam)
        before = records.all()
        for note in records.damaged:
            on_event(Event("note", 0, 0, note))
        todo = _different(job for job in jobs if job.id not in before)
        laps = {"plan": time.monotonic() - begun}
        used: dict[str, float] = {}
        if setup.sequential:
            made = sum(len(job.units) for job in todo)
        else:
            made = _quantize(setup, todo, keys, pool, on_event, laps, used)
        _score(setup, todo, exam, keys, pool, on_event, records, laps, used)
        after = records.all()
    _require_unchanged(model, keys)
    spent = Spent.since((begun, cpu), None)
    used[spent.process] = spent.cpu_seconds  # this process, with what it did itself
    write_text(setup.folder / f"{setup.table}.csv", as_csv(list(after.values())))
    found = tuple(replace(after[job.id], about=_about(setup, job.point)) for job in jobs)
    named = [unit.key for job in jobs for unit in job.units]
    return Outcome(found, len(todo), made, len(set(named)), len(named), laps, sum(used.values()), setup.sequential)


def keys_of_run(setup: Setup, model: Opened, on_event: Listener) -> Keys:
    """What units and settings are named by; a picture that is both calibrated on and scored on is a DataError."""
    model.checkpoint.start_hashing()
    exam, training = exam_samples(setup), training_samples(model.recipe, setup.places)
    if setup.split != "train":
        data.check_disjoint(data.traces(training), [sample for samples in exam.values() for sample in samples])
    processor = load_processor(model.checkpoint.folder)
    return keys_of(
        model.checkpoint,
        model.device,
        calibration_digest(model.recipe, processor, model.family, training),
        exam_digest(processor, model.family, exam),
        on_event,
    )


def _exam(setup: Setup, keys: Keys) -> str:
    """What two scores must have in common to stand in one table.

    That is the model, what it was calibrated on and which version of each method did that, beside the samples and how
    they are scored.
    """
    how = [setup.how, setup.sequential, setup.split]
    return digest([keys.exam, how, keys.model, keys.calibration, method_versions(METHODS)])[:32]


def _require_unchanged(model: Opened, keys: Keys) -> None:
    """CheckpointError when the model changed since its digest was taken."""
    if digest(of_source(model.checkpoint)) != keys.source:
        raise CheckpointError(f"{model.checkpoint.origin} changed while the study ran", CHANGED)


def _job(model: Opened, point: Point, keys: Keys, exam: str) -> PendingSetting:
    plan = model.plan(point.rules)
    units = units_of(plan, keys.model, keys.calibration) if point.rules else ()
    name = digest([exam, sorted(unit.key for unit in units)])[:32]
    return PendingSetting(point, name, plan.bytes_after, plan.bits_per_weight, units)


def _quantize(
    setup: Setup,
    jobs: Sequence[PendingSetting],
    keys: Keys,
    pool: WorkerPool,
    on_event: Listener,
    laps: dict[str, float],
    used: dict[str, float],
) -> int:
    """Make the units that some setting lacks, in parcels that each walk one component once."""
    store = store_of(setup)
    missing = {unit.key: unit for job in jobs for unit in job.units if not store.has(unit)}
    parcels: dict[tuple[str, str, int | str], list[StudyUnit]] = {}
    for unit in missing.values():
        rule = unit.rows[0].rule
        assert rule is not None
        parcels.setdefault((unit.component, rule.method, rule.bits), []).append(unit)
    tasks = [(setup, tuple(units), keys) for units in sorted(parcels.values(), key=len, reverse=True)]
    begun, done = time.monotonic(), 0
    for number, spent in pool(make_units, tasks):
        done += len(tasks[number][1])
        used[spent.process] = spent.process_seconds
        on_event(Event("study units", done, len(missing), "", left(begun, done, len(missing))))
    laps["quantize"] = time.monotonic() - begun
    return len(missing)


def _score(
    setup: Setup,
    jobs: Sequence[PendingSetting],
    exam: str,
    keys: Keys,
    pool: WorkerPool,
    on_event: Listener,
    records: Records,
    laps: dict[str, float],
    used: dict[str, float],
) -> None:
    """Score the settings that were never scored; each is kept at once."""
    begun = time.monotonic()
    tasks: list[tuple[Setup, tuple[Rule, ...], str, Keys]] = [(setup, job.point.rules, job.id, keys) for job in jobs]
    for done, (number, spent) in enumerate(pool(score_point, tasks), 1):
        job, took = jobs[number], _checked(spent)
        about = _about(setup, job.point)
        for note in took.notes:
            on_event(Event("note", done, len(jobs), note))
        records.add(
            Measured(job.id, exam, about, job.bytes, job.bits_per_weight, took.seconds, took.cpu_seconds, took.result)
        )
        used[took.process] = took.process_seconds
        on_event(Event("study points", done, len(jobs), "", left(begun, done, len(jobs))))
    laps["score"] = time.monotonic() - begun


def _different(jobs: Iterable[PendingSetting]) -> list[PendingSetting]:
    """Jobs that are not the same work under another name; the first name stays (`all` comes before `front+middle`)."""
    found: dict[str, PendingSetting] = {}
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
