"""`mmq datasets` and `mmq score`: list the known data sets, and score a file of answers from another program."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.commands.options import (
    LazyChoice,
    json_option,
    print_result,
    reports_errors,
    reports_errors_without_torch,
)

if TYPE_CHECKING:
    from exporter.data.conventions import Convention, Layout

ALL_SAMPLES = 10**9


def data_sources() -> list[str]:
    """Names of all data sources."""
    from exporter.data import DATA

    return list(DATA)


def text_tasks() -> list[str]:
    """Tasks whose answers are texts in a file; those of retrieval are ranks."""
    from exporter.data.tasks import TASKS

    return [name for name in TASKS if name != "retrieval"]


@click.command()
@click.argument("name", required=False, type=LazyChoice(data_sources))
@json_option
@reports_errors_without_torch
def datasets(name: str | None, as_json: bool) -> None:
    """List the data sources of --data, or describe one.

    The description of a public data set has splits, layout, prompts, metrics and a license note; that of a layout for
    your own data has its fields and an example.

    \b
    Examples:
      mmq datasets
      mmq datasets folder
      mmq datasets vqav2
    """
    from rich.table import Table
    from rich.text import Text

    from exporter.data import CONVENTIONS, LAYOUTS

    described = {key: _convention_as_json(convention) for key, convention in CONVENTIONS.items()}
    described |= {key: asdict(layout) for key, layout in LAYOUTS.items()}
    if as_json:
        return print_result([described[name]] if name else list(described.values()))
    if not name:
        print_result(_layouts_table(list(LAYOUTS.values())))
        return print_result(_conventions_table(list(CONVENTIONS.values())))
    table = Table(show_header=False)
    for key, value in described[name].items():
        text = "\n".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else value
        text = ", ".join(text) if isinstance(text, tuple) else text
        if text:
            table.add_row(key, Text(text))
    print_result(table)


def _layouts_table(layouts: Sequence["Layout"]) -> Any:
    from rich.table import Table

    table = Table("other data", "tasks", "what it is")
    for layout in layouts:
        table.add_row(layout.name, ", ".join(layout.tasks), layout.about)
    return table


def _conventions_table(conventions: Sequence["Convention"]) -> Any:
    from rich.table import Table

    table = Table("public data set", "tasks", "test split", "license")
    for convention in conventions:
        test = f"{convention.splits['test']}: {convention.test_size}"
        table.add_row(convention.name, ", ".join(convention.tasks), test, convention.license)
    return table


def _convention_as_json(convention: "Convention") -> dict[str, Any]:
    """A data set as plain data; `generation` is the paper's setting, `generation here` is the setting of mmq."""
    from exporter.model.families import FAMILIES

    generation = {
        f"{family.name} {task}": f"greedy, up to {family.max_new_tokens[task]} new tokens"
        for family in FAMILIES.values()
        for task in convention.tasks
        if task in family.tasks and task in family.max_new_tokens
    }
    return asdict(convention) | {"generation here": generation}


@click.command()
@click.argument("answers", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--data", multiple=True, required=True, metavar="SOURCE", help="A folder, or NAME:PATH; see mmq datasets."
)
@click.option("--task", required=True, type=LazyChoice(text_tasks), help="Task whose metrics score the answers.")
@click.option("--split", default="test", show_default=True, help="train, validation or test.")
@click.option(
    "--samples", type=click.IntRange(min=1), default=ALL_SAMPLES, help="Largest number of samples [all of the split]."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed that selects the samples.")
@json_option
@reports_errors
def score(answers: Path, data: tuple[str, ...], task: str, split: str, samples: int, seed: int, as_json: bool) -> None:
    """Score a file of answers with the metrics of a task.

    The file has the results layout of COCO, VQAv2 or GQA, or is a JSON object of answers by id. The scores are those of
    the whole set, as papers report them; BLEU is not a mean over captions. mmq does not compute METEOR; the package
    pycocoevalcap does, with Java.

    \b
    Examples:
      mmq score captions.json --data coco:/data/coco --task captioning
      mmq score results.json --data vqav2:/data/vqa --task vqa --json
    """
    from rich.table import Table

    from exporter.evaluation.score_file import score as run

    result = run(answers, data, task, split, samples, seed)
    if as_json:
        return print_result(asdict(result))
    table = Table("metric", "score")
    for metric, value in result.figures.items():
        table.add_row(metric, f"{value:.4f}")
    print_result(table)
    print_result("; ".join(f"{key}: {value}" for key, value in result.method.items()))
    for label, ids in (
        ("samples without an answer (scored as empty)", result.unanswered),
        ("answers unused", result.unknown),
    ):
        if ids:
            print_result(f"{len(ids)} {label}, first {ids[0]}")
