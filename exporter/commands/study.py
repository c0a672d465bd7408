"""`mmq study`: score a grid of quantization settings, rank the components by importance, and draw plots."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.commands.next_steps import print_steps
from exporter.commands.options import (
    LOCAL,
    data_option,
    device_option,
    json_option,
    print_result,
    ray_option,
    reports_errors,
    revision_option,
)
from exporter.commands.recipe_options import max_new_tokens_option, prompt_option, study_recipe, task_option
from exporter.commands.steps_after import after_study, open_page
from exporter.errors import Interrupted

if TYPE_CHECKING:
    from exporter.model.families import Family
    from exporter.study.grid import Grid
    from exporter.study.run import Outcome
    from exporter.study.worker_pool import WorkerPool
    from exporter.study.worker_tasks import Setup

# Options of both `mmq study` and `mmq allocate`.
calibration_option = click.option(
    "--calibration", type=click.IntRange(min=1), default=128, show_default=True, help="Total calibration samples."
)
workers_option = click.option(
    "--workers", type=click.IntRange(min=1), help="Worker processes [one per core; 1 on a GPU]."
)
samples_seed_option = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed that selects the samples."
)


def parse_numbers(context: click.Context, option: click.Parameter, value: str) -> tuple[int, ...]:
    """`2,3,4` as numbers."""
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"expected numbers like 2,3,4, not '{value}'") from None


def parse_words(context: click.Context, option: click.Parameter, value: str | None) -> tuple[str, ...]:
    """`front,end` as words."""
    return tuple(part.strip() for part in value.split(",")) if value else ()


@click.group(invoke_without_command=True)
@click.option("--model", metavar="MODEL", default="demo-llava", show_default=True, help="Hub id, folder or demo model.")
@revision_option
@click.option(
    "--grid",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="YAML file with the keys `components` (each with `bits`, `blocks`, `roles`), `methods`, `group_sizes`, "
    "`symmetric` and `combine`.",
)
@click.option(
    "--components", callback=parse_words, metavar="A,B", help="Components to vary [vision, qformer, language]."
)
@click.option(
    "--bits",
    callback=parse_numbers,
    default="2,3,4,5,6,8,16",
    show_default=True,
    help="Bit widths; 16: full precision.",
)
@click.option(
    "--methods", callback=parse_words, default="gptq", show_default=True, help="Methods: rtn, gptq, awq, autoround."
)
@click.option("--groups", callback=parse_words, default="row", show_default=True, help="Columns per scale, or row.")
@click.option(
    "--blocks",
    callback=parse_words,
    default="all",
    show_default=True,
    help="Blocks to quantize: all, front, middle, end, front+end.",
)
@click.option(
    "--roles", callback=parse_words, default="all", show_default=True, help="Linears to quantize: all, attention, mlp."
)
@click.option(
    "--combine",
    type=click.Choice(["product", "alone", "together"]),
    default="product",
    show_default=True,
    help="How settings combine components: every combination, one component at a time, or all alike.",
)
@data_option
@click.option("--samples", type=click.IntRange(min=8), default=250, show_default=True, help="Test samples per task.")
@calibration_option
@samples_seed_option
@task_option
@prompt_option
@max_new_tokens_option
@click.option("--answers", is_flag=True, help="Score generated answers by the tasks' metrics, as gates do; slower.")
@click.option(
    "--sequential", is_flag=True, help="Quantize every setting as an export does, without sharing quantized units."
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of the study [studies/MODEL].")
@workers_option
@ray_option
@device_option
@json_option
@click.pass_context
@reports_errors
def study(context: click.Context, **options: Any) -> None:
    """Quantize and score a grid of settings.

    A grid combines components, bits, methods, blocks and roles (attention or MLP). Settings share quantized units, and
    each setting is measured only once, so the same command resumes an interrupted study. Scores are the share of exact
    greedy replies, their log-likelihood, and the divergence from the full-precision model. Results are in
    OUT/study.sqlite and OUT/study.csv.

    \b
    Examples:
      mmq study --model demo-llava
      mmq study --model demo-llava --bits 3,4 --blocks all,front,middle --roles all,attention,mlp --combine alone
      mmq study --model ./llava-1.5-7b-hf --grid grid.yaml --data coco:/data/coco --ray local
      mmq study --model ./my-llava --prompt captioning='Describe the image.'
      mmq study importance studies/demo-llava
      mmq study plots studies/demo-llava
    """
    if context.invoked_subcommand is not None:
        return
    from exporter.study.result_tables import outcome_json, outcome_page

    outcome = measure(options)
    print_result(outcome_json(outcome) if options["as_json"] else outcome_page(outcome))
    print_steps(options["as_json"], after_study(outcome, options))


def measure(options: dict[str, Any]) -> "Outcome":
    """Run the grid that the options describe. Raises Interrupted on Ctrl-C."""
    from exporter.commands.progress import ProgressDisplay
    from exporter.events import notice
    from exporter.files.folder_lock import hold
    from exporter.quantization.workdir import LOCK
    from exporter.study.grid import read_grid, settings_of, with_full_precision
    from exporter.study.prepare import refuse_places
    from exporter.study.run import run
    from exporter.study.worker_tasks import open_model

    setup = setup_of(options)
    model = open_model(setup)
    refuse_places(setup.folder, model.checkpoint, setup.places)
    grid = read_grid(options["grid"]) if options["grid"] else grid_of(options, model.family)
    grid_settings, notes = settings_of(grid, model.family, model.checkpoint.config)
    grid_settings = with_full_precision(grid_settings, model.family)
    try:
        with (
            ProgressDisplay(options["as_json"]) as listen,
            hold(setup.folder / LOCK, setup.folder, on_event=listen),
            open_pool(options, model.device.is_cuda, len(grid_settings)) as pool,
        ):
            for note in notes:
                listen(notice(note))
            return run(setup, grid_settings, pool, listen)
    except KeyboardInterrupt:
        message = f"stopped; finished results are kept in {setup.folder}"
        raise Interrupted(message, "run the same command again to resume") from None


def setup_of(options: dict[str, Any]) -> "Setup":
    """The study's setup, as workers receive it."""
    from exporter.data import places
    from exporter.study.prepare import default_folder
    from exporter.study.worker_tasks import Setup

    sources = places(options["data"])
    recipe = study_recipe(options, sources)
    return Setup(
        folder=(options["out"] or default_folder(options["model"])).absolute(),  # workers may start elsewhere
        recipe=recipe.model_dump_json(),
        places=sources,
        samples=options["samples"],
        device=options["device"],
        how="generated" if options["answers"] else "forced",
        sequential=options["sequential"],
    )


