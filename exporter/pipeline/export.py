"""Run an export from a recipe to an evaluated artifact: plan, calibrate and quantize, write, verify, evaluate."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter import data
from exporter.artifact import artifact
from exporter.artifact.manifest import read_manifest
from exporter.artifact.output import Destination, default_work
from exporter.artifact.verify import Verification
from exporter.device import Device
from exporter.errors import DataError
from exporter.evaluation import evaluate
from exporter.evaluation.answers import Answerer, Store
from exporter.evaluation.backends import Servers, local_answerers, served_answerers
from exporter.evaluation.baseline import require_source
from exporter.evaluation.report_file import Report
from exporter.events import Event, Listener, ignore
from exporter.inference.encoding import refuse_too_long
from exporter.model.checkpoint import Checkpoint
from exporter.model.processor import load_processor
from exporter.pipeline.make_artifact import ExportJob, make_artifact, remove_work, verify_existing
from exporter.pipeline.preparation import prepare, with_suitable_data
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
    """Result of an export. report: None when evaluation was skipped. measured: memory and seconds of each step."""

    plan: Plan
    out: Path
    verified: Verification
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
    """Export a recipe to a verified and evaluated artifact in `out`.

    work: folder for finished blocks; the default is beside `out` and is removed at the end.
    sources: data sources that replace those of the recipe.
    The function writes the report but does not enforce the gates: call `evaluate.raise_unless_accepted`.
    """
    destination = Destination(out, work or default_work(out), overwrite)
    destination.refuse_places()
    destination.refuse_occupied(with_suitable_data(recipe).digest())
    with Clock(device) as clock, ExitStack() as reserved:
        with clock.step("plan"):
            plan, checkpoint = prepare(recipe, device, on_event=on_event)
            destination.refuse_places(checkpoint.folder, checkpoint.adapter.folder if checkpoint.adapter else None)
            checkpoint.start_hashing()
            refuse_shortage(plan.steps, device)
            clock.predicted = plan.steps
            reserved.enter_context(destination.reserved(on_event))
            samples = _samples(plan, sources, skip_evaluation, on_event)
            _announce(plan, samples, device, skip_evaluation, on_event)
        with clock.step("read data"):
            job = _prepared(plan, checkpoint, samples, device, on_event)
            destination.refuse_occupied(plan.recipe.digest(), job.fingerprint)
        verified = verify_existing(job, destination, device, on_event, clock)
        if verified is None:
            name = ", ".join(map(str, sources or data.places(plan.recipe.calibration.data)))
            verified = make_artifact(job, destination, name, device, on_event, clock)
        report = None
        if not skip_evaluation:
            store = default_store(out)
            with clock.step("evaluate", f"the verified artifact is in {out}; answers so far are in {store.folder}"):
                report = measure(
                    checkpoint, out, samples.evaluation, plan.recipe, device, on_event, store=store, sources=sources
                )
                evaluate.store_report(out, report)
        if work is None:
            remove_work(destination.work, job.fingerprint, on_event)
    return Export(plan, out, verified, report, clock.steps)


@dataclass(frozen=True)
class _Samples:
    """Calibration samples, their traces, and the test samples of each task."""

    calibration: list[Sample]
    traces: list[data.Trace]
    evaluation: dict[str, list[Sample]]

    @property
    def tested(self) -> list[Sample]:
        """Test samples of all tasks."""
        return [sample for samples in self.evaluation.values() for sample in samples]


def _announce(plan: Plan, samples: _Samples, device: Device, skip_evaluation: bool, on_event: Listener) -> None:
    """Report the warnings of plan, steps and data before the work begins, one note per warning."""
    steps = [step for step in plan.steps if step.name != "check"]
    warnings = step_warnings(steps, device, skip_evaluation)
    for note in (*plan.warnings, *warnings, *data.notes(samples.calibration, samples.tested)):
        on_event(Event("note", 0, 0, note))


def _prepared(plan: Plan, checkpoint: Checkpoint, samples: _Samples, device: Device, on_event: Listener) -> ExportJob:
    """Load the processor and compute the identity of the job; errors in either appear before the work begins."""
    processor = None
    if samples.calibration or samples.evaluation:
        on_event(Event("prepare", 0, 1, LIBRARIES))
        processor = load_processor(checkpoint.folder)  # runs while background threads hash the source
        on_event(Event("prepare", 1, 1, LIBRARIES))
        refuse_too_long(processor, plan.family, samples.calibration, samples.evaluation)
    pictures = [trace.key for trace in samples.traces]
    inputs = identity.of_job(plan, checkpoint, processor, samples.calibration, pictures, device, on_event)
    return ExportJob(plan, checkpoint, processor, samples.calibration, samples.traces, inputs)


def _samples(plan: Plan, sources: Sequence[data.SourceSpec], skip_evaluation: bool, on_event: Listener) -> _Samples:
    """Read the recipe's samples; DataError when calibration and evaluation share a picture."""
    on_event(Event("prepare", 0, 1, "reading samples"))
    evaluation = {} if skip_evaluation else evaluation_samples(plan, sources)
    calibration = calibration_samples(plan, sources)
    traces = data.traces(calibration)
    data.check_disjoint(traces, [sample for samples in evaluation.values() for sample in samples])
    on_event(Event("prepare", 1, 1, "reading samples"))
    return _Samples(calibration, traces, evaluation)


