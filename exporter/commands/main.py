"""The `mmq` command group, and the subcommands export, verify, recipes and doctor."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from exporter.commands.allocate import allocate
from exporter.commands.ask import ask
from exporter.commands.bench import bench
from exporter.commands.data_check import data
from exporter.commands.datasets import datasets, score
from exporter.commands.evaluate import evaluate
from exporter.commands.next_steps import print_steps
from exporter.commands.options import (
    adapter_option,
    calibration_device_option,
    data_option,
    device_option,
    eval_batch_option,
    eval_samples_option,
    json_option,
    model_option,
    print_result,
    recipe_option,
    reports_errors,
    reports_errors_without_torch,
    revision_option,
    samples_option,
    skip_evaluation_option,
)
from exporter.commands.plan import plan, show_plan
from exporter.commands.publish import check_push, diff, publish, verify_published
from exporter.commands.recipe_options import (
    bits_option,
    group_size_option,
    max_new_tokens_option,
    prompt_option,
    recipe_of,
    task_option,
)
from exporter.commands.report import report
from exporter.commands.serve import check, need_program, serve, vllm_option
from exporter.commands.steps_after import after_verify
from exporter.commands.study import study
from exporter.distribution import DISTRIBUTION, PROGRAM, VERSION
from exporter.errors import EXIT_CODES, Interrupted

# The line after \b is not wrapped, so that it can be pasted.
COMPLETION = (
    "Completion of commands and options in bash (zsh_source and fish_source for other shells):\n\n"
    '\b\n  eval "$(_MMQ_COMPLETE=bash_source mmq)"'
)
EPILOG = f"{COMPLETION}\n\nExit codes: {', '.join(f'{code} {name}' for code, (name, _, _) in EXIT_CODES.items())}."


class OrderedGroup(click.Group):
    """Lists its commands in the order in which they were added, not by the alphabet."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)


