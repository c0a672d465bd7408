"""`mmq publish` and `mmq diff`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from exporter.commands.options import artifact_argument, device_option, json_option, reports_errors, say
from exporter.errors import PublishError
from exporter.events import Event


@click.command()
@artifact_argument
@click.option("--repo", metavar="ORG/NAME", help="Repository on the hub, made when it is missing [the recipe's].")
@click.option("--revision", metavar="BRANCH", help="Branch to commit to, made when it is missing [main].")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--public", is_flag=True, help="Let everybody see it; without this a new repository is private.")
@click.option("--replace", is_flag=True, help="Publish over what mmq did not put there; its weights go.")
@click.option("--force", is_flag=True, help="Publish an artifact that is not proven; the card then says so.")
@click.option(
    "--accept-built-in-data",
    is_flag=True,
    help="Publish scores on the built-in drawings; the card says so.",
)
@click.option("--dry-run", is_flag=True, help="List every file and show the card; send nothing.")
@click.option("--base-model", metavar="ORG/NAME", help="The source on the hub [known when it came from there].")
@click.option("--license", "license_id", metavar="ID", help="License of the source [read from its card].")
@click.option("--dataset", "datasets", metavar="ID", multiple=True, help="Data set it was calibrated with, on the hub.")
@click.option("--language", "languages", metavar="CODE", multiple=True, help="Language, such as en.")
@click.option(
    "--benchmark",
    "benchmarks",
    metavar="TASK=ORG/DATASET:TASK_ID",
    multiple=True,
    help="The test samples are this benchmark's: writes the hub's .eval_results too.",
)
@device_option
@json_option
@reports_errors
def publish(artifact: Path, device: str, as_json: bool, dry_run: bool, force: bool, **said: Any) -> None:
    """Put a proven artifact on the hub, in one commit: weights, processor, model card, manifest and report.

    Refused when `mmq verify` fails, a gate failed or nothing was measured. An upload that was cut goes on when the
    same command is given again. The token is the hub library's: `hf auth login`, or HF_TOKEN.

    \b
    Examples:
      mmq publish artifacts/demo-llava-w4-vit8 --repo me/demo-llava-w4-vit8 --dry-run
      mmq publish artifacts/llava-w4 --repo me/llava-1.5-7b-w4 --public
      mmq publish artifacts/llava-w4 --repo org/llava-w4 --create-pr
    """
    from exporter.artifact.output import reading
    from exporter.commands.progress import ProgressDisplay
    from exporter.device import choose
    from exporter.model.hub import need_token
    from exporter.publishing import repository as made
    from exporter.publishing import upload as work
    from exporter.publishing.card import CardDeclarations
    from exporter.publishing.proof import prove

    artifact = artifact.resolve()  # `.` has no name
    with ProgressDisplay(as_json) as listen, reading(artifact, listen):
        summary, problems = prove(artifact, choose(device), listen, said["accept_built_in_data"])
        if not force:
            made.refuse_unproven(artifact, problems)
        wanted = summary.recipe.publish
        repo = said["repo"] or wanted.repo
        if not repo:
            raise PublishError("no repository to publish to", "--repo ORG/NAME, or publish.repo in the recipe")
        private = not (said["public"] or not wanted.private)
        target = work.Target(repo, said["revision"], private, said["create_pr"], said["replace"])
        work.check_target(target)
        license_keys = {"license": said["license_id"]} if said["license_id"] else {}
        tasks = dict(benchmark(text) for text in said["benchmarks"])
        declared = CardDeclarations(said["base_model"], license_keys, said["datasets"], said["languages"], tasks)
        if not dry_run:
            need_token()
        remote = None if dry_run and not online() else work.existing_repository(target)
        if note := made.disclosure_note(summary):
            listen(Event("note", 0, 0, note))
        declared = made.with_source_license(summary, declared)
        found = made.package(artifact, summary, repo, declared, problems, remote, target.replace)
        if dry_run:
            return say(listing(found) if as_json else page(repo, found))
        done = work.publish(found, target, remote, listen)
    if not done.files and not as_json:
        return say(f"nothing to do: {done.url} holds exactly this")
    say(asdict(done) if as_json else f"published {done.files} files, {done.bytes:,} bytes: {done.url}")


def check_push(repo: str, skip_evaluation: bool) -> None:
    """What `mmq export --push` can know before hours of work: name, token, and that something will be measured."""
    from exporter.model.hub import check_name, need_token

    if skip_evaluation:
        raise PublishError("--push and --skip-evaluation: what was never measured is not published", "leave one out")
    check_name(repo)
    need_token()


def benchmark(text: str) -> tuple[str, tuple[str, str]]:
    """`vqa=org/dataset:task` -> task, (data set, its task id)."""
    task, equals, place = text.partition("=")
    dataset, colon, identity = place.rpartition(":")
    if not (task and equals and dataset.count("/") == 1 and colon and identity):
        raise PublishError(f"--benchmark {text}: not understood", "write TASK=ORG/DATASET:TASK_ID")
    return task, (dataset, identity)


def online() -> bool:
    """Whether a dry run may look at the hub: it can do without."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import is_offline_mode

    return not is_offline_mode() and bool(get_token())


def listing(found: Any) -> dict[str, Any]:
    """What would be published, as plain data."""
    return {
        "files": found.sizes(),
        "removed": list(found.removed),
        "unchanged": found.unchanged,
        "problems": list(found.problems),
        "card": found.card,
    }


def page(repo: str, found: Any) -> str:
    """What would be published, for people."""
    lines = [f"would publish to {repo}:", *(f"  {size:>14,}  {name}" for name, size in found.sizes().items())]
    lines += [f"  removed:        {name}" for name in found.removed]
    lines += ["  nothing to do: the repository holds exactly this already"] if found.unchanged else []
    return "\n".join([*lines, "", found.card])


def verify_published(place: str, as_json: bool) -> None:
    """`mmq verify hub:ORG/NAME`."""
    from exporter.commands.progress import ProgressDisplay
    from exporter.model.hub import open_remote, split
    from exporter.publishing.remote_check import verify_remote

    with ProgressDisplay(as_json) as listen:
        found = verify_remote(open_remote(*split(place)), listen)
    hashed = f"verified {found.name}: {found.files} files equal by hash, {found.linears} packed linears found by name"
    say(asdict(found) if as_json else f"{hashed}; {found.fetched:,} bytes fetched")


@click.command()
@click.argument("first")
@click.argument("second")
@json_option
@reports_errors
def diff(first: str, second: str, as_json: bool) -> None:
    """Show what two artifacts have not in common: recipe, bits, scores, size, versions.

    An artifact is a folder, or `hub:ORG/NAME` or `hub:ORG/NAME@REVISION`.

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
        return say([asdict(change) for change in changes])
    say(difference_table(first, second, changes) if changes else "no difference in what their manifests say")
