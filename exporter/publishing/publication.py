"""The publication of an artifact: prove it, package it, upload it."""

from dataclasses import dataclass, field
from pathlib import Path

from exporter.artifact.output_folder import reading
from exporter.device import Device
from exporter.errors import PublishError
from exporter.events import Listener, notice
from exporter.files.hub import require_token
from exporter.publishing import upload
from exporter.publishing.card import CardDeclarations
from exporter.publishing.proof.prove import prove
from exporter.publishing.repository import Package, disclosure_note, package, refuse_unproven, with_source_license


@dataclass(frozen=True)
class PublishRequest:
    """What goes to the hub, and where.

    repo: `ORG/NAME`; None takes the recipe's. public: a new repository is private otherwise. force: publish an artifact
    that is not proven. accept_built_in_data: scores on the built-in drawings count. dry_run: send nothing.
    """

    artifact: Path
    repo: str | None = None
    revision: str | None = None
    public: bool = False
    create_pr: bool = False
    replace: bool = False
    force: bool = False
    accept_built_in_data: bool = False
    dry_run: bool = False
    declared: CardDeclarations = field(default_factory=CardDeclarations)


@dataclass(frozen=True)
class PublishResult:
    """The repository, its contents, and the commit; None after a dry run."""

    repo: str
    package: Package
    publication: upload.Publication | None


def publish_artifact(request: PublishRequest, device: Device, on_event: Listener) -> PublishResult:
    """Prove the artifact and put it on the hub in one commit (PublishError with every reason when it is not proven)."""
    artifact = request.artifact.resolve()  # `.` has no name
    with reading(artifact, on_event):
        summary, problems = prove(artifact, device, on_event, request.accept_built_in_data)
        if not request.force:
            refuse_unproven(artifact, problems)
        recipe = summary.recipe.publish
        repo = request.repo or recipe.repo
        if not repo:
            raise PublishError("no repository to publish to", "--repo ORG/NAME, or publish.repo in the recipe")
        private = not (request.public or not recipe.private)
        target = upload.Target(repo, request.revision, private, request.create_pr, request.replace)
        upload.check_target(target)
        if not request.dry_run:
            require_token()
        remote = None if request.dry_run and not online() else upload.existing_repository(target)
        if note := disclosure_note(summary):
            on_event(notice(note))
        declared = with_source_license(summary, request.declared)
        packaged = package(artifact, summary, repo, declared, problems, remote, target.replace)
        return PublishResult(
            repo, packaged, None if request.dry_run else upload.publish(packaged, target, remote, on_event)
        )


def benchmark(text: str) -> tuple[str, tuple[str, str]]:
    """`vqa=org/dataset:task` -> task, (data set, its task id)."""
    task, equals, place = text.partition("=")
    dataset, colon, identity = place.rpartition(":")
    if not (task and equals and dataset.count("/") == 1 and colon and identity):
        raise PublishError(f"--benchmark {text}: not understood", "write TASK=ORG/DATASET:TASK_ID")
    return task, (dataset, identity)


def online() -> bool:
    """Whether a dry run may read from the hub; it does not need to."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import is_offline_mode

    return not is_offline_mode() and bool(get_token())
