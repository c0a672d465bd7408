"""Run a study: quantize the missing units, score the missing settings, and collect the results."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from exporter import data
from exporter.errors import CheckpointError
from exporter.evaluation.answers import digest
from exporter.events import Event, Listener, notice, preparing
from exporter.files.writing import make_folder, write_text
from exporter.methods import METHODS
from exporter.model.processors.processor import load_processor
from exporter.model.tied_heads import refuse_different
from exporter.planning.recipe import Recipe, Rule
from exporter.quantization.identity import method_versions, of_source
from exporter.study.grid import Setting
from exporter.study.keys import Keys, calibration_digest, exam_digest, keys_of
from exporter.study.records import Records, ScoredSetting, as_csv
from exporter.study.units import StudyUnit, units_of
from exporter.study.worker_pool import WorkerPool
from exporter.study.worker_tasks import (
    CHANGED,
    Setup,
    StudyModel,
    TaskResult,
    exam_samples,
    make_units,
    open_model,
    score_setting,
    store_of,
    study_training,
)


@dataclass(frozen=True)
class Outcome:
    """Result and cost of a study.

    settings: in the order of the request. scored, quantized: number of settings and units computed in this run.
    units: number of distinct units of all settings. used_units: the same, counting a unit once per setting.
    sequential: every setting was quantized alone, so `quantized` counts the units of the settings scored in this run.
    seconds: wall time per step. cpu_seconds: of this process and its workers, including their start.
    """

    settings: tuple[ScoredSetting, ...]
    scored: int
    quantized: int
    units: int
    used_units: int
    seconds: Mapping[str, float]
    cpu_seconds: float
    sequential: bool = False


@dataclass(frozen=True)
class PendingSetting:
    """A setting before scoring: its id in the records, and the size and units of its plan."""

    setting: Setting
    id: str
    bytes: int
    bits_per_weight: float
    units: tuple[StudyUnit, ...]


def run(setup: Setup, settings: Sequence[Setting], pool: WorkerPool, on_event: Listener) -> Outcome:
    """Score settings; scores of earlier runs are reused. The same call resumes a stopped run.

    Raises PlanError if a setting does not fit the model, and DataError if calibration and exam share a picture.
    """
    started, cpu_started = time.monotonic(), time.process_time()
    make_folder(setup.folder)
    open_model.cache_clear()  # one process may run several studies, and the model may change between them
    model = open_model(setup)
    with preparing(on_event, "reading samples and the checkpoint"):
        keys = keys_of_run(setup, model, on_event)
    exam = _exam(setup, keys)
    requested = [_pending_setting(model, setting, keys, exam) for setting in settings]
    with Records(setup.folder / f"{setup.table}.sqlite") as records:
        records.begin(exam)
        measured_before = records.all()
        for note in records.damaged:
            on_event(notice(note))
        pending_settings = _distinct(pending for pending in requested if pending.id not in measured_before)
        step_seconds = {"plan": time.monotonic() - started}
        cpu_by_process: dict[str, float] = {}
        if setup.sequential:
            quantized = sum(len(setting.units) for setting in pending_settings)
        else:
            quantized = _quantize(setup, pending_settings, keys, pool, on_event, step_seconds, cpu_by_process)
        _score(setup, pending_settings, exam, keys, pool, on_event, records, step_seconds, cpu_by_process)
        all_settings = records.all()
    _require_unchanged(model, keys)
    own_result = TaskResult.since((started, cpu_started), None)
    cpu_by_process[own_result.process] = own_result.cpu_seconds  # this process, including its own work
    write_text(setup.folder / f"{setup.table}.csv", as_csv(list(all_settings.values())))
    scored = tuple(replace(all_settings[pending.id], about=_about(setup, pending.setting)) for pending in requested)
    unit_keys = [unit.key for pending in requested for unit in pending.units]
    return Outcome(
        scored,
        len(pending_settings),
        quantized,
        len(set(unit_keys)),
        len(unit_keys),
        step_seconds,
        sum(cpu_by_process.values()),
        setup.sequential,
    )


def keys_of_run(setup: Setup, model: StudyModel, on_event: Listener) -> Keys:
    """Digests that identify units and settings.

    Raises DataError if calibration and exam share a picture, CheckpointError if a head differs from its embedding.
    """
    refuse_different(model.checkpoint, model.family)
    model.checkpoint.start_hashing()
    exam_samples_by_task, training = exam_samples(setup), study_training(setup, model)
    if setup.split != "train":
        data.check_disjoint(
            data.traces(training), [sample for samples in exam_samples_by_task.values() for sample in samples]
        )
    processor = load_processor(model.checkpoint.folder)
    return keys_of(
        model.checkpoint,
        model.device,
        calibration_digest(model.recipe, processor, model.family, training),
        exam_digest(processor, model.family, exam_samples_by_task),
        on_event,
    )


def _exam(setup: Setup, keys: Keys) -> str:
    """Digest of everything that comparable scores have in common.

    These are the model, its calibration data, the version of each method, the samples and the way of scoring.
    """
    how: list[Any] = [setup.how, setup.sequential, setup.split]
    lengths = Recipe.model_validate_json(setup.recipe).max_new_tokens
    how += [lengths] if lengths and setup.how == "generated" else []
    return digest([keys.exam, how, keys.model, keys.calibration, method_versions(METHODS)])[:32]


def _require_unchanged(model: StudyModel, keys: Keys) -> None:
    """Raise CheckpointError if the model changed since its digest was computed."""
    if digest(of_source(model.checkpoint)) != keys.source:
        raise CheckpointError(f"{model.checkpoint.origin} changed while the study ran", CHANGED)


def _pending_setting(model: StudyModel, setting: Setting, keys: Keys, exam: str) -> PendingSetting:
    plan = model.plan(setting.rules)
    units = units_of(plan, keys.model, keys.calibration) if setting.rules else ()
    name = digest([exam, sorted(unit.key for unit in units)])[:32]
    return PendingSetting(setting, name, plan.bytes_after, plan.bits_per_weight, units)


def _quantize(
    setup: Setup,
    settings: Sequence[PendingSetting],
    keys: Keys,
    pool: WorkerPool,
    on_event: Listener,
    step_seconds: dict[str, float],
    cpu_by_process: dict[str, float],
) -> int:
    """Quantize the missing units, grouped so that each task passes through one component once; returns their number.

    step_seconds, cpu_by_process: updated in place.
    """
    store = store_of(setup)
    missing = {unit.key: unit for setting in settings for unit in setting.units if not store.has(unit)}
    parcels: dict[tuple[str, str, int | str], list[StudyUnit]] = {}
    for unit in missing.values():
        rule = unit.rows[0].rule
        assert rule is not None
        parcels.setdefault((unit.component, rule.method, rule.bits), []).append(unit)
    tasks = [(setup, tuple(units), keys) for units in sorted(parcels.values(), key=len, reverse=True)]
    started, finished_units = time.monotonic(), 0
    if tasks:  # workers need seconds to start
        on_event(Event("study units", 0, len(missing), "starting workers"))
    for index, task_result in pool(make_units, tasks):
        finished_units += len(tasks[index][1])
        cpu_by_process[task_result.process] = task_result.process_seconds
        on_event(
            Event("study units", finished_units, len(missing), "", remaining(started, finished_units, len(missing)))
        )
    step_seconds["quantize"] = time.monotonic() - started
    return len(missing)


def _score(
    setup: Setup,
    settings: Sequence[PendingSetting],
    exam: str,
    keys: Keys,
    pool: WorkerPool,
    on_event: Listener,
    records: Records,
    step_seconds: dict[str, float],
    cpu_by_process: dict[str, float],
) -> None:
    """Score settings and record each one immediately. step_seconds, cpu_by_process: updated in place."""
    started = time.monotonic()
    tasks: list[tuple[Setup, tuple[Rule, ...], str, Keys]] = [
        (setup, pending.setting.rules, pending.id, keys) for pending in settings
    ]
    if tasks:
        on_event(Event("study points", 0, len(settings), "reading samples and the full-precision model"))
    for done, (index, result) in enumerate(pool(score_setting, tasks), 1):
        pending, task_result = settings[index], _as_task_result(result)
        about = _about(setup, pending.setting)
        for note in task_result.notes:
            on_event(notice(note))
        records.add(
            ScoredSetting(
                pending.id,
                exam,
                about,
                pending.bytes,
                pending.bits_per_weight,
                task_result.seconds,
                task_result.cpu_seconds,
                task_result.result,
            )
        )
        cpu_by_process[task_result.process] = task_result.process_seconds
        on_event(Event("study points", done, len(settings), "", remaining(started, done, len(settings))))
    step_seconds["score"] = time.monotonic() - started


def _distinct(settings: Iterable[PendingSetting]) -> list[PendingSetting]:
    """One setting per id, the first one, so that `all` comes before an equal `front+middle`."""
    first_of_each_id: dict[str, PendingSetting] = {}
    for setting in settings:
        first_of_each_id.setdefault(setting.id, setting)
    return list(first_of_each_id.values())


def _about(setup: Setup, setting: Setting) -> dict[str, str | int]:
    return {**dict(setting.about), "sequential": int(setup.sequential)}


def _as_task_result(result: Any) -> TaskResult:
    assert isinstance(result, TaskResult)
    return result


def remaining(started: float, done: int, total: int) -> dict[str, float]:
    """`left`: estimated remaining seconds at the mean speed so far."""
    return {"left": (time.monotonic() - started) / max(done, 1) * (total - done)}
