"""`mmq allocate`: choose bits for every part of a model within a size limit or a quality limit."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.commands.options import (
    data_option,
    device_option,
    json_option,
    print_result,
    ray_option,
    reports_errors,
    revision_option,
)
from exporter.commands.recipe_options import max_new_tokens_option, prompt_option, study_recipe, task_option
from exporter.commands.study import (
    calibration_option,
    open_pool,
    parse_numbers,
    parse_words,
    samples_seed_option,
    workers_option,
)
from exporter.errors import GateFailed, GateNotResolved, Interrupted, RecipeError

if TYPE_CHECKING:
    from exporter.study.allocation_run import AllocationResult, Request
    from exporter.study.worker_tasks import Setup

UNITS = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class ByteSize(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """Parameter type for sizes: `4.2GB`, `900 kB`, `4GiB` or a number of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", str(value))
        if not match or match[2] not in UNITS or match[1].count(".") > 1 or match[1] == ".":
            self.fail(f"expected a size like 4.2GB, 900kB or 4GiB, not '{value}'", param, ctx)
        return int(float(match[1]) * UNITS[match[2]])


@click.command()
@click.option("--model", metavar="MODEL", default="demo-llava", show_default=True, help="Hub id, folder or demo model.")
@revision_option
@click.option(
    "--max-size", type=ByteSize(), metavar="SIZE", help="Largest total size of the artifact's tensors: 4.2GB."
)
@click.option(
    "--max-drop", type=click.FloatRange(0, 1, max_open=True), help="Largest relative loss of any task: 0.01 is 1 %."
)
@click.option(
    "--bits", callback=parse_numbers, default="2,3,4,5,6,8", show_default=True, help="Bit widths to choose from."
)
@click.option(
    "--groups",
    callback=parse_words,
    default="128",
    show_default=True,
    help="Columns per scale, or row.",
)
@click.option("--method", default="gptq", show_default=True, help="Quantization method: rtn, gptq or awq.")
@click.option("--asymmetric", is_flag=True, help="Use schemes with zero points.")
@click.option(
    "--components", callback=parse_words, metavar="A,B", help="Components to quantize [all that the engine can load]."
)
@click.option(
    "--per",
    type=click.Choice(["role", "block", "component"]),
    default="role",
    show_default=True,
    help="Unit of choice: attention and MLP of each block (role), each block, or each component.",
)
@click.option("--plain", is_flag=True, help="Use only schemes that vLLM runs without further packages.")
@click.option("--unserved", is_flag=True, help="Also use schemes that no engine runs.")
@click.option(
    "--against", multiple=True, metavar="RECIPE", help="Compare with this recipe on the same tasks; repeatable."
)
@data_option
@click.option(
    "--samples",
    type=click.IntRange(min=8),
    default=64,
    show_default=True,
    help="Training samples per task that measure the cost of each scheme.",
)
@calibration_option
@click.option(
    "--eval-samples",
    type=click.IntRange(min=2),
    default=500,
    show_default=True,
    help="Test samples per task that measure the chosen allocation.",
)
@click.option(
    "--no-proof", is_flag=True, help="Do not export and measure the chosen allocation; the recipe states this."
)
@samples_seed_option
@task_option
@prompt_option
@max_new_tokens_option
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default="allocated.yaml",
    show_default=True,
    help="Recipe to write.",
)
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Folder of the study [studies/MODEL].")
@workers_option
@ray_option
@device_option
@json_option
@reports_errors
def allocate(**options: Any) -> None:
    """Choose the bits of each part, and write a recipe.

    mmq quantizes each part alone with each scheme, on calibration data; the cost of a scheme is the divergence of the
    model's predictions from those of the full-precision model. An integer program minimizes the sum of the costs
    within the size limit. mmq exports the solution, measures it on test data and writes the results into the recipe.
    If the solution loses more than 5 % (or --max-drop), the recipe is written with a warning and the exit code is 3,
    or 5 if the loss is unknown because the full-precision model scores 0. Needs the extra `study`.

    \b
    Examples:
      mmq allocate --model demo-llava --max-size 600kB --against llava-w3-vit4
      mmq allocate --model ./llava-1.5-7b-hf --max-size 4.2GB --plain --data coco:/data/coco --data vqav2:/data/vqa
      mmq allocate --model ./my-llava --max-size 4GB --prompt captioning='Describe the image.'
      mmq allocate --model demo-llava --max-drop 0.01 --out mine.yaml
    """
    if (options["max_size"] is None) == (options["max_drop"] is None):
        raise RecipeError(
            "give exactly one of --max-size and --max-drop", "for example --max-size 4.2GB or --max-drop 0.01"
        )
    from exporter.commands.next_steps import command
    from exporter.files.writing import make_folder
    from exporter.study.allocation_tables import allocation_page
    from exporter.study.propose import write_recipe

    refuse_other_file(options["out"])
    make_folder(options["out"].absolute().parent)  # before anything is measured
    allocation = search(options)
    write_recipe(allocation.recipe, options["out"], command_line())
    result = allocation.as_json() | {"file": str(options["out"])}
    export = command("export", "--recipe", options["out"])
    print_result(result if options["as_json"] else allocation_page(allocation, options["out"], export))
    if allocation.warnings:
        failure = GateFailed if allocation.decided else GateNotResolved
        raise failure(f"{options['out']} is written, but " + "; ".join(allocation.warnings))


