"""`mmq evaluate`: measure an artifact beside its full-precision model."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.commands.options import (
    adapter_option,
    artifact_argument,
    data_option,
    device_option,
    eval_batch_option,
    eval_samples_option,
    json_option,
    reports_errors,
    say,
)
from exporter.data import places
from exporter.errors import Interrupted
from exporter.planning.overrides import adjusted
from exporter.planning.recipe_file import load_recipe

if TYPE_CHECKING:
    from exporter.evaluation.answers import Store
    from exporter.evaluation.backends import Servers


@click.command()
@artifact_argument
@click.option("--baseline", metavar="MODEL", help="Full-precision model to compare with [the artifact's source].")
@click.option("--other-baseline", is_flag=True, help="Allow a --baseline that the artifact was not made from.")
@device_option
@data_option
@eval_samples_option
@eval_batch_option
@adapter_option
@click.option("--server", metavar="URL", help="OpenAI-compatible server that serves the artifact.")
@click.option("--served-model", metavar="NAME", help="The artifact's name there [the only one].")
@click.option("--baseline-server", metavar="URL", help="Server of the full-precision model.")
@click.option("--baseline-served-model", metavar="NAME", help="Its name there [the only one].")
@click.option(
    "--concurrent", type=click.IntRange(min=1, max=1024), default=16, show_default=True, help="Open requests."
)
@click.option("--answers", type=click.Path(path_type=Path, file_okay=False), help="Kept answers [beside ARTIFACT].")
@click.option("--fresh", is_flag=True, help="Ask everything again and keep no answers.")
@json_option
@reports_errors
def evaluate(artifact: Path, device: str, data: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Measure an artifact again beside its full-precision model and decide its gates.

    The full-precision model must be the one that the artifact was made from, by the hashes in its manifest. Report and
    card name another one that --other-baseline allowed, and `mmq publish` refuses it.

    Answers are kept, so a stopped evaluation goes on when the same command is given again. With one GPU, serve one
    model after the other: --baseline-server alone asks and keeps the baseline's answers, --server then compares.

    \b
    Examples:
      mmq evaluate artifacts/demo-llava-w4-vit8 --eval-samples 1000
      mmq evaluate artifacts/mine --data coco:/data/coco --data gqa:/data/gqa
      mmq evaluate artifacts/mine --baseline-server http://127.0.0.1:8001 --server http://127.0.0.1:8000
    """
    from exporter.commands.progress import ProgressDisplay
    from exporter.commands.report_tables import report_page
    from exporter.device import choose
    from exporter.evaluation.evaluate import raise_unless_accepted
    from exporter.pipeline.reevaluation import Reevaluation

    own = load_recipe(str(artifact / "recipe.yaml"))
    more = {"eval_samples": options["eval_samples"], "eval_batch": options["eval_batch"]}
    recipe = adjusted(own, options["baseline"], None, data=data, adapter=options["adapter"], **more)
    sources, store, servers = places(data), _store(artifact, options), _servers(options)
    other = bool(options["other_baseline"])
    try:
        with ProgressDisplay(as_json) as listen:
            job = Reevaluation(artifact, recipe, choose(device), listen, sources, store, servers, other)
            if servers and not servers.artifact:
                job.collect_baseline()
                return say(_baseline_kept(store))
            found = job.measure()
    except KeyboardInterrupt:
        kept = f"answers so far are kept in {store.folder}" if store else "nothing is kept (--fresh)"
        raise Interrupted(f"stopped; {kept}", "give the same command again to go on") from None
    say(found.plain() if as_json else report_page(found))
    raise_unless_accepted(found, artifact)


def _store(artifact: Path, options: Mapping[str, Any]) -> "Store | None":
    """Where answers are kept; None with --fresh."""
    from exporter.evaluation.answers import Store
    from exporter.pipeline.measurement import default_store

    if options["fresh"]:
        return None
    return Store(options["answers"]) if options["answers"] else default_store(artifact)


def _servers(options: Mapping[str, Any]) -> "Servers | None":
    """The servers to ask; None when transformers answers in this process."""
    from exporter.evaluation.backends import Servers
    from exporter.inference.predict_server import Server

    pairs = (("baseline_server", "baseline_served_model"), ("server", "served_model"))
    for server, name in pairs:
        if options[name] and not options[server]:
            raise click.UsageError(f"--{name.replace('_', '-')} needs --{server.replace('_', '-')}")
    found = [
        Server(options[server], options[name], options["concurrent"]) if options[server] else None
        for server, name in pairs
    ]
    if not any(found):
        return None
    if options["fresh"] and not all(found):
        raise click.UsageError("--fresh with a server needs both --server and --baseline-server")
    return Servers(*found)


def _baseline_kept(store: "Store | None") -> str:
    folder = store.folder if store else ""
    return f"answers of the full-precision model are kept in {folder}; now serve the artifact and give --server"
