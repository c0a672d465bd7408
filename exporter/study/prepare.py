"""The base recipe of a study from the user's options, the study's default folder, and the components to vary."""

from collections.abc import Sequence
from pathlib import Path

from exporter import data
from exporter.artifact.manifest import MANIFEST
from exporter.errors import ArtifactError, PlanError
from exporter.model.checkpoint import Checkpoint
from exporter.model.embedded import MODELS
from exporter.model.families import Family
from exporter.model.source import open_source
from exporter.planning.recipe import Calibration, Evaluation, Model, Recipe, Rule


def base_recipe(
    model: str,
    revision: str | None,
    places: Sequence[data.SourceSpec],
    samples: int,
    seed: int,
    only: Sequence[str] = (),
) -> Recipe:
    """A recipe with the model and data of a study and without quantization; settings add their rules to it.

    samples: number of calibration samples over all tasks. only: tasks to calibrate and test on; empty: all that the
    data may have. Raises PlanError for a model of an unknown family, and for a task that it lacks.
    """
    _, family = open_source(model, revision, headers_only=True)
    data_names = tuple(place.name for place in places) or ("demo",)
    if foreign := [task for task in only if task not in family.tasks]:
        raise PlanError(f"{model}: no task {' or '.join(foreign)}", f"tasks of the model: {', '.join(family.tasks)}")
    supported = [task for task in family.tasks if not places or any(task in place.tasks for place in places)]
    tasks = tuple(task for task in family.tasks if task in (only or supported))
    return Recipe(
        name="study",
        model=Model(repo=model, revision=revision),
        quantize=(Rule(component=family.components[0].name, bits=16),),
        calibration=Calibration(data=data_names, tasks=tasks or family.tasks, samples=samples, seed=seed),
        evaluation=Evaluation(seed=seed),
    )


def refuse_places(study: Path, model: Checkpoint, places: Sequence[data.SourceSpec]) -> None:
    """ArtifactError when the folder of a study is an artifact, a data folder, or the model's folder or inside it."""
    place, inputs = study.resolve(), [model.folder, *([model.adapter.folder] if model.adapter else [])]
    within = next((path for path in inputs if path.resolve() in (place, *place.parents)), None)
    same = next((spec.path for spec in places if spec.path and spec.path.resolve() == place), None)
    if taken := within or same or (study if (study / MANIFEST).exists() else None):
        reason = "an artifact" if taken == study else f"in {taken}, which the study only reads"
        raise ArtifactError(f"the folder of the study, {study}, is {reason}", "give another folder")


def default_folder(model: str) -> Path:
    """Default folder of a model's study; all grids of the model share it."""
    return Path("studies") / (model if model in MODELS else Path(model).name)


def quantizable(family: Family) -> list[str]:
    """Names of the components that a grid varies by default: those with numbered blocks, which excludes projectors."""
    return [component.name for component in family.components if "{i}" in component.blocks]
