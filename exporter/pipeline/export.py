"""The whole job on one page: plan, calibrate and quantize, write, verify, evaluate."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter import data
from exporter.artifact import artifact
from exporter.artifact.manifest import read_manifest
from exporter.artifact.output import Destination, default_work
from exporter.artifact.verify import Verified
from exporter.device import Device
from exporter.errors import DataError
from exporter.evaluation import evaluate
from exporter.evaluation.answers import Answerer, Store
from exporter.evaluation.backends import Servers, here, served
from exporter.evaluation.baseline import require_source
from exporter.evaluation.report_file import Report
from exporter.events import Event, Listener, ignore
from exporter.inference.encoding import refuse_too_long
from exporter.model.checkpoint import Checkpoint
from exporter.model.processor import load_processor
from exporter.pipeline.make_artifact import Prepared, made_already, make_artifact, remove_work
from exporter.pipeline.preparation import prepare, with_data_it_knows
from exporter.pipeline.step_clock import Clock
from exporter.planning.plan import Plan
from exporter.planning.recipe import Recipe
from exporter.planning.steps import Step, refuse_shortage, step_warnings
from exporter.quantization import identity
from exporter.tasks import TASKS, retrieval
from exporter.tasks.sample import Sample

LIBRARIES = "loading transformers and the processor"


@dataclass(frozen=True)
class Export:
    """What an export did. report: None when evaluation was skipped. measured: what each step took."""

    plan: Plan
    out: Path
    verified: Verified
    report: Report | None
    measured: tuple[Step, ...]


def export(
    recipe: Recipe,
    *,
    out: Path,
    device: Device,
    on_event: Listener,
    work: Path | None = None,
    sources: Sequence[data.SourceSpec] = (),
    overwrite: bool = False,
    skip_evaluation: bool = False,
) -> Export:
    """Run a recipe to a verified, evaluated artifact in `out`.

    work: where finished blocks are kept; by default beside `out`, and removed at the end.
    sources: where samples come from, instead of what the recipe says.
    The report is written but gates are not enforced here: call `evaluate.raise_unless_accepted`.
    """
    place = Destination(out, work or default_work(out), overwrite)
    place.refuse_places()
    place.refuse_occupied(with_data_it_knows(recipe).digest())
    with Clock(device) as clock, ExitStack() as reserved:
        with clock.step("plan"):
            plan, checkpoint = prepare(recipe, device, on_event=on_event)
            place.refuse_places(checkpoint.folder, checkpoint.adapter.folder if checkpoint.adapter else None)
            checkpoint.start_hashing()
            refuse_shortage(plan.steps, device)
            clock.predicted = plan.steps
            reserved.enter_context(place.reserved(on_event))
            samples = _samples(plan, sources, skip_evaluation, on_event)
            _announce(plan, samples, device, skip_evaluation, on_event)
        with clock.step("read data"):
            job = _prepared(plan, checkpoint, samples, device, on_event)
            place.refuse_occupied(plan.recipe.digest(), job.fingerprint)
        verified = made_already(job, place, device, on_event, clock)
        if verified is None:
            name = ", ".join(map(str, sources or data.places(plan.recipe.calibration.data)))
            verified = make_artifact(job, place, name, device, on_event, clock)
        report = None
        if not skip_evaluation:
            store = default_store(out)
            with clock.step("evaluate", f"the artifact is in {out}, verified, and answers so far in {store.folder}"):
                report = measure(
                    checkpoint, out, samples.evaluation, plan.recipe, device, on_event, store=store, sources=sources
                )
                evaluate.keep_report(out, report)
        if work is None:
            remove_work(place.work, job.fingerprint, on_event)
    return Export(plan, out, verified, report, clock.steps)


@dataclass(frozen=True)
class _Samples:
    """What to calibrate on, traces of it, and what to measure on."""

    calibration: list[Sample]
    traces: list[data.Trace]
    evaluation: dict[str, list[Sample]]

    @property
    def tested(self) -> list[Sample]:
        """What to measure on, of every task."""
        return [sample for samples in self.evaluation.values() for sample in samples]


def _announce(plan: Plan, samples: _Samples, device: Device, skip_evaluation: bool, on_event: Listener) -> None:
    """What the user should know before the work begins, one note each."""
    steps = [step for step in plan.steps if step.name != "check"]
    warnings = step_warnings(steps, device, skip_evaluation)
    for note in (*plan.warnings, *warnings, *data.notes(samples.calibration, samples.tested)):
        on_event(Event("note", 0, 0, note))


def _prepared(plan: Plan, checkpoint: Checkpoint, samples: _Samples, device: Device, on_event: Listener) -> Prepared:
    """The job with its processor and identity; what is wrong with either is said before the work."""
    processor = None
    if samples.calibration or samples.evaluation:
        on_event(Event("prepare", 0, 1, LIBRARIES))
        processor = load_processor(checkpoint.folder)  # while the source is hashed
        on_event(Event("prepare", 1, 1, LIBRARIES))
        refuse_too_long(processor, plan.family, samples.calibration, samples.evaluation)
    pictures = [trace.key for trace in samples.traces]
    inputs = identity.of_job(plan, checkpoint, processor, samples.calibration, pictures, device, on_event)
    return Prepared(plan, checkpoint, processor, samples.calibration, samples.traces, inputs)


def _samples(plan: Plan, sources: Sequence[data.SourceSpec], skip_evaluation: bool, on_event: Listener) -> _Samples:
    """The recipe's samples; DataError when calibration and evaluation share a picture."""
    on_event(Event("prepare", 0, 1, "reading samples"))
    evaluation = {} if skip_evaluation else evaluation_samples(plan, sources)
    calibration = calibration_samples(plan, sources)
    traces = data.traces(calibration)
    data.check_disjoint(traces, [sample for samples in evaluation.values() for sample in samples])
    on_event(Event("prepare", 1, 1, "reading samples"))
    return _Samples(calibration, traces, evaluation)


