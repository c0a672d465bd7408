"""`mmq study importance`: which component's bits decide the score."""

from pathlib import Path

import click

from exporter.cli_options import json_option, reports_errors, say


@click.group(invoke_without_command=True)
@click.pass_context
def study(context: click.Context) -> None:
    """Measure which parts of a model matter.

    \b
    Examples:
      mmq study importance grid.csv --json
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@study.command()
@click.argument("table", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--score", metavar="COLUMN", help="Which column is the score [cider, accuracy, acc, ... if there is one]."
)
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

    TABLE is a CSV file with columns COMPONENT_bits and a score. Shares by a random forest, permutation and SHAP are
    averaged to a consensus, as in arXiv 2601.15287; beside them the fit of a line, and what each number of bits costs
    where the model still works. Needs the extra `study`.

    \b
    Examples:
      mmq study importance grid.csv --json
      mmq study importance retrieval.csv --score img_r1
    """
    from exporter.study.importance import importance as measure
    from exporter.study.show import importance_page
    from exporter.study.table import read_csv

    found = measure(read_csv(table, score, conditions), seed, usable)
    say(found.as_json() if as_json else importance_page(found))
