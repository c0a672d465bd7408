"""Publishing: an artifact that is proven becomes a finished repository of the hub, in one commit.

Large files go first, by the hub library's own path, and are not sent again when the connection is lost; nobody sees
anything of them until the one commit that names all files. What is there afterwards is compared with the manifest.
"""

import re
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from exporter.artifact.manifest import MANIFEST
from exporter.distribution import DISTRIBUTION, VERSION
from exporter.errors import ArtifactError, HubError, HubMissing, PublishError
from exporter.events import Event, Listener
from exporter.model.hub import (
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
from exporter.publishing.repository import Package, same

TRIES = 3  # of the commit; uploads are tried again by the hub library itself
LONGEST_WAIT = 120.0


@dataclass(frozen=True)
class Target:
    """Where to. revision: a branch, made when it is missing. replace: also over what mmq did not put there."""

    repo: str
    revision: str | None = None
    private: bool = True
    create_pr: bool = False
    replace: bool = False


@dataclass(frozen=True)
class Done:
    """What was published. url: of the commit, or of the pull request. files, bytes: zero when nothing had to be."""

    url: str
    commit: str
    files: int
    bytes: int


def check_target(target: Target) -> None:
    """Everything about the target that is wrong without asking the hub (HubError, PublishError)."""
    check_name(target.repo)
    if target.create_pr and target.revision:
        said = f"--create-pr and --revision {target.revision}: a pull request is always against main"
        raise PublishError(said, "leave one out")
    if re.fullmatch("[0-9a-fA-F]{40}", target.revision or ""):
        raise PublishError(f"--revision {target.revision} is a commit, which never changes", "name a branch")


def existing(target: Target) -> Remote | None:
    """What the target's branch holds now (main's when it has yet to be made), None when there is no repository.

    PublishError when mmq should not touch it.
    """
    try:
        remote = open_remote(target.repo)
    except HubMissing:
        return None
    if target.private and not remote.private:
        raise PublishError(f"{target.repo} is there already, and public", "say --public if everybody may see this")
    if remote.private and not target.private:
        hint = "leave --public out, or make it public on its settings page first"
        raise PublishError(f"{target.repo} is there already, and private: --public is for new repositories", hint)
    if target.revision:
        with suppress(HubMissing):  # a new branch begins at main's head
            remote = open_remote(target.repo, target.revision)
    foreign = sorted(remote.files.keys() - {".gitattributes", CARD})
    if foreign and MANIFEST not in remote.files and not target.replace:
        where = f"{target.repo}@{target.revision}" if target.revision else target.repo
        said = f"{where} holds something that mmq did not put there ({foreign[0]}, {len(foreign)} files)"
        raise PublishError(said, "give another --repo, or --replace to publish over it")
    return remote


def publish(found: Package, target: Target, remote: Remote | None, on_event: Listener) -> Done:
    """Upload and commit on top of `remote`, then compare with the manifest.

    HubError when the hub refuses or cannot be reached, ArtifactError when what is there afterwards is not whole.
    """
    from huggingface_hub import HfApi, ModelCard

    check_target(target)
    require_token()
    with hub_errors(target.repo, "checking the card"):
        ModelCard(found.card).validate(repo_type="model")
    api = HfApi(library_name=DISTRIBUTION, library_version=VERSION)
    with without_xet():
        if remote is None:
            remote = _created(api, target)
        if target.revision:
            with hub_errors(target.repo, "making the branch"):
                api.create_branch(target.repo, branch=target.revision, revision=remote.commit, exist_ok=True)
        if found.unchanged:
            return Done(_url(api, target, remote.commit), remote.commit, 0, 0)
        on_event(Event("note", 0, 0, f"uploading {len(found.files)} files to {target.repo}; nobody sees them yet"))
        commit, url = _commit(api, found, target, remote)
        if not found.problems:
            _read_back(target.repo, commit, url, on_event)
    return Done(url, commit, len(found.files), sum(found.sizes().values()))


def _created(api: Any, target: Target) -> Remote:
    """The new repository. Somebody else may have made it meanwhile, so what is in it is looked at like any other's."""
    with hub_errors(target.repo, "creating the repository"):
        api.create_repo(target.repo, private=target.private, exist_ok=True)
    remote = existing(target)
    if remote is None or MANIFEST in remote.files:
        raise HubError(f"{target.repo}: somebody else made it at the same time", "give the same command again")
    return remote


def _url(api: Any, target: Target, commit: str) -> str:
    return f"{api.endpoint}/{target.repo}/commit/{commit}"


def _read_back(repo: str, commit: str, url: str, on_event: Listener) -> None:
    """The commit compared with its manifest; the errors say that the commit exists."""
    try:
        verify_remote(open_remote(repo, commit), on_event)
    except ArtifactError as error:
        raise ArtifactError(f"the commit was made ({url}), but {error.message}", error.hint) from None
    except HubError as error:
        said = f"the commit was made ({url}), but reading it back failed: {error.message}"
        raise HubError(said, f"look again with `mmq verify hub:{repo}@{commit}`") from None


def _commit(api: Any, found: Package, target: Target, parent: Remote) -> tuple[str, str]:
    """One commit with all files. It is tried again after a lost connection, unless it turns out to have arrived."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    adds = [CommitOperationAdd(name, content) for name, content in found.files.items()]
    operations = [*adds, *(CommitOperationDelete(name) for name in found.removed)]
    doing = "uploading"
    for attempt in range(TRIES):
        try:
            made = api.create_commit(
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
            arrived = None if target.create_pr else _arrived(found, target, parent)
            if arrived:
                return arrived, _url(api, target, arrived)
            wait = _wait(root_cause(error), attempt)
            if wait is None or target.create_pr or attempt == TRIES - 1:
                raise explained from None
            time.sleep(wait)
        else:
            return str(made.oid), str(made.pr_url or made.commit_url)
    raise AssertionError("every attempt returns or raises")


def _wait(error: Exception, attempt: int) -> float | None:
    """Seconds until it is worth another try, None when it is not."""
    if is_network(error):
        return 2.0**attempt
    response = getattr(error, "response", None)
    if response is None or not (response.status_code == 429 or response.status_code >= 500):
        return None
    asked = retry_after(response.headers.get("Retry-After"))
    wait = 2.0**attempt if asked is None else asked
    return wait if wait <= LONGEST_WAIT else None


def _arrived(found: Package, target: Target, parent: Remote) -> str | None:
    """The commit's id when it was made although its answer was lost: a new head that holds exactly our files."""
    try:
        now = open_remote(target.repo, target.revision)
    except HubError:
        return None
    expected = (parent.files.keys() - set(found.removed)) | found.files.keys()
    if now.commit == parent.commit or now.files.keys() - {".gitattributes"} != expected - {".gitattributes"}:
        return None
    return now.commit if all(same(f, now.files[name]) for name, f in found.files.items()) else None
