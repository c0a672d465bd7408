"""The Python API: what `exporter` exports. docs/reference/python-api.md documents it and states its stability.

Every function calls what the command of the same name calls. A failed gate or check raises nothing here: the result has
the verdict.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from exporter import data as sources
from exporter.api_artifacts import Data, as_device, check, evaluate, open_artifact, publish, verify
from exporter.artifact.manifest import Manifest
from exporter.artifact.output_folder import default_out
from exporter.artifact.verify import Verification
from exporter.device import Device
from exporter.errors import MmqError
from exporter.evaluation.opened_artifact import OpenedArtifact
from exporter.evaluation.report_file import Report
from exporter.events import Event, Listener, ignore
from exporter.pipeline import export as exporting
from exporter.pipeline.export import Export
from exporter.pipeline.preparation import prepare
from exporter.planning import recipe_file
from exporter.planning.overrides import Groups, adjusted
from exporter.planning.plan import Plan
from exporter.planning.recipe import Recipe
from exporter.planning.vllm_kernels import read_hardware
from exporter.publishing.upload import Publication
from exporter.serving.check import CheckResult
from exporter.serving.preflight import refuse_plan


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Load a built-in recipe by its name, or a recipe from a YAML file.

    RecipeError lists all problems of the file.
    """
    return recipe_file.load_recipe(str(name_or_path))


def plan(
    recipe: str | Path | Recipe,
    *,
    model: str | Path | None = None,
    revision: str | None = None,
    adapter: str | Path | None = None,
    device: str | Device = "auto",
    samples: int | None = None,
    eval_samples: int | None = None,
    eval_batch: int | None = None,
    bits: Mapping[str, int] | None = None,
    group_size: Groups | Mapping[str, Groups] | None = None,
    prompts: Mapping[str, str] | None = None,
    max_new_tokens: Mapping[str, int] | None = None,
    serve_on: str | None = None,
    skip_evaluation: bool = False,
    on_event: Listener = ignore,
) -> Plan:
    """Plan an export from the headers of the model's files: the decision for every tensor, sizes, memory and seconds.

    model, revision, adapter, samples, eval_samples, eval_batch: replace the values of the recipe.
    bits: component -> bits of all its rules.
    group_size: of every rule that has groups, or component -> group size of all its rules; `(128, "row")` and
        `(128, "keep")` also set the rules' `else`.
    prompts, max_new_tokens: task -> prompt, and task -> longest answer in tokens.
    serve_on: fail unless vLLM can serve the artifact there: a GPU's compute capability (`9.0`) or `cpu`.
    skip_evaluation: plan an export without evaluation: unless it calibrates, the model may lack a processor.
    """
    final_recipe = adjusted(
        _loaded(recipe),
        model,
        revision=revision,
        adapter=adapter,
        samples=samples,
        eval_samples=eval_samples,
        eval_batch=eval_batch,
        bits=bits,
        group_size=group_size,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
    )
    export_plan, checkpoint = prepare(
        final_recipe, as_device(device), headers_only=True, on_event=on_event, skip_evaluation=skip_evaluation
    )
    if serve_on:
        refuse_plan(export_plan, checkpoint.config, read_hardware(serve_on))
    return export_plan


def export(
    recipe: str | Path | Recipe,
    *,
    model: str | Path | None = None,
    out: str | Path | None = None,
    revision: str | None = None,
    adapter: str | Path | None = None,
    device: str | Device = "auto",
    data: Data = (),
    tasks: Sequence[str] = (),
    seed: int | None = None,
    samples: int | None = None,
    eval_samples: int | None = None,
    eval_batch: int | None = None,
    bits: Mapping[str, int] | None = None,
    group_size: Groups | Mapping[str, Groups] | None = None,
    prompts: Mapping[str, str] | None = None,
    max_new_tokens: Mapping[str, int] | None = None,
    skip_evaluation: bool = False,
    work: str | Path | None = None,
    overwrite: bool = False,
    on_event: Listener = ignore,
) -> Export:
    """Quantize a model by a recipe into the folder `out`, verify the artifact and measure its scores.

    A failed gate raises nothing: read `report.verdict` of the result. A stopped export resumes when it is called again.

    out: the artifact's folder; None means `artifacts/MODEL-RECIPE`.
    model, revision, adapter, data, seed, samples, eval_samples, eval_batch: replace the values of the recipe.
    bits: component -> bits of all its rules.
    group_size: of every rule that has groups, or component -> group size of all its rules; `(128, "row")` and
        `(128, "keep")` also set the rules' `else`.
    prompts, max_new_tokens: task -> prompt, and task -> longest answer in tokens.
    data: a source as on the command line (`coco:/data/coco`, or a folder), or a list with a source for each task.
    tasks: calibrate and test on these tasks of the recipe only, for data without samples of the others.
    work: folder for finished blocks; None means beside `out`, and mmq removes it at the end.
    """
    final_recipe = adjusted(
        _loaded(recipe),
        model,
        revision=revision,
        adapter=adapter,
        seed=seed,
        samples=samples,
        eval_samples=eval_samples,
        eval_batch=eval_batch,
        data=data,
        tasks=tasks,
        bits=bits,
        group_size=group_size,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
    )
    return exporting.export(
        final_recipe,
        out=default_out(final_recipe) if out is None else Path(out),
        device=as_device(device),
        on_event=on_event,
        work=None if work is None else Path(work),
        sources=sources.places(data),
        overwrite=overwrite,
        skip_evaluation=skip_evaluation,
    )


def _loaded(recipe: str | Path | Recipe) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


__all__ = [
    "CheckResult",
    "Device",
    "Event",
    "Export",
    "Listener",
    "Manifest",
    "MmqError",
    "OpenedArtifact",
    "Plan",
    "Publication",
    "Recipe",
    "Report",
    "Verification",
    "check",
    "evaluate",
    "export",
    "load_recipe",
    "open_artifact",
    "plan",
    "publish",
    "verify",
]
