"""The base recipe of a study from the user's options, the study's default folder, and the components to vary."""

from collections.abc import Sequence
from pathlib import Path

from exporter import data
from exporter.demo import MODELS
from exporter.model.families import Family
from exporter.model.source import open_source
from exporter.planning.recipe import Calibration, Evaluation, Model, Recipe, Rule


def base_recipe(model: str, revision: str | None, places: Sequence[data.SourceSpec], samples: int, seed: int) -> Recipe:
    """A recipe with the model and data of a study and without quantization; settings add their rules to it.

    samples: number of calibration samples over all tasks. Raises PlanError for a model of an unknown family.
    """
    _, family = open_source(model, revision, headers_only=True)
    data_names = tuple(place.name for place in places) or ("demo",)
    tasks = tuple(task for task in family.tasks if not places or any(task in place.tasks for place in places))
    return Recipe(
        name="study",
        model=Model(repo=model, revision=revision),
        quantize=(Rule(component=family.components[0].name, bits=16),),
        calibration=Calibration(data=data_names, tasks=tasks or family.tasks, samples=samples, seed=seed),
        evaluation=Evaluation(seed=seed),
    )


def default_folder(model: str) -> Path:
    """Default folder of a model's study; all grids of the model share it."""
    return Path("studies") / (model if model in MODELS else Path(model).name)


def quantizable(family: Family) -> list[str]:
    """Names of the components that a grid varies by default: those with numbered blocks, which excludes projectors."""
    return [component.name for component in family.components if "{i}" in component.blocks]