def refuse_calibrated(out: Path, evaluation: Mapping[str, Sequence[Sample]]) -> None:
    """DataError when the artifact in `out` was calibrated on a picture that `evaluation` shows, by its manifest."""
    kept = read_manifest(out).provenance.calibration.samples
    seen = [data.Trace.from_json(sample.model_dump(exclude_none=True)) for sample in kept]
    data.check_disjoint(seen, [sample for samples in evaluation.values() for sample in samples])


def calibration_samples(plan: Plan, sources: Sequence[data.SourceSpec]) -> list[Sample]:
    """The recipe's calibration set; empty when no method needs data."""
    return training_samples(plan.recipe, sources) if plan.needs_calibration else []


def training_samples(recipe: Recipe, sources: Sequence[data.SourceSpec]) -> list[Sample]:
    """What a recipe calibrates on, its tasks in turn (DataError when there is nothing)."""
    wanted = recipe.calibration
    share = -(-wanted.samples // len(wanted.tasks))
    chosen = sources or data.places(wanted.data)
    lists = [data.samples_from(chosen, task, "train", share, wanted.seed) for task in wanted.tasks]
    mixed = [sample for group in zip(*lists, strict=False) for sample in group][: wanted.samples]
    if not mixed:
        raise DataError(f"no calibration samples for {', '.join(wanted.tasks)}")
    return mixed


def evaluation_samples(plan: Plan, sources: Sequence[data.SourceSpec]) -> dict[str, list[Sample]]:
    """Test samples of every task that a gate names, else of every task the family can do.

    Captions of the drawings have one fixed wording, which no other model uses: they are calibrated on and never judged,
    and gates on captions are not measured then.
    """
    wanted = plan.recipe.evaluation
    tasks = tuple(dict.fromkeys(gate.task for gate in plan.recipe.gates)) or plan.family.tasks
    chosen = sources or tested_on(plan.recipe)
    if all(place.name == "drawings" for place in chosen):
        able = [task for task in plan.family.tasks if task != "captioning"]
        tasks = tuple(task for task in tasks if task in able) or tuple(able)
    try:
        return {task: data.samples_from(chosen, task, "test", wanted.samples, wanted.seed) for task in tasks}
    except DataError as error:
        asked = f"the recipe's gates ask for {' and '.join(tasks)}: give data for each, or change the gates of a copy"
        raise DataError(error.message, f"{error.hint}; {asked}" if error.hint else asked) from None


def tested_on(recipe: Recipe) -> tuple[data.SourceSpec, ...]:
    """The recipe's sources of test samples: those of calibration when it names no others."""
    return data.places(recipe.calibration.data if recipe.evaluation.data is None else recipe.evaluation.data)


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
    sources: Sequence[data.SourceSpec] = (),
    other_baseline: bool = False,
) -> Report:
    """Ask the source model and the artifact all samples, in this process or behind `servers`, and compare.

    other_baseline: whether `checkpoint` may be another model than the artifact's source; the report says so.
    """
    baseline = require_source(artifact.Artifact.open(out), checkpoint, other_baseline, on_event)
    before, after = models(checkpoint, out, recipe, device, servers, on_event)
    name = ", ".join(map(str, sources or tested_on(recipe)))
    method = {task: dict(TASKS[task].method()) for task in samples}
    about: dict[str, Any] = {
        "data": name,
        "samples": recipe.evaluation.samples,
        "seed": recipe.evaluation.seed,
        "scoring": method,
        "baseline": baseline.as_json(),
    }
    if found := retrieval.pool_sizes(samples.get(retrieval.NAME, [])):
        about["searched"] = found
    return evaluate.measure(before, after, samples, recipe, store, on_event, about)


def models(
    checkpoint: Checkpoint,
    out: Path,
    recipe: Recipe,
    device: Device,
    servers: Servers | None,
    on_event: Listener = ignore,
) -> tuple[Answerer, Answerer]:
    """Source and artifact, ready to be asked by the same back end."""
    finished = artifact.Artifact.open(out, device.torch_device)
    if servers:
        return served(checkpoint, finished, servers)
    return here(checkpoint, finished, device, recipe.evaluation.batch, on_event)


def default_store(out: Path) -> Store:
    """Where answers are kept when the user names no folder: beside the artifact, shared by its neighbors."""
    return Store(out.absolute().parent / ".mmq-answers")
