"""Tasks of a study's workers: quantize units and score settings, with the model and data open between tasks."""

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
from exporter.data.tasks import TASKS, measured
from exporter.data.tasks.sample import Sample
from exporter.device import Device, choose, exact_math, free_bytes
from exporter.errors import DataError
from exporter.evaluation.cluster.packed_samples import packed_groups
from exporter.events import ignore
from exporter.model.checkpoint import Checkpoint
from exporter.model.families import Family
from exporter.model.inference.block_streaming import names_by_block, stream_blocks
from exporter.model.inference.predict import Predictor, batches
from exporter.model.processors.check import check_libraries
from exporter.model.processors.processor import load_processor
from exporter.model.source import open_source
from exporter.model.stream import Stream
from exporter.pipeline.preparation import with_suitable_data
from exporter.pipeline.samples import training_samples
from exporter.planning.plan import Plan, Unit, make_plan
from exporter.planning.prompts import by_recipe
from exporter.planning.recipe import Recipe, Rule
from exporter.planning.whole_model import whole_model
from exporter.quantization import calibrate
from exporter.quantization.workdir import DamagedUnitError, UnitResult, Workdir
from exporter.study import exam
from exporter.study.keys import Keys, calibration_digest, exam_digest, stored_dtype
from exporter.study.setting_tensors import SettingTensors
from exporter.study.units import StudyUnit, UnitStore, quantize, units_of

CALIBRATION = "calibration"  # name of the calibration samples in a packed file, beside the tasks
CHANGED = "wait until other programs stop writing to it, then run the same command again"
How = Literal["forced", "generated"]


@dataclass(frozen=True)
class Setup:
    """Model, data and options of a study; plain data, so that it can be sent to workers.

    recipe: JSON of a recipe, for its model, data and format; its rules are ignored. places: data sources, instead of
    the recipe's. split, samples: split of the exam, and samples per task. how: `forced` scores references in one
    forward pass, `generated` scores answers by the tasks' metrics. table: base name of the files of results.
    packed: file of all samples, on a machine without the data sources.
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
    packed: Path | None = None


@dataclass(frozen=True)
class StudyModel:
    """A setup's model, with only the headers of its files read."""

    recipe: Recipe
    checkpoint: Checkpoint
    family: Family
    device: Device

    def plan(self, rules: Sequence[Rule]) -> Plan:
        """The plan of a setting; without rules, everything stays in 16 bits. Raises PlanError if it does not fit.

        Linears whose inputs groups do not divide get one scale per row.
        """
        full_precision_rules = (Rule(component=self.family.components[0].name, bits=16),)
        recipe = self.recipe.model_copy(
            update={"quantize": tuple(rule.or_rows() for rule in rules) or full_precision_rules}
        )
        return make_plan(recipe, self.checkpoint, self.family, self.device)

    def fitted(self, rules: Sequence[Rule]) -> tuple[Rule, ...]:
        """The rules as a recipe needs them for this plan: with `else: row` if groups do not divide some inputs."""
        return tuple(rule.or_rows() for rule in rules) if self.plan(rules).fallbacks else tuple(rules)


@dataclass(frozen=True)
class TaskResult:
    """Result of a task, and its wall and processor seconds.

    process: host and id of the worker process. process_seconds: its processor seconds since its start.
    notes: messages for the user.
    """

    seconds: float
    cpu_seconds: float
    process: str
    process_seconds: float
    result: Any
    notes: tuple[str, ...] = ()

    @classmethod
    def since(cls, start: tuple[float, float], result: Any, notes: Sequence[str] = ()) -> "TaskResult":
        """The result with the seconds since `start`, a pair of wall time and processor time."""
        cpu_seconds = time.process_time()
        process = f"{platform.node()}:{os.getpid()}"
        return cls(time.monotonic() - start[0], cpu_seconds - start[1], process, cpu_seconds, result, tuple(notes))