def refuse_other_file(out: Path) -> None:
    """RecipeError when the file that the recipe would replace is no recipe."""
    from exporter.planning.recipe_file import load_recipe

    if not out.exists() and not out.is_symlink():
        return
    try:
        load_recipe(str(out.absolute()))
    except RecipeError as error:
        raise RecipeError(f"{out} exists and is no recipe, so mmq does not replace it", "give another --out") from error


def command_line() -> str:
    """The user's command line, for the comment at the head of the recipe."""
    return " ".join(["mmq", *sys.argv[1:]]) if sys.argv[1:2] == ["allocate"] else "mmq allocate"


def search(options: dict[str, Any]) -> "AllocationResult":
    """Run the allocation that the options describe. Raises Interrupted on Ctrl-C."""
    from exporter.commands.progress import ProgressDisplay
    from exporter.files.folder_lock import hold
    from exporter.quantization.workdir import LOCK
    from exporter.study.allocation_run import allocate as run
    from exporter.study.prepare import refuse_places
    from exporter.study.worker_tasks import open_model

    setup = setup_of(options)
    model = open_model(setup)
    refuse_places(setup.folder, model.checkpoint, setup.places)
    try:
        with (
            ProgressDisplay(options["as_json"]) as listen,
            hold(setup.folder / LOCK, setup.folder, on_event=listen),
            open_pool(options, model.device.is_cuda, sys.maxsize) as pool,
        ):
            return run(setup, request_of(options), pool, listen, prove=not options["no_proof"])
    except KeyboardInterrupt:
        message = f"stopped; finished results are kept in {setup.folder}"
        raise Interrupted(message, "run the same command again to resume") from None


def setup_of(options: dict[str, Any]) -> "Setup":
    """The study's setup: model, data and folder."""
    from exporter.data import places
    from exporter.study.prepare import default_folder
    from exporter.study.worker_tasks import Setup

    sources = places(options["data"])
    recipe = study_recipe(options, sources)
    folder = (options["folder"] or default_folder(options["model"])).absolute()  # workers may start elsewhere
    return Setup(folder, recipe.model_dump_json(), places=sources, samples=options["samples"], device=options["device"])


def request_of(options: dict[str, Any]) -> "Request":
    """Constraints and search space of the allocation."""
    from exporter.study.allocation_run import Request

    return Request(
        max_size=options["max_size"],
        max_drop=options["max_drop"],
        bits=options["bits"],
        groups=tuple(int(group) if group.isdigit() else group for group in options["groups"]),
        method=options["method"],
        symmetric=not options["asymmetric"],
        per=options["per"],
        names=options["components"],
        plain=options["plain"],
        unserved=options["unserved"],
        against=options["against"],
        samples=options["eval_samples"],
        name=options["out"].stem,
    )
