"""From a recipe to a plan: everything that can be wrong with recipe, model and device is found here."""

from dataclasses import replace

import torch

from exporter.demo import MODELS
from exporter.device import Device
from exporter.errors import PlanError
from exporter.events import Event, Listener, ignore
from exporter.model.checkpoint import Checkpoint
from exporter.model.processor_check import check_libraries
from exporter.model.processor_inspector import start_helper
from exporter.model.source import is_on_hub, narrowed, open_source
from exporter.planning.plan import Plan, make_plan
from exporter.planning.recipe import Recipe

# Packed weights decompress to the 16 bits of their scales, and transformers multiplies no two dtypes.
READ_IN_16_BITS = (
    "the source's float32 tensors are read as bfloat16 (`dtype: float16` in the recipe's model changes it)"
)


def prepare(
    recipe: Recipe,
    device: Device,
    headers_only: bool = False,
    on_event: Listener = ignore,
) -> tuple[Plan, Checkpoint]:
    """Open the model's headers and plan; every user error in recipe, model and device is raised here.

    headers_only: enough to plan; the weights of a hub model are not downloaded.
    """
    recipe = with_data_it_knows(recipe)
    model = recipe.model
    start_helper(model.repo)
    if remote := is_on_hub(model.repo):
        on_event(Event("prepare", 0, 1, f"finding {model.repo} on the hub"))
    checkpoint, family = open_source(model.repo, model.revision, headers_only, model.dtype, model.adapter)
    if remote:
        on_event(Event("prepare", 1, 1, f"finding {model.repo} on the hub"))
    foreign = recipe.foreign_tasks(family.tasks) if recipe.model.family == family.name else []
    if foreign:
        raise PlanError("\n".join([f"recipe '{recipe.name}' asks for what {checkpoint.origin} cannot do:", *foreign]))
    plan = make_plan(recipe, checkpoint, family, device)
    if any(row.decision == "packed" and row.tensor.dtype == torch.float32 for row in plan.rows):
        checkpoint = narrowed(checkpoint, "bfloat16")
        plan = make_plan(recipe, checkpoint, family, device)
        plan = replace(plan, warnings=(*plan.warnings, READ_IN_16_BITS))
    plan = replace(plan, warnings=(*plan.warnings, *check_libraries(checkpoint, family)))
    return plan, checkpoint


def with_data_it_knows(recipe: Recipe) -> Recipe:
    """The recipe, with the drawings in plain words for every model but the embedded ones.

    The made-up names of `demo` mean nothing to other models.
    """
    if recipe.calibration.data != ("demo",) or recipe.evaluation.data is not None or recipe.model.repo in MODELS:
        return recipe
    return recipe.adjusted(calibration={"data": ("drawings",)}, evaluation={"data": ("drawings",)})
