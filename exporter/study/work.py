"""What a worker of a study does: make units, and score settings. It opens model and data once and keeps them."""

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from exporter import data
from exporter.device import Device, choose, exact_math, free_bytes
from exporter.errors import DataError, WorkdirError
from exporter.events import ignore
from exporter.inference.block_streaming import names_by_block, stream_blocks
from exporter.inference.predict import Predictor, batches
from exporter.model.checkpoint import Checkpoint
from exporter.model.families import Family
from exporter.model.processor import load_processor
from exporter.model.processor_check import check_libraries
from exporter.model.source import open_source
from exporter.model.stream import Stream
from exporter.pipeline.preparation import with_suitable_data
from exporter.pipeline.samples import training_samples
from exporter.planning.plan import Plan, Unit, make_plan
from exporter.planning.recipe import Recipe, Rule
from exporter.planning.whole_model import whole_model
from exporter.quantization import calibrate
from exporter.quantization.workdir import UnitResult, Workdir
from exporter.study import exam
from exporter.study.keys import Keys, calibration_digest, exam_digest, stored_dtype
from exporter.study.setting import Setting
from exporter.study.units import StudyUnit, UnitStore, quantize, units_of
from exporter.tasks import TASKS
from exporter.tasks.sample import Sample

CHANGED = "let whatever writes to it finish, then run the same command again"
How = Literal["forced", "generated"]


@dataclass(frozen=True)
class Setup:
    """Everything a worker needs to begin; plain data, so that it travels.

    recipe: JSON of the recipe whose model, data and format are used (its rules are not). places: data instead of the
    recipe's. split, samples: what is scored on, of each task. how: `forced` scores by one pass over references,
    `generated` by the tasks' own metrics on answers. table: name of the files that results are kept in.
    """

    folder: Path
    recipe: str
    places: tuple[data.SourceSpec, ...] = ()
    split: str = "test"
    samples: int = 250
    batch: int = 32
    device: str = "auto"
    how: How = "forced"
    sequential: bool = False
    table: str = "study"


@dataclass(frozen=True)
class Opened:
    """A setup's model, with headers read and nothing else."""

    recipe: Recipe
    checkpoint: Checkpoint
    family: Family
    device: Device

    def plan(self, rules: Sequence[Rule]) -> Plan:
        """The plan of a setting (PlanError when it does not fit); no rules: everything is kept."""
        kept = (Rule(component=self.family.components[0].name, bits=16),)
        recipe = self.recipe.model_copy(update={"quantize": tuple(rules) or kept})
        return make_plan(recipe, self.checkpoint, self.family, self.device)


@dataclass(frozen=True)
class Spent:
    """What a task took: wall and processor seconds, and its result.

    process, process_seconds: who did it, and the processor seconds of that process since it began.
    notes: what the user should read.
    """

    seconds: float
    cpu_seconds: float
    process: str
    process_seconds: float
    result: Any
    notes: tuple[str, ...] = ()

    @classmethod
    def since(cls, start: tuple[float, float], result: Any, notes: Sequence[str] = ()) -> "Spent":
        """What was spent since `start`, a wall time and a processor time."""
        cpu = time.process_time()
        who = f"{platform.node()}:{os.getpid()}"
        return cls(time.monotonic() - start[0], cpu - start[1], who, cpu, result, tuple(notes))


@lru_cache(maxsize=2)
def opened(setup: Setup, source: str = "") -> Opened:
    """The model of a setup. source: `Keys.source`, so that a process that stays opens a changed model again."""
    recipe = with_suitable_data(Recipe.model_validate_json(setup.recipe))
    checkpoint, family = open_source(
        recipe.model.repo, recipe.model.revision, dtype=recipe.model.dtype, adapter=recipe.model.adapter
    )
    check_libraries(checkpoint, family)
    return Opened(recipe, checkpoint, family, choose(setup.device))


def store_of(setup: Setup) -> UnitStore:
    """Where the setup's units are."""
    return UnitStore(setup.folder / "units")


def exam_samples(setup: Setup) -> dict[str, list[Sample]]:
    """What settings are scored on, by task: every task of the family that the data has."""
    model = opened(setup)
    chosen = setup.places or data.places(model.recipe.evaluation.data or model.recipe.calibration.data)
    able = [task for task in model.family.tasks if any(task in place.tasks for place in chosen)]
    if not able:
        tasks = " or ".join(model.family.tasks)
        raise DataError(
            f"{', '.join(map(str, chosen))}: nothing to score {model.family.name} by", f"give data for {tasks}"
        )
    seed = model.recipe.evaluation.seed
    return {task: data.samples_from(chosen, task, setup.split, setup.samples, seed) for task in able}


def calibration_batches(setup: Setup, keys: Keys | None = None) -> list[dict[str, Tensor]]:
    """The model inputs that units are calibrated on (DataError when they are no longer those of the keys)."""
    model = opened(setup, keys.source if keys else "")
    samples = training_samples(model.recipe, setup.places)
    processor = load_processor(model.checkpoint.folder)
    if keys and calibration_digest(model.recipe, processor, model.family, samples) != keys.calibration:
        raise DataError("the calibration data changed while the study ran", CHANGED)
    return batches(processor, model.family, samples, model.recipe.calibration.batch)


def make_units(setup: Setup, units: Sequence[StudyUnit], keys: Keys | None = None) -> Spent:
    """Quantize units that are not there yet; the result is how many were made.

    keys: of the process that named the units; DataError when this one would compute other numbers.
    """
    start = time.monotonic(), time.process_time()
    model = opened(setup, keys.source if keys else "")
    if keys:
        keys.require_machine(model.device, model.checkpoint)
    with exact_math(model.recipe.calibration.seed):
        made = quantize(
            model.plan(()),
            model.checkpoint,
            store_of(setup),
            units,
            lambda: calibration_batches(setup, keys),
            model.device,
        )
    return Spent.since(start, made)


