"""`mmq study`: grids of settings, and which component's bits decide the score."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.commands.options import data_option, device_option, json_option, reports_errors, revision_option, say
from exporter.data import places
from exporter.errors import Interrupted
from exporter.events import Listener

if TYPE_CHECKING:
    from exporter.model.families import Family
    from exporter.study.grid import Grid
    from exporter.study.pool import WorkerPool
    from exporter.study.run import Outcome
    from exporter.study.work import Setup

LOCAL = "local"


# What `mmq study` and `mmq allocate` share.
calibration_option = click.option(
    "--calibration", type=click.IntRange(min=1), default=128, show_default=True, help="Calibrated on, in all."
)
workers_option = click.option("--workers", type=click.IntRange(min=1), help="Processes [as many as cores; 1 on a GPU].")
ray_option = click.option(
    "--ray", metavar="ADDRESS", help="Run on a Ray cluster: its address, or `local` to start one here."
)
samples_seed_option = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the samples."
)


def numbers(context: click.Context, option: click.Parameter, value: str) -> tuple[int, ...]:
    """`2,3,4` as numbers."""
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"expected numbers like 2,3,4, not '{value}'") from None


def words(context: click.Context, option: click.Parameter, value: str | None) -> tuple[str, ...]:
    """`front,end` as words."""
    return tuple(part.strip() for part in value.split(",")) if value else ()


@click.group(invoke_without_command=True)
@click.option("--model", metavar="MODEL", default="demo-llava", show_default=True, help="Hub id, folder or demo model.")
@revision_option
@click.option(
    "--grid",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="YAML file; see docs/how-to/choose-bits.md.",
)
@click.option("--components", callback=words, metavar="A,B", help="What is varied [vision, qformer, language].")
@click.option("--bits", callback=numbers, default="2,3,4,5,6,8,16", show_default=True, help="Widths; 16 keeps.")
@click.option("--methods", callback=words, default="gptq", show_default=True, help="rtn, gptq, awq.")
@click.option("--groups", callback=words, default="row", show_default=True, help="Columns that share a scale, or row.")
@click.option("--blocks", callback=words, default="all", show_default=True, help="all, front, middle, end, front+end.")
@click.option("--roles", callback=words, default="all", show_default=True, help="all, attention, mlp.")
@click.option(
    "--combine",
    type=click.Choice(["product", "alone", "together"]),
    default="product",
    show_default=True,
    help="Every combination of components, one at a time, or all alike.",
)
@data_option
@click.option("--samples", type=click.IntRange(min=8), default=250, show_default=True, help="Scored on, of each task.")
@calibration_option
@samples_seed_option
@click.option("--answers", is_flag=True, help="Score generated answers by the tasks' metrics: slower, as gates do it.")
@click.option("--sequential", is_flag=True, help="Quantize every setting as an export does, sharing nothing.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of the study [studies/MODEL].")
@workers_option
@ray_option
@device_option
@json_option
@click.pass_context
@reports_errors
def study(context: click.Context, **options: Any) -> None:
    """Measure a grid of settings: components x bits x method x blocks x role, each quantized and scored.

    Settings share what is quantized, and what was measured once is never measured again: the same command goes on
    after any stop. Scores are shares of exact greedy replies, their log-likelihood, and the divergence from the full
    model. Results are in OUT/study.sqlite and OUT/study.csv.

    \b
    Examples:
      mmq study --model demo-llava
      mmq study --model demo-llava --bits 3,4 --blocks all,front,middle --roles all,attention,mlp --combine alone
      mmq study --model ./llava-1.5-7b-hf --grid grid.yaml --data coco:/data/coco --ray local
      mmq study importance studies/demo-llava
      mmq study plots studies/demo-llava
    """
    if context.invoked_subcommand is not None:
        return
    from exporter.study.show import outcome_json, outcome_page

    outcome = measure(options)
    say(outcome_json(outcome) if options["as_json"] else outcome_page(outcome))


def measure(options: dict[str, Any]) -> "Outcome":
    """Run the grid that the options name."""
    from exporter.commands.progress import ProgressDisplay
    from exporter.files.folder_lock import hold
    from exporter.quantization.workdir import LOCK
    from exporter.study.grid import points, read_grid
    from exporter.study.run import run
    from exporter.study.work import opened

    setup = setup_of(options)
    model = opened(setup)
    grid = read_grid(options["grid"]) if options["grid"] else grid_of(options, model.family)
    chosen, notes = points(grid, model.family, model.checkpoint.config)
    try:
        with (
            ProgressDisplay(options["as_json"]) as listen,
            hold(setup.folder / LOCK, setup.folder, on_event=listen),
            pool_of(options, model.device.is_cuda, len(chosen)) as pool,
        ):
            tell(notes, listen)
            return run(setup, chosen, pool, listen)
    except KeyboardInterrupt:
        kept = f"stopped; what is finished is kept in {setup.folder}"
        raise Interrupted(kept, "give the same command again to go on") from None


def tell(notes: list[str], listen: "Listener") -> None:
    """Show notes."""
    from exporter.events import Event

    for note in notes:
        listen(Event("note", 0, 0, note))


def setup_of(options: dict[str, Any]) -> "Setup":
    """What workers need to know."""
    from exporter.study.prepare import base_recipe, default_folder
    from exporter.study.work import Setup

    sources = places(options["data"])
    recipe = base_recipe(options["model"], options["revision"], sources, options["calibration"], options["seed"])
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
    """The grid that the flags describe."""
    from exporter.study.grid import parse_grid
    from exporter.study.prepare import quantizable

    axis = {"bits": options["bits"], "blocks": options["blocks"], "roles": options["roles"]}
    names = options["components"] or quantizable(family)
    content = {"components": {name: axis for name in names}, "combine": options["combine"]}
    groups = [int(group) if group.isdigit() else group for group in options["groups"]]
    return parse_grid(content | {"methods": options["methods"], "group_sizes": groups}, "the grid of these flags")


def pool_of(options: dict[str, Any], on_gpu: bool, tasks: int) -> AbstractContextManager["WorkerPool"]:
    """Where the work runs."""
    import os

    from exporter.study.pool import local, ray_cluster

    if options["ray"]:
        address = None if options["ray"] == LOCAL else options["ray"]
        return ray_cluster(address, gpus=1 if on_gpu else 0)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return local(min(options["workers"] or (1 if on_gpu else cores), max(tasks, 1)))


@study.command()
@click.argument("table", type=click.Path(path_type=Path, exists=True))
@click.option("--score", metavar="COLUMN", help="Which column is the score [score, cider, accuracy, ... as there is].")
@click.option("--where", "conditions", multiple=True, metavar="COLUMN=VALUE", help="Only rows like this; repeat.")
@click.option(
    "--usable",
    type=click.FloatRange(0, 1),
    default=0.8,
    show_default=True,
    help="Bits are usable when some setting with them keeps this share of the full score.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of forest and shuffles.")
@json_option
@reports_errors
def importance(
    table: Path, score: str | None, conditions: tuple[str, ...], usable: float, seed: int, as_json: bool
) -> None:
    """Say how much each component's bits decide the score.

    TABLE is a study's folder, or a CSV file with columns COMPONENT_bits and a score. Shares by a random forest,
    permutation and SHAP are averaged to a consensus, as in arXiv 2601.15287; beside them the fit of a line, and what
    each number of bits costs where the model still works. Needs the extra `study`.

    \b
    Examples:
      mmq study importance grid.csv --json
      mmq study importance retrieval.csv --score img_r1
      mmq study importance studies/demo-llava --where method=gptq --where blocks=all
    """
    from exporter.study.importance import importance as find
    from exporter.study.show import importance_page
    from exporter.study.table import read_table

    found = find(read_table(table, score, conditions), seed, usable)
    say(found.as_json() if as_json else importance_page(found))


@study.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of the files [FOLDER/plots].")
@click.option("--score", metavar="COLUMN", default="score", show_default=True, help="What is drawn.")
@click.option(
    "--paper",
    "papers",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="CSV file with COMPONENT_bits, bpw and a score, drawn beside; repeat.",
)
@json_option
@reports_errors
def plots(folder: Path, out: Path | None, score: str, papers: tuple[Path, ...], as_json: bool) -> None:
    """Draw what a study's FOLDER holds: PNG files, and one HTML page with all of them.

    Heat maps of bits x bits, importance, what bits cost, the front of score over bits a weight, and how sensitive each
    part is (after `mmq allocate`). Needs the extra `study`.

    \b
    Examples:
      mmq study plots studies/demo-llava
      mmq study plots studies/llava-1.5-7b-hf --paper llava_gptq_gqa.csv --out plots
    """
    from exporter.files.writing import make_folder
    from exporter.study.gallery import gather, write_page, write_pictures

    place = out or folder / "plots"
    make_folder(place)
    notes: list[str] = []
    found = gather(folder, score, papers, notes.append)
    files = [*write_pictures(found, place), write_page(found, folder.resolve().name, place / "study.html")]
    said = [str(path) for path in files]
    lines = [*(f"note: {text}" for text in notes), *(f"wrote {path}" for path in said)]
    say({"files": said, "notes": notes} if as_json else "\n".join(lines))