@lru_cache(maxsize=2)
def open_model(setup: Setup, source: str = "") -> StudyModel:
    """Open the model of a setup. source: `Keys.source`, so that a persistent process reopens a changed model."""
    recipe = with_suitable_data(Recipe.model_validate_json(setup.recipe))
    checkpoint, family = open_source(
        recipe.model.repo, recipe.model.revision, dtype=recipe.model.dtype, adapter=recipe.model.adapter
    )
    check_libraries(checkpoint, family)
    return StudyModel(recipe, checkpoint, by_recipe(family, recipe), choose(setup.device))


def store_of(setup: Setup) -> UnitStore:
    """The store of the setup's units."""
    return UnitStore(setup.folder / "units")


def exam_samples(setup: Setup) -> dict[str, list[Sample]]:
    """Samples of the exam by task, for every task of the study that the data has.

    Raises DataError if the data has none of them.
    """
    if setup.packed:
        return {name: samples for name, samples in packed_groups(setup.packed).items() if name != CALIBRATION}
    model = open_model(setup)
    sources = setup.places or data.places(model.recipe.evaluation.data or model.recipe.calibration.data)
    tasks = [task for task in model.recipe.calibration.tasks if any(task in place.tasks for place in sources)]
    if not tasks:
        task_names = " or ".join(model.family.tasks)
        raise DataError(
            f"{', '.join(map(str, sources))}: no data for a task of family {model.family.name}",
            f"pass data for {task_names}",
        )
    seed = model.recipe.evaluation.seed
    return {task: data.samples_from(sources, task, setup.split, setup.samples, seed) for task in tasks}


def study_training(setup: Setup, model: StudyModel) -> list[Sample]:
    """Calibration samples of a study."""
    packed = packed_groups(setup.packed)[CALIBRATION] if setup.packed else None
    return training_samples(model.recipe, setup.places) if packed is None else packed


def calibration_batches(setup: Setup, keys: Keys | None = None) -> list[dict[str, Tensor]]:
    """Model inputs of the calibration samples; DataError if the data changed since `keys` were computed."""
    model = open_model(setup, keys.source if keys else "")
    samples = study_training(setup, model)
    processor = load_processor(model.checkpoint.folder)
    if keys and calibration_digest(model.recipe, processor, model.family, samples) != keys.calibration:
        raise DataError("the calibration data changed while the study ran", CHANGED)
    return batches(processor, model.family, samples, model.recipe.calibration.batch)


def make_units(setup: Setup, units: Sequence[StudyUnit], keys: Keys | None = None) -> TaskResult:
    """Quantize units that the store lacks; the result is their number.

    keys: from the process that started the study. Raises DataError if this process would compute other numbers.
    """
    start = time.monotonic(), time.process_time()
    model = open_model(setup, keys.source if keys else "")
    if keys:
        keys.require_machine(model.device, model.checkpoint)
    with exact_math(model.recipe.calibration.seed):
        count = quantize(
            model.plan(()),
            model.checkpoint,
            store_of(setup),
            units,
            lambda: calibration_batches(setup, keys),
            model.device,
        )
    return TaskResult.since(start, count)


