"""The whole job on one page: plan, calibrate and quantize, write, verify, evaluate."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from exporter import artifact, calibrate, data, evaluate
from exporter.answers import Model, Store
from exporter.backends import Servers, here, load_processor, served
from exporter.checkpoint import Checkpoint
from exporter.demo import MODELS
from exporter.device import Device, exact_math, peak_bytes, reset_peak, synchronize
from exporter.errors import DataError, PlanError
from exporter.events import Event, ignore
from exporter.manifest import read_manifest
from exporter.methods import METHODS
from exporter.plan import Plan, make_plan
from exporter.predict import batches
from exporter.recipe import Recipe
from exporter.source import narrowed, open_source
from exporter.steps import refuse_shortage, step_warnings
from exporter.tasks import TASKS, retrieval
from exporter.tasks.sample import Sample
from exporter.verify import Verified, verify
from exporter.workdir import Workdir

Listener = Callable[[Event], None]

# Packed weights decompress to the 16 bits of their scales, and transformers multiplies no two dtypes.
READ_IN_16_BITS = (
    "the source's float32 tensors are read as bfloat16 (`dtype: float16` in the recipe's model changes it)"
)


@dataclass(frozen=True)
class Export:
    """What an export did. report: None when evaluation was skipped. seconds: wall time of each step."""

    plan: Plan
    out: Path
    verified: Verified
    report: evaluate.Report | None
    seconds: Mapping[str, float]
    device_peak: int
    host_peak: int


def prepare(recipe: Recipe, device: Device, headers_only: bool = False) -> tuple[Plan, Checkpoint]:
    """Open the model's headers and plan; every user error in recipe, model and device is raised here.

    headers_only: enough to plan; the weights of a hub model are not downloaded.
    """
    recipe = with_data_it_knows(recipe)
    model = recipe.model
    checkpoint, family = open_source(model.repo, model.revision, headers_only, model.dtype)
    foreign = recipe.foreign_tasks(family.tasks) if recipe.model.family == family.name else []
    if foreign:
        raise PlanError("\n".join([f"recipe '{recipe.name}' asks for what {checkpoint.origin} cannot do:", *foreign]))
    plan = make_plan(recipe, checkpoint, family, device)
    if any(row.decision == "packed" and row.tensor.dtype == torch.float32 for row in plan.rows):
        checkpoint = narrowed(checkpoint, "bfloat16")
        plan = make_plan(recipe, checkpoint, family, device)
        plan = replace(plan, warnings=(*plan.warnings, READ_IN_16_BITS))
    return plan, checkpoint


def with_data_it_knows(recipe: Recipe) -> Recipe:
    """The recipe, with the drawings in plain words for every model but the embedded ones.

    The made-up names of `demo` mean nothing to other models. What those would say of a drawing in their own words
    cannot be held against a fixed text either, so gates on captions need the user's data and are left out.
    """
    if recipe.calibration.data != ("demo",) or recipe.evaluation.data is not None or recipe.model.repo in MODELS:
        return recipe
    gates = tuple(gate for gate in recipe.gates if gate.task != "captioning")
    changed = recipe.adjusted(calibration={"data": ("drawings",)}, evaluation={"data": ("drawings",)})
    return changed.model_copy(update={"gates": gates})


def export(
    recipe: Recipe,
    *,
    out: Path,
    device: Device,
    on_event: Listener,
    work: Path | None = None,
    sources: Sequence[data.Place] = (),
    overwrite: bool = False,
    skip_evaluation: bool = False,
) -> Export:
    """Run a recipe to a verified, evaluated artifact in `out`.

    work: where finished blocks are kept; by default beside `out`, and removed at the end.
    sources: where samples come from, instead of what the recipe says.
    The report is written but gates are not enforced here: call `evaluate.raise_if_failed`.
    """
    clock = Clock(device)
    artifact.refuse_occupied(out, overwrite, work or default_work(out))
    plan, checkpoint = prepare(recipe, device)
    checkpoint.start_hashing()
    refuse_shortage(plan.steps, device)
    calibration, evaluation, seen = _samples(plan, sources, skip_evaluation)
    steps = [step for step in plan.steps if step.name != "check"]
    for note in (*plan.warnings, *step_warnings(steps, device, skip_evaluation), *data.notes(calibration)):
        on_event(Event("note", 0, 0, note))
    processor = load_processor(checkpoint.folder) if calibration or evaluation else None  # errors before the work
    clock.lap("plan")

    provenance = _provenance(plan, seen, device, sources)
    workdir = Workdir.open(work or default_work(out), _identity(plan, checkpoint, provenance))
    reset_peak(device)
    with exact_math(recipe.calibration.seed):
        inputs = _batches(plan, processor, calibration, workdir)
        clock.lap("read data")
        calibrate.run(plan, checkpoint, workdir, inputs, device, on_event)
    synchronize(device)
    clock.lap("quantize")
    verified: list[Verified] = []

    def check(folder: Path) -> None:
        clock.lap("write")
        verified.append(verify(folder, device, on_event))
        clock.lap("verify")

    peak, _ = peak_bytes(device)
    artifact.write(plan, checkpoint, workdir, out, provenance, on_event, device.torch_device, check)
    report = None
    if not skip_evaluation:
        report = measure(
            checkpoint, out, evaluation, plan.recipe, device, on_event, store=default_store(out), sources=sources
        )
        evaluate.write_report(out, report)
        clock.lap("evaluate")
    if work is None:
        shutil.rmtree(workdir.path)
    return Export(plan, out, verified[0], report, clock.laps, peak, peak_bytes(device)[1])


def _samples(
    plan: Plan, sources: Sequence[data.Place], skip_evaluation: bool
) -> tuple[list[Sample], dict[str, list[Sample]], list[data.Trace]]:
    """What to calibrate on, what to measure on, and traces of the former; DataError when they share a picture."""
    evaluation = {} if skip_evaluation else evaluation_samples(plan, sources)
    calibration = calibration_samples(plan, sources)
    seen = data.traces(calibration)
    data.check_disjoint(seen, [sample for samples in evaluation.values() for sample in samples])
    return calibration, evaluation, seen


def refuse_calibrated(out: Path, evaluation: Mapping[str, Sequence[Sample]]) -> None:
    """DataError when the artifact in `out` was calibrated on a picture that `evaluation` shows, by its manifest."""
    kept = read_manifest(out).provenance.calibration.samples
    seen = [data.Trace.from_json(sample.model_dump(exclude_none=True)) for sample in kept]
    data.check_disjoint(seen, [sample for samples in evaluation.values() for sample in samples])


class Clock:
    """Wall time of named steps."""

    def __init__(self, device: Device) -> None:
        self._last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """The time since the last lap belongs to `name`."""
        now = time.monotonic()
        self.laps[name] = now - self._last
        self._last = now


def default_work(out: Path) -> Path:
    """Where finished blocks are kept when the user names no folder: beside the artifact."""
    return out.with_name(f"{out.name}.work")


def calibration_samples(plan: Plan, sources: Sequence[data.Place]) -> list[Sample]:
    """The recipe's calibration set; empty when no method needs data."""
    return training_samples(plan.recipe, sources) if plan.needs_calibration else []


