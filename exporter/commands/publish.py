"""`mmq publish` and `mmq diff`: upload an artifact to the hub, and compare two artifacts."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from exporter.commands.next_steps import command, print_steps
from exporter.commands.options import artifact_argument, device_option, json_option, print_result, reports_errors
from exporter.commands.steps_after import after_diff, given
from exporter.errors import PublishError

REQUEST_OPTIONS = ("repo", "revision", "public", "create_pr", "replace", "force", "accept_built_in_data", "dry_run")


@click.command()
@artifact_argument
@click.option("--repo", metavar="ORG/NAME", help="Repository on the hub, created if missing [the recipe's].")
@click.option("--revision", metavar="BRANCH", help="Branch to commit to, created if missing [main].")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--public", is_flag=True, help="Make the repository public; without it a new one is private.")
@click.option(
    "--replace", is_flag=True, help="Overwrite a repository that mmq did not publish, and delete its weights."
)
@click.option("--force", is_flag=True, help="Publish an unproven artifact; the card states that it is unproven.")
@click.option(
    "--accept-built-in-data",
    is_flag=True,
    help="Publish scores on the built-in drawings; the card states this.",
)
@click.option("--dry-run", is_flag=True, help="List every file and show the card; upload nothing.")
@click.option("--base-model", metavar="ORG/NAME", help="Source model on the hub [recorded if it came from the hub].")
@click.option("--license", "license_id", metavar="ID", help="License of the source model [read from its card].")
@click.option(
    "--dataset", "datasets", metavar="ID", multiple=True, help="Hub id of a calibration data set; repeatable."
)
@click.option("--language", "languages", metavar="CODE", multiple=True, help="Language code, such as en; repeatable.")
@click.option(
    "--benchmark",
    "benchmarks",
    metavar="TASK=ORG/DATASET:TASK_ID",
    multiple=True,
    help="Declare that the test samples are those of this benchmark; also writes .eval_results for the hub.",
)
@device_option
@json_option
@reports_errors
def publish(artifact: Path, device: str, as_json: bool, **options: Any) -> None:
    """Upload a proven artifact to the hub in one commit.

    The commit contains weights, processor, model card, manifest and report. mmq refuses an artifact if `mmq verify`
    fails, if a gate failed or if no task was measured. The same command resumes an interrupted upload. Authenticate
    with `hf auth login` or the variable HF_TOKEN.

    \b
    Examples:
      mmq publish artifacts/demo-llava-w4-vit8 --repo me/demo-llava-w4-vit8 --dry-run
      mmq publish artifacts/llava-w4 --repo me/llava-1.5-7b-w4 --public
      mmq publish artifacts/llava-w4 --repo org/llava-w4 --create-pr
    """
    from exporter.commands.progress import ProgressDisplay
    from exporter.device import choose
    from exporter.publishing.card import CardDeclarations
    from exporter.publishing.publication import PublishRequest, benchmark, publish_artifact

    license_keys = {"license": options["license_id"]} if options["license_id"] else {}
    tasks = dict(benchmark(text) for text in options["benchmarks"])
    names = (options["base_model"], license_keys, options["datasets"], options["languages"])
    request = PublishRequest(
        artifact, declared=CardDeclarations(*names, tasks), **{name: options[name] for name in REQUEST_OPTIONS}
    )
    with ProgressDisplay(as_json) as listen:
        result = publish_artifact(request, choose(device), listen)
    upload = result.publication
    if upload is None:
        print_result(listing(result.package) if as_json else page(result.repo, result.package))
        steps = [] if result.package.unchanged else [command(*given(click.get_current_context(), ("dry_run",)))]
        return print_steps(as_json, steps)
    if not upload.files and not as_json:
        return print_result(f"nothing to do: {upload.url} already holds these files")
    print_result(asdict(upload) if as_json else f"published {upload.files} files, {upload.bytes:,} bytes: {upload.url}")


def check_push(repo: str, skip_evaluation: bool) -> None:
    """Check `mmq export --push` before the export starts: repository name, token, and that evaluation is on."""
    from exporter.files.hub import check_name, require_token

    if skip_evaluation:
        raise PublishError(
            "--push and --skip-evaluation exclude each other: mmq publishes only measured artifacts", "drop one of them"
        )
    check_name(repo)
    require_token()


def listing(package: Any) -> dict[str, Any]:
    """Files, problems and card of a dry run as plain data."""
    return {
        "files": package.sizes(),
        "removed": list(package.removed),
        "unchanged": package.unchanged,
        "problems": list(package.problems),
        "card": package.card,
    }


def page(repo: str, package: Any) -> str:
    """Files and card of a dry run as text."""
    lines = [f"would publish to {repo}:", *(f"  {size:>14,}  {name}" for name, size in package.sizes().items())]
    lines += [f"  removed:        {name}" for name in package.removed]
    lines += ["  nothing to do: the repository already holds these files"] if package.unchanged else []
    return "\n".join([*lines, "", package.card])


def verify_published(place: str, as_json: bool) -> None:
    """Verify an artifact on the hub (`mmq verify hub:ORG/NAME`) and print the result."""
    from exporter.commands.progress import ProgressDisplay
    from exporter.files.hub import open_remote, parse_place
    from exporter.publishing.remote_check import verify_remote

    with ProgressDisplay(as_json) as listen:
        result = verify_remote(open_remote(*parse_place(place)), listen)
    summary = (
        f"verified {result.name}: {result.files} files equal by hash, {result.linears} packed linears present by name"
    )
    print_result(asdict(result) if as_json else f"{summary}; {result.fetched:,} bytes fetched")


@click.command()
@click.argument("first")
@click.argument("second")
@json_option
@reports_errors
def diff(first: str, second: str, as_json: bool) -> None:
    """Show the differences between two artifacts.

    mmq compares recipe, bits, scores, size and versions; a change is SECOND minus FIRST. Scores of other samples (their
    number, data or seed) are marked as not comparable. FIRST and SECOND are folders, `hub:ORG/NAME` or
    `hub:ORG/NAME@REVISION`.

    \b
    Examples:
      mmq diff artifacts/demo-llava-w4-vit8 artifacts/demo-llava-w4-vit4
      mmq diff hub:me/llava-w4 artifacts/llava-w4
    """
    from exporter.commands.tables import difference_table
    from exporter.publishing.artifact_diff import difference
    from exporter.publishing.artifact_summary import read_place

    changes = difference(read_place(first), read_place(second))
    if as_json:
        return print_result([asdict(change) for change in changes])
    print_result(difference_table(first, second, changes) if changes else "no difference: the manifests agree")
    print_steps(as_json, after_diff((first, second)))