class Examiner:
    """The exam, and a model whose weights are replaced by those of a setting.

    The model is on the device as a whole if it fits, else block by block. At most one block of a setting is in memory.
    """

    def __init__(self, setup: Setup, keys: Keys | None = None) -> None:
        self._setup = setup
        self._model = model = open_model(setup, keys.source if keys else "")
        self._device = model.device.torch_device
        checkpoint, family = model.checkpoint, model.family
        dtype = model.device.compute_dtype(stored_dtype(checkpoint))
        whole_size, free = whole_model(checkpoint.tensors, family, checkpoint.config), free_bytes(self._device)
        self._passing = not whole_size.batch_within(free, dtype.itemsize)
        self._batch = max(1, min(setup.batch, whole_size.batch_within(free, dtype.itemsize, self._passing)))
        self._setting = SettingTensors((), lambda unit: store_of(setup).read(unit))
        self._stream = Stream(family, checkpoint.config, self._device, dtype.torch)
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

    def grade(self, setting: SettingTensors) -> exam.ExamScores:
        """Scores of a setting; tensors that it does not change have the checkpoint's weights."""
        self._setting, previously_changed, self._changed = setting, self._changed, set()
        for block in setting.blocks:
            if block not in self._inside:  # a forward pass reads blocks in `_inside` itself
                for name, tensor in setting.changes(block).items():
                    self._stream.put(name, tensor)
                    self._changed.add(name)
        setting.forget()
        for name in previously_changed - self._changed:
            self._stream.put(name, self._model.checkpoint.read(name))
        self._live.tie_weights()
        scores = self._exam.grade(self._live, self._device) if self._setup.how == "forced" else self._answers()
        setting.forget()
        return scores

    def _read(self, name: str) -> Tensor:
        """A tensor of the current setting."""
        tensor = self._setting.tensor(name)
        return self._model.checkpoint.read(name) if tensor is None else tensor

    def _answers(self) -> exam.ExamScores:
        predictor = Predictor(self._live, self._processor, self._model.family, self._device, self._batch)
        scores: exam.ExamScores = {}
        firsts = []
        for task, samples in self._samples.items():
            values = TASKS[task].score(predictor.answer(samples), samples)
            scores |= {f"{task} {m}": sum(values[m]) / len(samples) for m in measured(task, samples)}
            firsts.append(values[measured(task, samples)[0]])
        return scores | exam.overall(firsts)


@lru_cache(maxsize=1)
def examiner(setup: Setup, keys: Keys | None = None) -> Examiner:
    """The process's examiner."""
    return Examiner(setup, keys)


def score_setting(setup: Setup, rules: Sequence[Rule], name: str, keys: Keys) -> TaskResult:
    """Scores of a setting whose units are quantized. name: its folder for sequential quantization."""
    start, notes = (time.monotonic(), time.process_time()), list[str]()
    model_examiner = examiner(setup, keys)
    if setup.sequential and rules:
        setting = _in_sequence(setup, rules, name, keys, notes)
    else:
        setting = setting_of(setup, rules, keys, notes)
    return TaskResult.since(start, model_examiner.grade(setting), notes)


def setting_of(setup: Setup, rules: Sequence[Rule], keys: Keys, notes: list[str]) -> SettingTensors:
    """A setting from the study's units; a damaged unit is quantized again, with a note."""
    model, store = open_model(setup, keys.source), store_of(setup)

    def read(unit: Unit) -> UnitResult:
        assert isinstance(unit, StudyUnit)
        try:
            return store.read(unit, model.device.torch_device)
        except DamagedUnitError as error:
            notes.append(f"{error.message}; it is quantized again")
            store.remove(unit)
            make_units(setup, [unit], keys)
            return store.read(unit, model.device.torch_device)

    return SettingTensors(units_of(model.plan(rules), keys.model, keys.calibration), read)


def _in_sequence(setup: Setup, rules: Sequence[Rule], name: str, keys: Keys, notes: list[str]) -> SettingTensors:
    """A setting quantized as an export does, in a folder from which a stopped run resumes."""
    model = open_model(setup, keys.source)
    keys.require_machine(model.device, model.checkpoint)
    plan = model.plan(rules)
    work = Workdir.open(setup.folder / "sequential" / name, {"point": name})
    work.drop_damaged(plan.units, lambda event: notes.append(event.message) if event.stage == "note" else None)
    needed = plan.needs_calibration and work.done(plan.units) < len(plan.units)
    inputs = calibration_batches(setup, keys) if needed else []
    with exact_math(model.recipe.calibration.seed):
        calibrate.run(plan, model.checkpoint, work, inputs, model.device, ignore)
    return SettingTensors(plan.units, lambda unit: work.read(unit, model.device.torch_device))