def training_samples(recipe: Recipe, sources: Sequence[data.Place]) -> list[Sample]:
    """What a recipe calibrates on, its tasks in turn (DataError when there is nothing)."""
    wanted = recipe.calibration
    share = -(-wanted.samples // len(wanted.tasks))
    chosen = sources or data.places(wanted.data)
    lists = [data.samples_from(chosen, task, "train", share, wanted.seed) for task in wanted.tasks]
    mixed = [sample for group in zip(*lists, strict=False) for sample in group][: wanted.samples]
    if not mixed:
        raise DataError(f"no calibration samples for {', '.join(wanted.tasks)}")
    return mixed


def evaluation_samples(plan: Plan, sources: Sequence[data.Place]) -> dict[str, list[Sample]]:
    """Test samples of every task that a gate names, else of every task the family can do."""
    wanted = plan.recipe.evaluation
    for gate in plan.recipe.gates:
        TASKS[gate.task].require(gate.metric)
    tasks = tuple(dict.fromkeys(gate.task for gate in plan.recipe.gates)) or plan.family.tasks
    chosen = sources or tested_on(plan.recipe)
    try:
        return {task: data.samples_from(chosen, task, "test", wanted.samples, wanted.seed) for task in tasks}
    except DataError as error:
        asked = f"the recipe's gates ask for {' and '.join(tasks)}: give data for each, or change the gates of a copy"
        raise DataError(error.message, f"{error.hint}; {asked}" if error.hint else asked) from None


def tested_on(recipe: Recipe) -> tuple[data.Place, ...]:
    """The recipe's sources of test samples: those of calibration when it names no others."""
    return data.places(recipe.calibration.data if recipe.evaluation.data is None else recipe.evaluation.data)


def _batches(plan: Plan, processor: Any, samples: Sequence[Sample], workdir: Workdir) -> list[dict[str, torch.Tensor]]:
    """Calibration batches; none when every unit that needs them is finished."""
    rest = plan.units[workdir.done(plan.units) :]
    if not any(unit.needs_statistics for unit in rest):
        return []
    return batches(processor, plan.family, samples, plan.recipe.calibration.batch)


def _identity(plan: Plan, checkpoint: Checkpoint, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that changes the numbers; format, gates, device and paths are not in it."""
    methods = sorted({row.rule.method for row in plan.rows if row.rule})
    calibration = provenance["calibration"]
    return {
        "model weights": checkpoint.digest(),
        "quantize": [rule.model_dump(mode="json", exclude={"store"}) for rule in plan.recipe.quantize],
        "calibration": {
            **calibration,
            "samples": [{"id": s["id"], "image": s["image"]} for s in calibration["samples"]],
        },
        "method versions": {name: METHODS[name].VERSION for name in methods} | {"calibrate": calibrate.VERSION},
    }


def _provenance(
    plan: Plan, calibration: Sequence[data.Trace], device: Device, sources: Sequence[data.Place]
) -> dict[str, Any]:
    wanted = plan.recipe.calibration
    return {
        "calibration": {
            "data": ", ".join(map(str, sources or data.places(wanted.data))),
            "seed": wanted.seed,
            "batch": wanted.batch,
            "vision_weight": wanted.vision_weight,
            "samples": [trace.as_json() for trace in calibration],
        },
        "device": device.name,
    }


def measure(
    checkpoint: Checkpoint,
    out: Path,
    samples: Mapping[str, Sequence[Sample]],
    recipe: Recipe,
    device: Device,
    on_event: Listener,
    *,
    store: Store | None = None,
    servers: Servers | None = None,
    sources: Sequence[data.Place] = (),
) -> evaluate.Report:
    """Ask the source model and the artifact all samples, in this process or behind `servers`, and compare."""
    before, after = models(checkpoint, out, recipe, device, servers, on_event)
    name = ", ".join(map(str, sources or tested_on(recipe)))
    method = {task: dict(TASKS[task].method()) for task in samples}
    about: dict[str, Any] = {
        "data": name,
        "samples": recipe.evaluation.samples,
        "seed": recipe.evaluation.seed,
        "scoring": method,
    }
    if found := retrieval.searched(samples.get(retrieval.NAME, [])):
        about["searched"] = found
    return evaluate.measure(before, after, samples, recipe, store, on_event, about)


def models(
    checkpoint: Checkpoint,
    out: Path,
    recipe: Recipe,
    device: Device,
    servers: Servers | None,
    on_event: Listener = ignore,
) -> tuple[Model, Model]:
    """Source and artifact, ready to be asked by the same back end."""
    finished = artifact.Artifact.open(out, device.torch_device)
    if servers:
        return served(checkpoint, finished, servers)
    return here(checkpoint, finished, device, recipe.evaluation.batch, on_event)


def default_store(out: Path) -> Store:
    """Where answers are kept when the user names no folder: beside the artifact, shared by its neighbors."""
    return Store(out.absolute().parent / ".mmq-answers")
