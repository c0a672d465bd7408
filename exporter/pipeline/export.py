"""Run an export from a recipe to an evaluated artifact: plan, calibrate and quantize, write, verify, evaluate."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from exporter import data
from exporter.artifact.output_folder import Destination, default_work
from exporter.artifact.verify import Verification
from exporter.device import Device
from exporter.evaluation import evaluate
from exporter.evaluation.report_file import Report
from exporter.events import Listener, notice, preparing
from exporter.model.checkpoint import Checkpoint
from exporter.model.inference.encoding import refuse_too_long
from exporter.model.processors.processor import load_processor
from exporter.pipeline.make_artifact import ExportJob, make_artifact, remove_work, verify_existing
from exporter.pipeline.measurement import default_store, measure
from exporter.pipeline.preparation import prepare, with_suitable_data
from exporter.pipeline.samples import ExportSamples, data_paths, read_samples
from exporter.pipeline.step_clock import Clock
from exporter.planning.plan import Plan
from exporter.planning.recipe import Recipe
from exporter.planning.steps import Step, refuse_shortage, step_warnings
from exporter.quantization import identity

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
    destination.refuse_inputs(data_paths(recipe, sources))
    destination.refuse_occupied(with_suitable_data(recipe).digest())
    with Clock(device) as clock, ExitStack() as reserved:
        with clock.step("plan"):
            plan, checkpoint = prepare(recipe, device, on_event=on_event, skip_evaluation=skip_evaluation)
            destination.refuse_places(checkpoint.folder, checkpoint.adapter.folder if checkpoint.adapter else None)
            destination.refuse_inputs(checkpoint.paths())
            checkpoint.start_hashing()
            refuse_shortage(plan.steps, device)
            clock.predicted = plan.steps
            reserved.enter_context(destination.reserved(on_event))
            samples = read_samples(plan, sources, skip_evaluation, on_event)
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


def _announce(plan: Plan, samples: ExportSamples, device: Device, skip_evaluation: bool, on_event: Listener) -> None:
    """Report the warnings of plan, steps and data before the work begins, one note per warning."""
    steps = [step for step in plan.steps if step.name != "check"]
    warnings = step_warnings(steps, device, skip_evaluation)
    for note in (*plan.warnings, *warnings, *data.notes(samples.calibration, samples.tested)):
        on_event(notice(note))


def _prepared(
    plan: Plan, checkpoint: Checkpoint, samples: ExportSamples, device: Device, on_event: Listener
) -> ExportJob:
    """Load the processor and compute the identity of the job; errors in either appear before the work begins."""
    processor = None
    if samples.calibration or samples.evaluation:
        with preparing(on_event, LIBRARIES):
            processor = load_processor(checkpoint.folder)  # runs while background threads hash the source
        refuse_too_long(processor, plan.family, samples.calibration, samples.evaluation)
    pictures = [trace.key for trace in samples.traces]
    inputs = identity.of_job(plan, checkpoint, processor, samples.calibration, pictures, device, on_event)
    return ExportJob(plan, checkpoint, processor, samples.calibration, samples.traces, inputs)
