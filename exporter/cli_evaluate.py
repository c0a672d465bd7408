"""`mmq evaluate`: measure an artifact beside its full-precision model."""

from pathlib import Path

import click

from exporter.cli_options import (
    adjusted,
    artifact_argument,
    data_option,
    device_option,
    json_option,
    reports_errors,
    say,
)
from exporter.recipe_file import load_recipe


@click.command()
@artifact_argument
@click.option("--baseline", metavar="MODEL", help="Full-precision model to compare with [the artifact's source].")
@device_option
@data_option
@click.option("--eval-samples", type=click.IntRange(min=2), help="Test samples of each task [the recipe's].")
@json_option
@reports_errors
def evaluate(
    artifact: Path, baseline: str | None, device: str, data: Path | None, eval_samples: int | None, as_json: bool
) -> None:
    """Measure an artifact again beside its full-precision model and decide its gates.

    \b
    Example:
      mmq evaluate artifacts/demo-llava-w4-vit8 --eval-samples 1000
    """
    from exporter import show
    from exporter.device import choose
    from exporter.evaluate import raise_if_failed, write_report
    from exporter.export import evaluation_samples, measure, prepare
    from exporter.progress import Listener

    own = load_recipe(str(artifact / "recipe.yaml"))
    recipe = adjusted(own, baseline, None, eval_samples=eval_samples, data=data)
    chosen = choose(device)
    plan, checkpoint = prepare(recipe, chosen)
    with Listener(as_json) as listen:
        found = measure(checkpoint, artifact, evaluation_samples(plan, data), recipe, chosen, listen)
    write_report(artifact, found)
    say(found.as_json() if as_json else show.report_page(found))
    raise_if_failed(found, artifact)