def refuse_calibration_pictures(out: Path, evaluation: Mapping[str, Sequence[Sample]]) -> None:
    """DataError when `evaluation` has a picture that the manifest in `out` lists as a calibration picture."""
    recorded = read_manifest(out).provenance.calibration.samples
    traces = [data.Trace.from_json(sample.model_dump(exclude_none=True)) for sample in recorded]
    data.check_disjoint(traces, [sample for samples in evaluation.values() for sample in samples])


def calibration_samples(plan: Plan, sources: Sequence[data.SourceSpec]) -> list[Sample]:
    """Calibration samples of the plan's recipe; empty when no method needs data."""
    return training_samples(plan.recipe, sources) if plan.needs_calibration else []


def training_samples(recipe: Recipe, sources: Sequence[data.SourceSpec]) -> list[Sample]:
    """Calibration samples of a recipe, alternating between its tasks (DataError when there are none)."""
    settings = recipe.calibration
    share = -(-settings.samples // len(settings.tasks))
    specs = sources or data.places(settings.data)
    lists = [data.samples_from(specs, task, "train", share, settings.seed) for task in settings.tasks]
    mixed = [sample for group in zip(*lists, strict=False) for sample in group][: settings.samples]
    if not mixed:
        raise DataError(f"the data has no calibration samples for {', '.join(settings.tasks)}")
    return mixed


def evaluation_samples(plan: Plan, sources: Sequence[data.SourceSpec]) -> dict[str, list[Sample]]:
    """Test samples of each task that a gate names; without gates, of each task of the family.

    When all data are drawings, captioning is left out and its gates are not measured: captions of the drawings have
    one fixed wording that no model but the embedded ones produces. Calibration still uses them.
    """
    settings = plan.recipe.evaluation
    tasks = tuple(dict.fromkeys(gate.task for gate in plan.recipe.gates)) or plan.family.tasks
    specs = sources or test_sources(plan.recipe)
    if all(spec.name == "drawings" for spec in specs):
        measurable = [task for task in plan.family.tasks if task != "captioning"]
        tasks = tuple(task for task in tasks if task in measurable) or tuple(measurable)
    try:
        return {task: data.samples_from(specs, task, "test", settings.samples, settings.seed) for task in tasks}
    except DataError as error:
        hint = (
            f"the recipe's gates need samples of {' and '.join(tasks)}: give data for each task, or change the gates "
            "in a copy of the recipe"
        )
        raise DataError(error.message, f"{error.hint}; {hint}" if error.hint else hint) from None


def test_sources(recipe: Recipe) -> tuple[data.SourceSpec, ...]:
    """Sources of test samples: `evaluation.data` of the recipe, else its `calibration.data`."""
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
    """Run the baseline and the artifact on all samples, in this process or behind `servers`, and compare the answers.

    other_baseline: whether `checkpoint` may be another model than the artifact's source; the report records this.
    """
    baseline = require_source(artifact.Artifact.open(out), checkpoint, other_baseline, on_event)
    before, after = answerers(checkpoint, out, recipe, device, servers, on_event)
    name = ", ".join(map(str, sources or test_sources(recipe)))
    method = {task: dict(TASKS[task].method()) for task in samples}
    about: dict[str, Any] = {
        "data": name,
        "samples": recipe.evaluation.samples,
        "seed": recipe.evaluation.seed,
        "scoring": method,
        "baseline": baseline.as_json(),
    }
    if pool := retrieval.searched(samples.get(retrieval.NAME, [])):
        about["searched"] = pool
    return evaluate.measure(before, after, samples, recipe, store, on_event, about)


def answerers(
    checkpoint: Checkpoint,
    out: Path,
    recipe: Recipe,
    device: Device,
    servers: Servers | None,
    on_event: Listener = ignore,
) -> tuple[Answerer, Answerer]:
    """Answerers of source and artifact, both with the same back end."""
    opened = artifact.Artifact.open(out, device.torch_device)
    if servers:
        return served_answerers(checkpoint, opened, servers)
    return local_answerers(checkpoint, opened, device, recipe.evaluation.batch, on_event)


def default_store(out: Path) -> Store:
    """Default folder of the stored answers: beside the artifact, shared by all artifacts of the same parent folder."""
    return Store(out.absolute().parent / ".mmq-answers")
