"""The evaluation of an existing artifact beside its full-precision model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from exporter.artifact.artifact import Artifact
from exporter.artifact.output_folder import reading
from exporter.data import SourceSpec
from exporter.data.tasks.sample import Sample
from exporter.device import Device
from exporter.evaluation.answers import Store, collect_answers
from exporter.evaluation.backends import Servers
from exporter.evaluation.baseline import require_source
from exporter.evaluation.cluster.ray_cluster import RayCluster
from exporter.evaluation.evaluate import picture_keys, store_report
from exporter.evaluation.report_file import Report
from exporter.events import Listener, notice
from exporter.model.checkpoint import Checkpoint
from exporter.out_of_memory import explain_shortage
from exporter.pipeline.measurement import answerers, measure
from exporter.pipeline.preparation import prepare
from exporter.pipeline.samples import evaluation_samples, refuse_calibration_pictures
from exporter.planning.recipe import Recipe
from exporter.planning.steps import advice


@dataclass(frozen=True)
class Reevaluation:
    """One evaluation of an artifact in a folder.

    recipe: the artifact's own, with the values that the user changes. store: None stores no answers. servers: None
    computes the answers in this process, or on the machines of `cluster`. other_baseline: `recipe` may name another
    model than the artifact's source.
    """

    artifact: Path
    recipe: Recipe
    device: Device
    on_event: Listener
    sources: Sequence[SourceSpec] = ()
    store: Store | None = None
    servers: Servers | None = None
    other_baseline: bool = False
    cluster: RayCluster | None = None

    def measure(self) -> Report:
        """The report of both models. It replaces the artifact's report, unless that one is on more samples."""
        with self._opened() as (checkpoint, recipe, samples):
            report = measure(
                checkpoint,
                self.artifact,
                samples,
                recipe,
                self.device,
                self.on_event,
                store=self.store,
                servers=self.servers,
                cluster=self.cluster,
                sources=self.sources,
                other_baseline=self.other_baseline,
            )
            if not store_report(self.artifact, report):
                note = "the artifact keeps its report, which is on more samples than these"
                self.on_event(notice(note))
        return report

    def collect_baseline(self) -> None:
        """Collect and store the answers of the full-precision model only; a later `measure` compares with them."""
        with self._opened() as (checkpoint, recipe, samples):
            source, _ = answerers(checkpoint, self.artifact, recipe, self.device, self.servers, self.on_event)
            collect_answers(source, samples, picture_keys(samples), self.store, self.on_event)

    @contextmanager
    def _opened(self) -> Iterator[tuple[Checkpoint, Recipe, Mapping[str, Sequence[Sample]]]]:
        """Source, recipe and samples, while no export can replace the artifact."""
        plan, checkpoint = prepare(self.recipe, self.device)
        step = next(step for step in plan.steps if step.name == "evaluate")
        kept = f"answers so far are in {self.store.folder}: the same command resumes; " if self.store else ""
        needs = step.device_bytes, step.host_bytes
        with (
            explain_shortage("evaluate", self.device, needs, kept + advice("evaluate again", self.device)),
            reading(self.artifact, self.on_event),
        ):
            require_source(Artifact.open(self.artifact), checkpoint, self.other_baseline, self.on_event)
            samples = evaluation_samples(plan, self.sources)
            refuse_calibration_pictures(self.artifact, samples)
            yield checkpoint, plan.recipe, samples
