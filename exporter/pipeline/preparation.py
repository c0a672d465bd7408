"""Make a plan from a recipe: open the model's headers and check recipe, model and device together."""

from contextlib import nullcontext
from dataclasses import replace

from exporter.artifact.artifact_config import needs_bfloat16
from exporter.device import Device
from exporter.dtypes import FLOAT16, FLOAT32
from exporter.events import Listener, ignore, preparing
from exporter.model.checkpoint import Checkpoint
from exporter.model.embedded import MODELS
from exporter.model.processors.check import check_libraries, measured
from exporter.model.processors.inspector import start_helper
from exporter.model.source import is_on_hub, narrowed, open_source
from exporter.model.tied_heads import refuse_different, refuse_unlike
from exporter.planning.plan import Plan, make_plan
from exporter.planning.recipe import Recipe

# Packed weights decompress to the 16-bit dtype of their scales, and transformers cannot multiply tensors of two dtypes.
READ_IN_16_BITS = (
    "mmq reads the source's float32 tensors as bfloat16; set `dtype: float16` in the recipe's model section for float16"
)
CHECKS = "checking the model and its processor"
READ_AS_BFLOAT16 = "mmq reads the source's {} tensors as bfloat16: vLLM's kernels for this recipe have no other dtype"


def prepare(
    recipe: Recipe,
    device: Device,
    headers_only: bool = False,
    on_event: Listener = ignore,
    skip_evaluation: bool = False,
) -> tuple[Plan, Checkpoint]:
    """Open the model's headers and make the plan; raise every user error in recipe, model and device.

    headers_only: download only the headers and the small files of a hub model; this is enough for a plan. Otherwise its
    weights are downloaded after the plan was made from them.
    skip_evaluation: if the recipe needs no calibration data either, the model may lack a processor.
    """
    recipe = with_suitable_data(recipe)
    start_helper(recipe.model.repo)
    plan, checkpoint = _planned(recipe, device, True, on_event, skip_evaluation)
    if headers_only:
        return plan, checkpoint
    if not all((checkpoint.folder / file).exists() for file in checkpoint.files()):
        plan, checkpoint = _planned(recipe, device, False, on_event, skip_evaluation)
    refuse_different(checkpoint, plan.family)
    return plan, checkpoint


def _planned(
    recipe: Recipe, device: Device, headers_only: bool, on_event: Listener, skip_evaluation: bool
) -> tuple[Plan, Checkpoint]:
    model = recipe.model
    action = "looking up {} on the hub" if headers_only else "downloading {}"
    with preparing(on_event, action.format(model.repo)) if is_on_hub(model.repo) else nullcontext():
        checkpoint, family = open_source(model.repo, model.revision, headers_only, model.dtype, model.adapter)
    with preparing(on_event, CHECKS):
        plan = make_plan(recipe, checkpoint, family, device)
        refuse_unlike(checkpoint, family)
        checkpoint, notes = _in_served_dtype(plan, checkpoint)
        library_notes = check_libraries(checkpoint, plan.family, plan.needs_calibration or not skip_evaluation)
        if notes or family.varies:
            plan = make_plan(recipe, checkpoint, measured(checkpoint, plan.family), device)
        plan = replace(plan, warnings=(*plan.warnings, *notes, *library_notes))
    return plan, checkpoint


def _in_served_dtype(plan: Plan, checkpoint: Checkpoint) -> tuple[Checkpoint, tuple[str, ...]]:
    """The checkpoint in the dtype in which the artifact is served, and notes about the change.

    Scales are then rounded to their served values before codes are computed.
    """
    wide = any(row.decision == "packed" and row.tensor.dtype == FLOAT32 for row in plan.rows)
    dtypes = {"float32": "F32"} if wide else {}
    if not needs_bfloat16(plan):
        return (narrowed(checkpoint, "bfloat16"), (READ_IN_16_BITS,)) if wide else (checkpoint, ())
    if any(info.dtype == FLOAT16 for info in checkpoint.tensors.values()):
        dtypes["float16"] = "F16"
    note = READ_AS_BFLOAT16.format(" and ".join(dtypes))
    return narrowed(checkpoint, "bfloat16", tuple(dtypes.values())), (note,) if dtypes else ()


def with_suitable_data(recipe: Recipe) -> Recipe:
    """Replace the data source `demo` by `drawings` for every model but the embedded ones.

    Only the embedded models know the made-up names in the data of `demo`; `drawings` uses English words.
    """
    if recipe.calibration.data != ("demo",) or recipe.evaluation.data is not None or recipe.model.repo in MODELS:
        return recipe
    return recipe.adjusted(calibration={"data": ("drawings",)}, evaluation={"data": ("drawings",)})
