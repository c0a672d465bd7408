"""From what the user names to a setup: model, data, and the recipe that carries them."""

from collections.abc import Sequence
from pathlib import Path

from exporter import data
from exporter.demo import MODELS
from exporter.model.families import Family
from exporter.model.source import open_source
from exporter.planning.recipe import Calibration, Evaluation, Evidence, Model, Recipe, Rule


def base_recipe(model: str, revision: str | None, places: Sequence[data.SourceSpec], samples: int, seed: int) -> Recipe:
    """A recipe that names model and data and keeps everything: what settings are made from.

    samples: how many of both tasks together are calibrated on. PlanError for a model of no known family.
    """
    _, family = open_source(model, revision, headers_only=True)
    named = tuple(place.name for place in places) or ("demo",)
    tasks = tuple(task for task in family.tasks if not places or any(task in place.tasks for place in places))
    return Recipe(
        name="study",
        summary="what a study changes",
        model=Model(repo=model, revision=revision, family=family.name),
        quantize=(Rule(component=family.components[0].name, bits=16),),
        calibration=Calibration(data=named, tasks=tasks or family.tasks, samples=samples, seed=seed),
        evaluation=Evaluation(seed=seed),
        gates=(),
        evidence=(Evidence(finding="none yet", figures="none", source="a study"),),
    )


def default_folder(model: str) -> Path:
    """Where a model's study is kept: units and measurements of any grid."""
    return Path("studies") / (model if model in MODELS else Path(model).name)


def quantizable(family: Family) -> list[str]:
    """The components a grid varies when none is named: those with more than one block, so no projector."""
    return [component.name for component in family.components if "{i}" in component.blocks]
