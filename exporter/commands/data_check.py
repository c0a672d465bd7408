"""`mmq data check`: counts, splits, possible tasks, unusable rows and pictures of a data source."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.commands.next_steps import command, print_steps
from exporter.commands.options import json_option, print_result, reports_errors

if TYPE_CHECKING:
    from exporter.pipeline.data_check import DataCheck

EXAMPLES = 12  # pictures of each task and split on the page


@click.group()
def data() -> None:
    """Check data sources before a job uses them.

    \b
    Examples:
      mmq data check ./images
    """


@data.command()
@click.argument("source")
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="Pictures to decode of each task and split; all rows are counted and checked.",
)
@click.option("--page", type=click.Path(path_type=Path, dir_okay=False), help="HTML file with the first pictures.")
@json_option
@reports_errors
def check(source: str, samples: int, page: Path | None, as_json: bool) -> None:
    """Count a source's samples by task and split, and list unusable rows.

    SOURCE is a folder of images with metadata.jsonl (.csv, .parquet), a folder of parquet files, a JSON file of LLaVA's
    conversations, or NAME:PATH as for --data. The exit code is 1 if a row is unusable or if there are no samples, and 2
    if there is no such source.

    \b
    Examples:
      mmq data check ./images
      mmq data check ./images --page data.html
      mmq data check llava:conversations.json
      mmq data check coco:/data/coco --samples 100
    """
    from exporter.commands.progress import ProgressDisplay
    from exporter.data import existing_place
    from exporter.pipeline.data_check import check_data
    from exporter.pipeline.data_coverage import covered_recipes
    from exporter.publishing.report.data_page import write_data_page

    with ProgressDisplay(as_json) as listen:
        result = check_data(existing_place(source), samples, EXAMPLES, listen)
        files = [str(write_data_page(result, page))] if page else []
    if as_json:
        print_result(_plain(result, files) | {"recipes": covered_recipes(result.usable, result.trainable).options})
        if result.problems or not result.has_samples:
            raise SystemExit(1)
        return
    if result.problems or result.has_samples:  # a table without a number says nothing
        print_result(_text(result, files))
    result.raise_unless_usable()
    coverage = covered_recipes(result.usable, result.trainable)
    print_result("\n".join(coverage.lines()))
    print_steps(as_json, [command(*words) for words in coverage.commands(source)])


def _plain(result: "DataCheck", files: list[str]) -> dict[str, Any]:
    keys = ("task", "split", "available", "opened", "refusal")
    splits = [{key: getattr(part, key) for key in keys} for part in result.splits]
    plain = {"source": result.source, "tasks": result.tasks, "splits": splits}
    return {**plain, "problems": list(result.problems), "notes": list(result.notes), "files": files}


def _text(result: "DataCheck", files: list[str]) -> str:
    from exporter.publishing.report.data_page import summary

    lines = [result.source]
    for part in result.splits:
        decoded = f" ({part.opened:,} pictures decoded)" if part.opened < part.available else ""
        lines.append(f"  {part.task:12} {part.split:11} " + (f"{part.available:,}{decoded}" if part.available else "-"))
    refusals = dict.fromkeys(p.refusal for p in result.splits if p.refusal and not result.problems)
    lines += [f"  -: {refusal}" for refusal in refusals]
    lines += [f"note: {note}" for note in result.notes]
    lines += [f"unusable: {problem}" for problem in result.problems]
    return "\n".join([*lines, summary(result), *(f"wrote {name}" for name in files)])
