"""The measurement of an artifact beside its full-precision model, with the same back end for both."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter import data
from exporter.artifact import artifact
from exporter.artifact.manifest import as_line
from exporter.data.tasks import TASKS, retrieval
from exporter.data.tasks.sample import Sample
from exporter.device import Device
from exporter.evaluation import evaluate
from exporter.evaluation.answers import Answerer, Store
from exporter.evaluation.backends import Servers, local_answerers, served_answerers
from exporter.evaluation.baseline import require_source
from exporter.evaluation.cluster.ray_cluster import RayCluster
from exporter.evaluation.cluster_answers import cluster_answerers
from exporter.evaluation.report_file import Report
from exporter.events import Listener, ignore
from exporter.model.checkpoint import Checkpoint
from exporter.pipeline.samples import test_sources
from exporter.planning.prompts import by_recipe, prompts_by_task
from exporter.planning.recipe import Recipe


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
    cluster: RayCluster | None = None,
    sources: Sequence[data.SourceSpec] = (),
    other_baseline: bool = False,
) -> Report:
    """Run the baseline and the artifact on all samples, and compare the answers.

    They run in this process, behind `servers`, or on the machines of `cluster`.

    other_baseline: whether `checkpoint` may be another model than the artifact's source; the report records this.
    """
    opened = artifact.Artifact.open(out)
    baseline, family = require_source(opened, checkpoint, other_baseline, on_event), by_recipe(opened.family, recipe)
    before, after = answerers(checkpoint, out, recipe, device, servers, on_event, cluster)
    name = ", ".join(map(str, sources or test_sources(recipe)))
    method = {task: dict(TASKS[task].method()) for task in samples}
    about: dict[str, Any] = {
        "data": name,
        "samples": recipe.evaluation.samples,
        "seed": recipe.evaluation.seed,
        "scoring": method,
        "baseline": baseline.as_json(),
        "overrides": {as_line(key): as_line(value) for key, value in recipe.overrides.items()},
    }
    about["prompts"] = prompts_by_task(family)
    if pool := retrieval.pool_sizes(samples.get(retrieval.NAME, [])):
        about["searched"] = pool
    return evaluate.measure(before, after, samples, recipe, store, on_event, about)


def answerers(
    checkpoint: Checkpoint,
    out: Path,
    recipe: Recipe,
    device: Device,
    servers: Servers | None,
    on_event: Listener = ignore,
    cluster: RayCluster | None = None,
) -> tuple[Answerer, Answerer]:
    """Answerers of source and artifact, both with the same back end."""
    opened = artifact.Artifact.open(out, device.torch_device)
    family = by_recipe(opened.family, recipe)
    if servers:
        return served_answerers(checkpoint, opened, servers, family)
    if cluster:
        return cluster_answerers(cluster, checkpoint, out, recipe, device)
    return local_answerers(checkpoint, opened, device, recipe.evaluation.batch, on_event, family=family)


def default_store(out: Path) -> Store:
    """Default folder of the stored answers: beside the artifact, shared by all artifacts of the same parent folder."""
    return Store(out.absolute().parent / ".mmq-answers")
