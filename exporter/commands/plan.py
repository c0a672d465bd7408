"""`mmq plan`: show what an export would do, without doing it."""

from typing import TYPE_CHECKING, Any

import click

from exporter.commands.next_steps import print_steps
from exporter.commands.options import (
    adapter_option,
    calibration_device_option,
    data_option,
    eval_batch_option,
    eval_samples_option,
    json_option,
    model_option,
    print_result,
    recipe_option,
    reports_errors_without_torch,
    revision_option,
    samples_option,
    skip_evaluation_option,
)
from exporter.commands.recipe_options import (
    bits_option,
    group_size_option,
    max_new_tokens_option,
    prompt_option,
    recipe_of,
    task_option,
)
from exporter.commands.serve import serve_on_option
from exporter.commands.steps_after import after_plan
from exporter.planning.vllm_kernels import read_hardware

if TYPE_CHECKING:
    from exporter.events import Listener
    from exporter.pipeline.samples import ExportSamples
    from exporter.planning.plan import Plan
    from exporter.planning.recipe import Recipe


@click.command()
@recipe_option
@model_option
@revision_option
@adapter_option
@calibration_device_option
@samples_option
@eval_samples_option
@eval_batch_option
@bits_option
@group_size_option
@prompt_option
@max_new_tokens_option
@skip_evaluation_option
@data_option
@task_option
@click.option("--all", "every_tensor", is_flag=True, help="List every tensor, not only the components.")
@serve_on_option
@json_option
@reports_errors_without_torch
def plan(
    recipe: str,
    model: str | None,
    device: str,
    skip_evaluation: bool,
    every_tensor: bool,
    serve_on: str | None,
    data: tuple[str, ...],
    as_json: bool,
    **overrides: Any,
) -> None:
    """Show an export's decisions, sizes, kernels, memory and time.

    mmq reads only the headers of the checkpoint's files. It predicts peak memory and time of every step, and names the
    vLLM kernel of each component.

    \b
    Examples:
      mmq plan --recipe llava-w4-vit8 --model demo-llava
      mmq plan --recipe llava-w4-vit8 --model ./llava-1.5-7b-hf --all
      mmq plan --recipe llava-w4-vit8 --bits language=3 --bits vision=4 --group-size 64
      mmq plan --recipe llava-w4-vit8 --prompt vqa='{question} Be brief.' --max-new-tokens vqa=30
      mmq plan --recipe llava-w4a8-vitfp8-cache8 --serve-on 9.0
      mmq plan --recipe llava-w4-vit8 --data ./images
      mmq plan --recipe llava-w4-vit8 --data ./captions --task captioning
    """
    final_recipe = recipe_of(recipe, model, overrides | {"data": data})
    show_plan(final_recipe, device, every_tensor, skip_evaluation, as_json, serve_on, data)


def _samples(plan: "Plan", data: tuple[str, ...], skip_evaluation: bool, listen: "Listener") -> "ExportSamples":
    from exporter.data import places
    from exporter.pipeline.samples import ExportSamples, read_samples

    return read_samples(plan, places(data), skip_evaluation, listen) if data else ExportSamples([], [], {})


def show_plan(
    recipe: "Recipe",
    device: str,
    every_tensor: bool,
    skip_evaluation: bool,
    as_json: bool,
    serve_on: str | None = None,
    data: tuple[str, ...] = (),
) -> None:
    """Plan and print the plan. Raises ServeError if vLLM cannot serve the planned artifact on `serve_on`.

    data: sources to read as the export would, with their pictures; DataError for what the export would refuse.
    """
    from exporter.commands import plan_tables as show
    from exporter.commands.progress import ProgressDisplay
    from exporter.device import choose
    from exporter.pipeline.preparation import prepare
    from exporter.pipeline.samples import data_lines
    from exporter.planning.steps import step_warnings

    target = choose(device)
    with ProgressDisplay(as_json) as listen:
        export_plan, checkpoint = prepare(
            recipe, target, headers_only=True, on_event=listen, skip_evaluation=skip_evaluation
        )
    warnings = step_warnings(export_plan.steps, target, skip_evaluation)
    if serve_on:
        from exporter.serving.preflight import processor_note, refuse_plan

        refuse_plan(export_plan, checkpoint.config, read_hardware(serve_on))
        if serve_on == "cpu" and (note := processor_note(export_plan)):
            warnings = [*warnings, note]
    samples = _samples(export_plan, data, skip_evaluation, listen)
    available = {task: len(rows) for task, rows in samples.evaluation.items()}
    lines = data_lines(samples) if data else []
    if as_json:
        data_report = {"data": lines} if data else {}
        return print_result(show.plan_json(export_plan, every_tensor, warnings, available) | data_report)
    if lines:
        print_result("\n".join(lines))
    print_result(show.plan_page(export_plan, target, every_tensor, warnings, available))
    print_steps(as_json, after_plan(click.get_current_context()))