def main() -> None:
    """Run the command line, without the log messages of transformers."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    cli()


@click.group(cls=OrderedGroup, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.version_option(VERSION, message=f"{PROGRAM} {VERSION} (distribution {DISTRIBUTION})")
def cli() -> None:
    """Quantize vision-language checkpoints, component by component, into artifacts that vLLM serves.

    \b
    Examples:
      mmq export --recipe llava-w4-vit8 --model demo-llava   demo model: no GPU, no network
      mmq export --recipe llava-w4-vit8                      LLaVA-1.5-7B on a GPU
      mmq plan --recipe llava-w4-vit8 --model ./my-llava     show the plan of an export, in seconds
    """


@click.command()
@recipe_option
@model_option
@revision_option
@adapter_option
@click.option("--out", type=click.Path(path_type=Path), help="Artifact folder [artifacts/MODEL-RECIPE].")
@click.option(
    "--work", type=click.Path(path_type=Path), help="Folder of finished blocks [OUT.work, removed at the end]."
)
@calibration_device_option
@data_option
@task_option
@click.option("--seed", type=click.IntRange(min=0), help="Seed that selects calibration samples [the recipe's].")
@samples_option
@eval_samples_option
@eval_batch_option
@bits_option
@group_size_option
@prompt_option
@max_new_tokens_option
@skip_evaluation_option
@click.option("--overwrite", is_flag=True, help="Replace an existing artifact at --out.")
@click.option("--serve-check", is_flag=True, help="Then compare its answers in vLLM, as `mmq check` does.")
@vllm_option
@click.option("--push", metavar="ORG/NAME", help="Publish it privately to this repository if its gates pass.")
@click.option("--dry-run", is_flag=True, help="Only show the plan, as `mmq plan` does.")
@json_option
@reports_errors
def export(
    recipe: str,
    model: str | None,
    out: Path | None,
    work: Path | None,
    device: str,
    data: tuple[str, ...],
    skip_evaluation: bool,
    overwrite: bool,
    serve_check: bool,
    vllm: str | None,
    push: str | None,
    dry_run: bool,
    as_json: bool,
    **overrides: Any,
) -> None:
    """Quantize a model by a recipe; verify and measure the artifact.

    The same command resumes an interrupted run (Ctrl-C, kill, power failure) and writes the same bytes. The exit code
    is 3 if a gate failed, and 5 if none failed but one could not be decided.

    \b
    Examples:
      mmq export --recipe llava-w4-vit8 --model demo-llava
      mmq export --recipe llava-w4-vit8 --out ./llava-w4 --device cuda:0
      mmq export --recipe llava-w4-vit8 --model demo-llava --bits language=3 --group-size 64 --out ./demo-w3
      mmq export --recipe llava-w4-vit8 --model ./my-llava --prompt captioning='Describe the image.'
      mmq export --recipe ./mine.yaml --model ./my-llava --data coco:/data/coco --data vqav2:/data/vqa
    """
    final_recipe = recipe_of(recipe, model, overrides | {"data": data})
    if dry_run:
        return show_plan(final_recipe, device, False, skip_evaluation, as_json, data=data)
    if push:
        check_push(push, skip_evaluation)
    if serve_check:
        need_program(vllm, final_recipe, device)
    from exporter.artifact.output_folder import default_out, default_work
    from exporter.commands import tables as show
    from exporter.commands.progress import ProgressDisplay
    from exporter.data import places
    from exporter.device import choose
    from exporter.evaluation.evaluate import raise_unless_accepted
    from exporter.pipeline.export import export as run

    target = out or default_out(final_recipe)
    try:
        with ProgressDisplay(as_json) as listen:
            result = run(
                final_recipe,
                out=target,
                device=choose(device),
                on_event=listen,
                work=work,
                sources=places(data),
                overwrite=overwrite,
                skip_evaluation=skip_evaluation,
            )
    except KeyboardInterrupt:
        message = f"stopped; finished blocks are kept in {work or default_work(target)}"
        raise Interrupted(message, "run the same command again to resume") from None
    print_result(show.export_json(result) if as_json else show.export_page(result))
    if result.report:
        raise_unless_accepted(result.report, target, listed=not as_json)
    if serve_check:
        check_options = {"artifact": target, "vllm": vllm, "device": device, "data": data, "as_json": as_json}
        click.get_current_context().invoke(check, **check_options)
    if push:
        click.get_current_context().invoke(publish, artifact=target, repo=push, device=device, as_json=as_json)


@click.command()
@click.argument("artifact")
@device_option
@click.option("--no-load", is_flag=True, help="Check files and integers only; do not run transformers.")
@click.option("--whole", is_flag=True, help="Also load the whole model in transformers: 8 bytes per parameter.")
@click.option("--source", help="Full-precision model (folder or hub id) to compare every row of weights with.")
@adapter_option
@json_option
@reports_errors
def verify(
    artifact: str, device: str, no_load: bool, whole: bool, source: str | None, adapter: str | None, as_json: bool
) -> None:
    """Check an artifact's hashes, integers and block outputs.

    mmq also checks the patterns of the config, and compares each block with its reading by transformers. ARTIFACT is a
    folder or hub:ORG/NAME[@REVISION]. For an artifact on the hub, mmq compares hashes, names and small files with the
    manifest, and downloads no weights.

    \b
    Examples:
      mmq verify artifacts/demo-llava-w4-vit8
      mmq verify my-artifact --source ./my-model
      mmq verify hub:me/llava-1.5-7b-w4
    """
    from exporter.artifact.verify import Load
    from exporter.artifact.verify import verify as run
    from exporter.commands import tables as show
    from exporter.commands.progress import ProgressDisplay
    from exporter.device import choose
    from exporter.files.hub import PREFIX
    from exporter.model.source import open_source

    if artifact.startswith(PREFIX):
        return verify_published(artifact, as_json)
    with ProgressDisplay(as_json) as listen:
        load: Load = "nothing" if no_load else "whole" if whole else "blocks"
        source_checkpoint = open_source(source, adapter=adapter)[0] if source else None
        verified = run(Path(artifact), choose(device), listen, load, source_checkpoint)
    print_result(asdict(verified) if as_json else show.verified_line(verified))
    print_steps(as_json, after_verify(Path(artifact)))


@click.command()
@click.argument("name", required=False)
@json_option
@reports_errors_without_torch
def recipes(name: str | None, as_json: bool) -> None:
    """List the built-in recipes, or print one as YAML.

    \b
    Examples:
      mmq recipes
      mmq recipes llava-w4-vit8 > mine.yaml
    """
    from exporter.commands.plan_tables import recipes_table
    from exporter.planning.recipe_file import built_in, load_recipe

    if name:
        load_recipe(name)  # raises the same errors as other commands do
        path = built_in().get(name, Path(name))
        return click.echo(path.read_text(encoding="utf-8"), nl=False)
    built_in_recipes = [load_recipe(recipe_name) for recipe_name in built_in()]
    print_result(
        [recipe.model_dump(mode="json") for recipe in built_in_recipes] if as_json else recipes_table(built_in_recipes)
    )


@click.command()
@json_option
@reports_errors
def doctor(as_json: bool) -> None:
    """Show versions, extras, vLLM, devices, memory and disk.

    For each missing piece, the command shows what does not work without it and how to install it.

    \b
    Examples:
      mmq doctor
      MMQ_VLLM=~/vllm/bin/vllm mmq doctor
    """
    from exporter.commands.doctor import examine

    report_lines = examine()
    print_result(report_lines if as_json else "\n".join(f"{key:24} {value}" for key, value in report_lines.items()))


COMMANDS = (  # in the order of `mmq --help`
    *(recipes, plan, export, evaluate, verify, report),
    *(ask, serve, check, bench, publish, diff),
    *(study, allocate, data, datasets, score, doctor),
)
for command in COMMANDS:
    cli.add_command(command)