class Examiner:
    """A model whose weights are exchanged for those of a setting, and the exam.

    It is on the device whole where that fits, else its blocks come and go. One block of a setting is in memory.
    """

    def __init__(self, setup: Setup, keys: Keys | None = None) -> None:
        self._setup = setup
        self._model = model = opened(setup, keys.source if keys else "")
        self._device = model.device.torch_device
        checkpoint, family = model.checkpoint, model.family
        dtype = model.device.compute_dtype(stored_dtype(checkpoint))
        whole, room = whole_model(checkpoint.tensors, family, checkpoint.config), free_bytes(self._device)
        self._passing = not whole.batch_within(room, dtype.itemsize)
        self._batch = max(1, min(setup.batch, whole.batch_within(room, dtype.itemsize, self._passing)))
        self._setting = Setting((), lambda unit: store_of(setup).read(unit))
        self._stream = Stream(family, checkpoint.config, self._device, dtype)
        names = list(checkpoint.tensors)
        self._inside, _ = names_by_block(family, checkpoint.config, names) if self._passing else ({}, names)
        if self._passing:
            self._live = stream_blocks(self._stream, checkpoint.config, names, self._read)
        else:
            self._live = self._stream.load_all(names, checkpoint.read)
        self._changed: set[str] = set()
        self._processor = load_processor(checkpoint.folder)
        self._samples = exam_samples(setup)
        if keys and exam_digest(self._processor, family, self._samples) != keys.exam:
            raise DataError("the data that settings are scored on changed while the study ran", CHANGED)
        if setup.how == "forced":
            self._exam = exam.prepare(self._processor, family, self._samples, self._batch)
            self._exam.learn(self._live, self._device)

    def grade(self, setting: Setting) -> exam.ExamScores:
        """Scores of a setting; what it does not change has the checkpoint's own weights."""
        self._setting, before, self._changed = setting, self._changed, set()
        for block in setting.blocks:
            if block not in self._inside:  # those inside are read when a pass reaches them
                for name, tensor in setting.changes(block).items():
                    self._stream.put(name, tensor)
                    self._changed.add(name)
        setting.forget()
        for name in before - self._changed:
            self._stream.put(name, self._model.checkpoint.read(name))
        self._live.tie_weights()
        scores = self._exam.grade(self._live, self._device) if self._setup.how == "forced" else self._answers()
        setting.forget()
        return scores

    def _read(self, name: str) -> Tensor:
        """A tensor of the setting that is graded."""
        tensor = self._setting.tensor(name)
        return self._model.checkpoint.read(name) if tensor is None else tensor

    def _answers(self) -> exam.ExamScores:
        predictor = Predictor(self._live, self._processor, self._model.family, self._device, self._batch)
        scores: exam.ExamScores = {}
        for task, samples in self._samples.items():
            found = TASKS[task].score(predictor.answer(samples), samples)
            scores |= {f"{task} {metric}": sum(values) / len(values) for metric, values in found.items()}
        firsts = [scores[f"{task} {TASKS[task].METRICS[0]}"] for task in self._samples]
        return scores | {"score": sum(firsts) / len(firsts)}


@lru_cache(maxsize=1)
def examiner(setup: Setup, keys: Keys | None = None) -> Examiner:
    """One for each process."""
    return Examiner(setup, keys)


def score_point(setup: Setup, rules: Sequence[Rule], name: str, keys: Keys) -> Spent:
    """Scores of a setting whose units are there. name: its folder when it is quantized sequentially."""
    start, notes = (time.monotonic(), time.process_time()), list[str]()
    chosen = examiner(setup, keys)
    if setup.sequential and rules:
        setting = _in_sequence(setup, rules, name, keys, notes)
    else:
        setting = setting_of(setup, rules, keys, notes)
    return Spent.since(start, chosen.grade(setting), notes)


def setting_of(setup: Setup, rules: Sequence[Rule], keys: Keys, notes: list[str]) -> Setting:
    """A setting whose units are among those of the study; a damaged one is made again, with a note."""
    model, store = opened(setup, keys.source), store_of(setup)

    def read(unit: Unit) -> UnitResult:
        assert isinstance(unit, StudyUnit)
        try:
            return store.read(unit, model.device.torch_device)
        except WorkdirError as error:
            notes.append(f"{error.message}; it is made again")
            store.remove(unit)
            make_units(setup, [unit], keys)
            return store.read(unit, model.device.torch_device)

    return Setting(units_of(model.plan(rules), keys.model, keys.calibration), read)


def _in_sequence(setup: Setup, rules: Sequence[Rule], name: str, keys: Keys, notes: list[str]) -> Setting:
    """A setting that is quantized as an export does it, in a folder that a stopped run goes on from."""
    model = opened(setup, keys.source)
    keys.require_machine(model.device, model.checkpoint)
    plan = model.plan(rules)
    work = Workdir.open(setup.folder / "sequential" / name, {"point": name})
    work.drop_damaged(plan.units, lambda event: notes.append(event.message) if event.stage == "note" else None)
    needed = plan.needs_calibration and work.done(plan.units) < len(plan.units)
    inputs = calibration_batches(setup, keys) if needed else []
    with exact_math(model.recipe.calibration.seed):
        calibrate.run(plan, model.checkpoint, work, inputs, model.device, ignore)
    return Setting(plan.units, lambda unit: work.read(unit, model.device.torch_device))
