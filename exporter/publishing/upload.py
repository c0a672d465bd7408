"""Upload a prepared artifact to a hub repository in one commit, and verify the commit.

The hub library uploads large files first and does not send them again after a lost connection. They become visible
only with the commit. Afterwards mmq compares the repository with the manifest.
"""

import re
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from exporter.artifact.manifest import MANIFEST
from exporter.distribution import DISTRIBUTION, VERSION
from exporter.errors import ArtifactError, HubError, HubMissing, PublishError
from exporter.events import Listener, notice
from exporter.files.hub import (
    Remote,
    check_name,
    explain,
    hub_errors,
    is_network,
    open_remote,
    require_token,
    retry_after,
    root_cause,
    without_xet,
)
from exporter.publishing.card import CARD
from exporter.publishing.remote_check import verify_remote
from exporter.publishing.repository import Package, same_content

TRIES = 3  # attempts of the commit; the hub library itself repeats uploads
LONGEST_WAIT = 120.0  # seconds


@dataclass(frozen=True)
class Target:
    """Target repository. revision: branch, created when it is missing. replace: whether to replace foreign files."""

    repo: str
    revision: str | None = None
    private: bool = True
    create_pr: bool = False
    replace: bool = False


@dataclass(frozen=True)
class Publication:
    """Result of a publication. url: of the commit or pull request. files, bytes: uploaded; 0 when nothing changed."""

    url: str
    commit: str
    files: int
    bytes: int


def check_target(target: Target) -> None:
    """Check the target without a request to the hub; HubError or PublishError when it is invalid."""
    check_name(target.repo)
    if target.create_pr and target.revision:
        message = (
            f"--create-pr and --revision {target.revision} exclude each other: a pull request is always against main"
        )
        raise PublishError(message, "leave out one of them")
    if re.fullmatch("[0-9a-fA-F]{40}", target.revision or ""):
        raise PublishError(
            f"--revision {target.revision} is a commit, which cannot change", "give the name of a branch"
        )


def existing_repository(target: Target) -> Remote | None:
    """Current content of the target's branch (of main for a new branch); None when the repository does not exist.

    PublishError when mmq must not change the repository.
    """
    try:
        remote = open_remote(target.repo)
    except HubMissing:
        return None
    if target.private and not remote.private:
        raise PublishError(f"{target.repo} exists and is public", "give --public if everybody may see the artifact")
    if remote.private and not target.private:
        hint = "leave out --public, or first make the repository public on its settings page"
        raise PublishError(f"{target.repo} exists and is private; --public applies only to new repositories", hint)
    if target.revision:
        with suppress(HubMissing):  # a new branch begins at main's head
            remote = open_remote(target.repo, target.revision)
    foreign = sorted(remote.files.keys() - {".gitattributes", CARD})
    if foreign and MANIFEST not in remote.files and not target.replace:
        where = f"{target.repo}@{target.revision}" if target.revision else target.repo
        message = f"{where} has {len(foreign)} files that mmq did not publish, such as {foreign[0]}"
        raise PublishError(message, "give another --repo, or --replace to replace them")
    return remote


def publish(package: Package, target: Target, remote: Remote | None, on_event: Listener) -> Publication:
    """Upload and commit on top of `remote`, then compare the commit with the manifest.

    HubError when the hub refuses or cannot be reached, ArtifactError when the commit does not match the manifest.
    """
    from huggingface_hub import HfApi, ModelCard

    check_target(target)
    require_token()
    with hub_errors(target.repo, "checking the card"):
        ModelCard(package.card).validate(repo_type="model")
    api = HfApi(library_name=DISTRIBUTION, library_version=VERSION)
    with without_xet():
        if remote is None:
            remote = _created(api, target)
        if target.revision:
            with hub_errors(target.repo, "making the branch"):
                api.create_branch(target.repo, branch=target.revision, revision=remote.commit, exist_ok=True)
        if package.unchanged:
            return Publication(_url(api, target, remote.commit), remote.commit, 0, 0)
        on_event(notice(f"uploading {len(package.files)} files to {target.repo}; they become visible with the commit"))
        commit, url = _commit(api, package, target, remote)
        if not package.problems:
            _read_back(target.repo, commit, url, on_event)
    return Publication(url, commit, len(package.files), sum(package.sizes().values()))


def _created(api: Any, target: Target) -> Remote:
    """Create the repository. Another process may have created it in the meantime, so its content is checked too."""
    with hub_errors(target.repo, "creating the repository"):
        api.create_repo(target.repo, private=target.private, exist_ok=True)
    remote = existing_repository(target)
    if remote is None or MANIFEST in remote.files:
        raise HubError(f"another process created {target.repo} at the same time", "run the same command again")
    return remote


def _url(api: Any, target: Target, commit: str) -> str:
    return f"{api.endpoint}/{target.repo}/commit/{commit}"


def _read_back(repo: str, commit: str, url: str, on_event: Listener) -> None:
    """Compare the commit with its manifest; errors state that the commit exists."""
    try:
        verify_remote(open_remote(repo, commit), on_event)
    except ArtifactError as error:
        raise ArtifactError(f"the commit exists ({url}), but {error.message}", error.hint) from None
    except HubError as error:
        message = f"the commit exists ({url}), but mmq could not read it back: {error.message}"
        raise HubError(message, f"verify it with `mmq verify hub:{repo}@{commit}`") from None


def _commit(api: Any, package: Package, target: Target, parent: Remote) -> tuple[str, str]:
    """Make one commit with all files; return its id and URL. Repeat after a lost connection unless it arrived."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    adds = [CommitOperationAdd(name, content) for name, content in package.files.items()]
    operations = [*adds, *(CommitOperationDelete(name) for name in package.removed)]
    doing = "uploading"
    for attempt in range(TRIES):
        try:
            info = api.create_commit(
                target.repo,
                operations,
                commit_message="Artifact by mmq",
                revision=target.revision,
                create_pr=target.create_pr,
                parent_commit=parent.commit,
            )
        except Exception as error:
            explained = explain(error, target.repo, doing)
            if explained is None:
                raise
            arrived = None if target.create_pr else _arrived(package, target, parent)
            if arrived:
                return arrived, _url(api, target, arrived)
            wait = _wait(root_cause(error), attempt)
            if wait is None or target.create_pr or attempt == TRIES - 1:
                raise explained from None
            time.sleep(wait)
        else:
            return str(info.oid), str(info.pr_url or info.commit_url)
    raise AssertionError("every attempt returns or raises")


def _wait(error: Exception, attempt: int) -> float | None:
    """Seconds until the next attempt; None when another attempt is useless."""
    if is_network(error):
        return 2.0**attempt
    response = getattr(error, "response", None)
    if response is None or not (response.status_code == 429 or response.status_code >= 500):
        return None
    requested = retry_after(response.headers.get("Retry-After"))
    wait = 2.0**attempt if requested is None else requested
    return wait if wait <= LONGEST_WAIT else None


def _arrived(package: Package, target: Target, parent: Remote) -> str | None:
    """Id of a commit whose response was lost: a new head with exactly our files. None when there is none."""
    try:
        head = open_remote(target.repo, target.revision)
    except HubError:
        return None
    expected = (parent.files.keys() - set(package.removed)) | package.files.keys()
    if head.commit == parent.commit or head.files.keys() - {".gitattributes"} != expected - {".gitattributes"}:
        return None
    return head.commit if all(same_content(f, head.files[name]) for name, f in package.files.items()) else None