def grid_of(options: dict[str, Any], family: "Family") -> "Grid":
    """The grid that the command-line options describe."""
    from exporter.study.grid import parse_grid
    from exporter.study.prepare import quantizable

    axis = {"bits": options["bits"], "blocks": options["blocks"], "roles": options["roles"]}
    names = options["components"] or quantizable(family)
    content = {"components": {name: axis for name in names}, "combine": options["combine"]}
    groups = [int(group) if group.isdigit() else group for group in options["groups"]]
    return parse_grid(content | {"methods": options["methods"], "group_sizes": groups}, "the grid of these flags")


def open_pool(options: dict[str, Any], on_gpu: bool, tasks: int) -> AbstractContextManager["WorkerPool"]:
    """A pool of `tasks` workers at most: a Ray cluster with --ray, else processes of this machine."""
    import os

    from exporter.study.ray_workers import ray_pool
    from exporter.study.worker_pool import local

    if options["ray"]:
        address = None if options["ray"] == LOCAL else options["ray"]
        return ray_pool(address, gpus=1 if on_gpu else 0)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return local(min(options["workers"] or (1 if on_gpu else cores), max(tasks, 1)))


@study.command()
@click.argument("table", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--score", metavar="COLUMN", help="Column of the score [the first present of score, cider, accuracy, ...]."
)
@click.option(
    "--where", "conditions", multiple=True, metavar="COLUMN=VALUE", help="Use only rows with this value; repeatable."
)
@click.option(
    "--usable",
    type=click.FloatRange(0, 1),
    default=0.8,
    show_default=True,
    help="A bit width is usable if some setting with it keeps this share of the full score.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of the random forest and the permutations.",
)
@json_option
@reports_errors
def importance(
    table: Path, score: str | None, conditions: tuple[str, ...], usable: float, seed: int, as_json: bool
) -> None:
    """Rank components by the effect of their bits on the score.

    TABLE is a study's folder, or a CSV file with columns COMPONENT_bits and a score. The consensus is the mean of the
    importances by random forest, permutation and SHAP, as in arXiv 2601.15287. The output also shows the fit of a
    linear model, and the change of score per bit width among usable settings. Needs the extra `study`.

    \b
    Examples:
      mmq study importance grid.csv --json
      mmq study importance retrieval.csv --score img_r1
      mmq study importance studies/demo-llava --where method=gptq --where blocks=all
    """
    from exporter.study.importance import importance as compute_importance
    from exporter.study.result_tables import importance_page
    from exporter.study.score_table import read_table

    result = compute_importance(read_table(table, score, conditions), seed, usable)
    print_result(result.as_json() if as_json else importance_page(result))


@study.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for the files [FOLDER/plots].")
@click.option("--score", metavar="COLUMN", default="score", show_default=True, help="Column of the score to draw.")
@click.option(
    "--paper",
    "papers",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="CSV file with COMPONENT_bits, bpw and a score, drawn for comparison; repeatable.",
)
@json_option
@reports_errors
def plots(folder: Path, out: Path | None, score: str, papers: tuple[Path, ...], as_json: bool) -> None:
    """Draw a study's results as PNG files and one HTML page.

    The plots are heat maps of bits x bits, importance, change per bit width, the Pareto front of score over bits per
    weight, and the sensitivity of each part (after `mmq allocate`). Needs the extra `study`.

    \b
    Examples:
      mmq study plots studies/demo-llava
      mmq study plots studies/llava-1.5-7b-hf --paper llava_gptq_gqa.csv --out plots
    """
    from exporter.files.writing import make_folder
    from exporter.study.gallery import gather, table_rows, write_plots
    from exporter.study.study_page import write_page

    target = out or folder / "plots"
    make_folder(target)
    notes: list[str] = []
    plots = gather(folder, score, papers, notes.append)
    page = write_page(plots, table_rows(folder, score), folder.resolve().name, target / "study.html", score)
    files = [*write_plots(plots, target), page]
    lines = [*(f"note: {text}" for text in notes), *(f"wrote {path}" for path in files)]
    print_result({"files": [str(path) for path in files], "notes": notes} if as_json else "\n".join(lines))
    print_steps(as_json, [open_page(files[-1])])
