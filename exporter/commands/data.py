"""`mmq datasets` and `mmq score`: what data sets mean, and scores of answers that something else gave."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from exporter.commands.options import json_option, reports_errors, say
from exporter.data import CONVENTIONS
from exporter.data.conventions import Convention
from exporter.model.families import FAMILIES
from exporter.tasks import TASKS

EVERY = 10**9

IN_WORDS = [name for name in TASKS if name != "retrieval"]  # its answers are ranks, not texts in a file


@click.command()
@click.argument("name", required=False, type=click.Choice(list(CONVENTIONS)))
@json_option
@reports_errors
def datasets(name: str | None, as_json: bool) -> None:
    """List the data sets that --data knows: splits, layout, prompts, metrics and license notes.

    \b
    Examples:
      mmq datasets
      mmq datasets vqav2
    """
    found = [CONVENTIONS[name]] if name else list(CONVENTIONS.values())
    if as_json:
        return say([_known(convention) for convention in found])
    if not name:
        table = Table("data set", "tasks", "test split", "license")
        for known in found:
            table.add_row(
                known.name, ", ".join(known.tasks), f"{known.splits['test']}: {known.test_size}", known.license
            )
        return say(table)
    table = Table(show_header=False, box=None)
    for key, value in _known(found[0]).items():
        shown = "\n".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else value
        table.add_row(key, ", ".join(shown) if isinstance(shown, tuple) else shown)
    say(table)


def _known(convention: Convention) -> dict[str, Any]:
    """What is known of a data set: `generation` as the paper did it, `generation here` as mmq does."""
    ours = {
        f"{family.name} {task}": f"greedy, up to {family.max_new_tokens[task]} new tokens"
        for family in FAMILIES.values()
        for task in convention.tasks
        if task in family.tasks and task in family.max_new_tokens
    }
    return asdict(convention) | {"generation here": ours}


@click.command()
@click.argument("answers", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--data", multiple=True, required=True, metavar="SOURCE", help="A folder, or NAME:PATH; see mmq datasets."
)
@click.option("--task", required=True, type=click.Choice(IN_WORDS), help="How answers are scored.")
@click.option("--split", default="test", show_default=True, help="train, validation or test.")
@click.option("--samples", type=click.IntRange(min=1), default=EVERY, help="At most so many, chosen by --seed [all].")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the choice.")
@json_option
@reports_errors
def score(answers: Path, data: tuple[str, ...], task: str, split: str, samples: int, seed: int, as_json: bool) -> None:
    """Score a file of answers: COCO's, VQAv2's or GQA's results layout, or one object of answers by id.

    The figures are those of the whole set, as papers report them; BLEU is not a mean of captions. mmq has no METEOR:
    the package pycocoevalcap computes it, with Java.

    \b
    Examples:
      mmq score captions.json --data coco:/data/coco --task captioning
      mmq score results.json --data vqav2:/data/vqa --task vqa --json
    """
    from exporter.evaluation.score_file import score as run

    found = run(answers, data, task, split, samples, seed)
    if as_json:
        return say(asdict(found))
    table = Table("metric", "score")
    for metric, value in found.figures.items():
        table.add_row(metric, f"{value:.4f}")
    say(table)
    say("; ".join(f"{key}: {value}" for key, value in found.method.items()))
    for what, ids in (
        ("samples without an answer (scored as empty)", found.unanswered),
        ("answers unused", found.unknown),
    ):
        if ids:
            say(f"{len(ids)} {what}, first {ids[0]}")
