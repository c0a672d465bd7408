"""`mmq evaluate`: score an artifact and its full-precision model on the same samples, and decide the gates."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.commands.next_steps import print_steps
from exporter.commands.options import (
    LOCAL,
    adapter_option,
    artifact_argument,
    data_option,
    device_option,
    eval_batch_option,
    eval_samples_option,
    json_option,
    print_result,
    ray_option,
    reports_errors,
)
from exporter.commands.recipe_options import max_new_tokens_option, prompt_option, recipe_of
from exporter.commands.steps_after import after_baseline, after_evaluate
from exporter.errors import Interrupted

if TYPE_CHECKING:
    from exporter.evaluation.answers import Store
    from exporter.evaluation.backends import Servers
    from exporter.evaluation.cluster.ray_cluster import RayCluster


@click.command()
@artifact_argument
@click.option("--baseline", metavar="MODEL", help="Full-precision model to compare with [the artifact's source].")
@click.option("--other-baseline", is_flag=True, help="Allow a --baseline other than the artifact's source model.")
@device_option
@data_option
@eval_samples_option
@eval_batch_option
@adapter_option
@prompt_option
@max_new_tokens_option
@click.option("--server", metavar="URL", help="OpenAI-compatible server that serves the artifact.")
@click.option("--served-model", metavar="NAME", help="Model name of the artifact on --server [the only one].")
@click.option("--baseline-server", metavar="URL", help="Server of the full-precision model.")
@click.option("--baseline-served-model", metavar="NAME", help="Model name on --baseline-server [the only one].")
@click.option(
    "--concurrent",
    type=click.IntRange(min=1, max=1024),
    default=16,
    show_default=True,
    help="Concurrent requests to a server.",
)
@ray_option
@click.option(
    "--answers", type=click.Path(path_type=Path, file_okay=False), help="Folder that stores answers [beside ARTIFACT]."
)
@click.option("--fresh", is_flag=True, help="Ignore stored answers, generate all again, and store none.")
@json_option
@reports_errors
def evaluate(artifact: Path, device: str, data: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Measure an artifact against its full-precision model.

    mmq decides the gates of the artifact's recipe and replaces its report. The exit code is 3 if a gate failed, and
    5 if none failed but one could not be decided.

    The full-precision model must be the artifact's source by the hashes in the manifest. With --other-baseline, report
    and card name the other model, and `mmq publish` refuses the artifact.

    --ray spreads the answers over the machines of a cluster, which need mmq but no other file.

    mmq saves answers, so the same command resumes an interrupted evaluation. With one GPU, serve one model after the
    other: --baseline-server alone saves the answers of the baseline, and --server then compares.

    \b
    Examples:
      mmq evaluate artifacts/demo-llava-w4-vit8 --eval-samples 1000
      mmq evaluate artifacts/mine --data coco:/data/coco --data gqa:/data/gqa
      mmq evaluate artifacts/mine --prompt captioning='Describe the image.' --max-new-tokens captioning=100
      mmq evaluate artifacts/mine --baseline-server http://127.0.0.1:8001 --server http://127.0.0.1:8000
    """
    from exporter.commands.progress import ProgressDisplay
    from exporter.commands.report_tables import report_page
    from exporter.data import places
    from exporter.device import choose
    from exporter.evaluation.backends import refuse_hopeless
    from exporter.evaluation.evaluate import raise_unless_accepted
    from exporter.pipeline.reevaluation import Reevaluation

    overrides = {name: options[name] for name in ("adapter", "eval_samples", "eval_batch", "prompts", "max_new_tokens")}
    recipe = recipe_of(str(artifact / "recipe.yaml"), options["baseline"], overrides | {"data": data})
    sources, store = places(data), _store(artifact, options)
    servers = _servers(options, str(artifact), recipe.model.repo)
    other, hardware = bool(options["other_baseline"]), choose(device)
    if servers:
        refuse_hopeless(servers, store)
    try:
        with ProgressDisplay(as_json) as listen, _cluster(options, hardware.is_cuda) as cluster:
            job = Reevaluation(artifact, recipe, hardware, listen, sources, store, servers, other, cluster)
            if servers and not servers.artifact:
                job.collect_baseline()
                print_result(_baseline_message(store))
                return print_steps(as_json, after_baseline(artifact, data))
            report = job.measure()
    except KeyboardInterrupt:
        resume_note = f"answers so far are stored in {store.folder}" if store else "no answers are stored (--fresh)"
        raise Interrupted(f"stopped; {resume_note}", "run the same command again to resume") from None
    print_result(report.plain() if as_json else report_page(report))
    raise_unless_accepted(report, artifact, listed=not as_json)
    print_steps(as_json, after_evaluate(artifact, data))


def _store(artifact: Path, options: Mapping[str, Any]) -> "Store | None":
    """Store of answers; None with --fresh."""
    from exporter.evaluation.answers import Store
    from exporter.pipeline.measurement import default_store

    if options["fresh"]:
        return None
    return Store(options["answers"]) if options["answers"] else default_store(artifact)


def _servers(options: Mapping[str, Any], artifact: str = "", source: str | None = None) -> "Servers | None":
    """Clients of the servers; None when transformers generates the answers in this process.

    artifact, source: what the servers should serve, for hints. Raises click.UsageError for flags that need another.
    """
    from exporter.evaluation.backends import Servers
    from exporter.model.inference.predict_server import Server

    models = (("baseline_server", "baseline_served_model", source or ""), ("server", "served_model", artifact))
    for server, name, _ in models:
        if options[name] and not options[server]:
            raise click.UsageError(f"--{name.replace('_', '-')} needs --{server.replace('_', '-')}")
    servers = [
        Server(options[server], options[name], options["concurrent"], serves=model) if options[server] else None
        for server, name, model in models
    ]
    if not any(servers):
        return None
    if options["fresh"] and not all(servers):
        raise click.UsageError("--fresh with a server needs both --server and --baseline-server")
    return Servers(*servers)


def _cluster(options: Mapping[str, Any], on_gpu: bool) -> "AbstractContextManager[RayCluster | None]":
    """The cluster of --ray; None without it. Raises click.UsageError beside servers."""
    from exporter.evaluation.cluster.ray_cluster import ray_cluster

    if not options["ray"]:
        return nullcontext()
    if options["server"] or options["baseline_server"]:
        raise click.UsageError("--ray and servers exclude each other")
    return ray_cluster(None if options["ray"] == LOCAL else options["ray"], gpus=1 if on_gpu else 0)


def _baseline_message(store: "Store | None") -> str:
    folder = store.folder if store else ""
    return f"answers of the full-precision model are stored in {folder}; now serve the artifact and pass --server"
