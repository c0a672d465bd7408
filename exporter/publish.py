"""Publishing: an artifact that is proven becomes a finished repository of the hub, in one commit.

Large files go first, by the hub library's own path, and are not sent again when the connection is lost; nobody sees
anything of them until the one commit that names all files. What is there afterwards is compared with the manifest.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from exporter.artifact import MANIFEST, REPORT, Artifact
from exporter.backends import weights_digest
from exporter.card import (
    BEGIN,
    CARD,
    DRAWINGS,
    END,
    RESULTS,
    Declared,
    base_model,
    benchmark_results,
    data_name,
    lost,
    render,
)
from exporter.checkpoint import sha256
from exporter.device import Device
from exporter.difference import difference
from exporter.errors import ArtifactError, HubError, HubMissing, PublishError
from exporter.events import Event
from exporter.facts import Facts, folder_reader, read_facts
from exporter.hub import Remote, check_name, explain, is_network, need_token, open_remote, root, speaking
from exporter.published import verify_remote
from exporter.verify import verify

Listener = Callable[[Event], None]
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
class Package:
    """Everything that will be in the repository. files: path -> a local file or bytes; removed: stale remote files."""

    files: Mapping[str, Path | bytes]
    removed: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def card(self) -> str:
        """The README.md."""
        text = self.files[CARD]
        assert isinstance(text, bytes)
        return text.decode()

    def sizes(self) -> dict[str, int]:
        """Bytes by path."""
        return {name: _size(found) for name, found in sorted(self.files.items())}


def _size(found: Path | bytes) -> int:
    return len(found) if isinstance(found, bytes) else found.stat().st_size


@dataclass(frozen=True)
class Done:
    """What was published. url: of the commit, or of the pull request."""

    url: str
    commit: str
    files: int
    bytes: int


def prove(folder: Path, device: Device, on_event: Listener) -> tuple[Facts, tuple[str, ...]]:
    """The artifact's facts, and every reason not to publish it (ArtifactError when it is no artifact at all)."""
    facts = read_facts(folder.name, folder_reader(folder))
    problems = []
    try:
        verify(folder, device, on_event)
    except ArtifactError as error:
        problems.append(error.message.replace(str(folder), folder.name))
    if facts.report is None:
        problems.append("it was never evaluated")
        return facts, tuple(problems)
    measured = facts.report.get("evaluation", {}).get("models", {}).get("artifact", {}).get("weights")
    if not problems and measured != weights_digest(Artifact.open(folder)):
        problems.append("its report was measured on other weights")
    gates = facts.report["gates"]
    if not gates:
        problems.append("its recipe has no gates, so nothing says what it may lose")
    if (facts.report.get("serving") or {}).get("problems"):
        problems.append("`mmq check` found that the engine answers otherwise")
    for gate in gates:
        if not gate["passed"]:
            problems.append(f"the gate on {gate['task']} {gate['metric']} failed: {lost(gate)}")
    return facts, tuple(problems)


def refuse_unproven(folder: Path, problems: tuple[str, ...]) -> None:
    """PublishError with every reason."""
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        hint = "`mmq evaluate` measures it again; --force publishes it all the same, and the card will say so"
        raise PublishError(f"{folder} is not published:\n{lines}", hint)


def existing(target: Target) -> Remote | None:
    """What the repository holds now, None when there is no repository; PublishError when mmq should not touch it."""
    try:
        remote = open_remote(target.repo)
    except HubMissing:
        return None
    foreign = sorted(remote.files.keys() - {".gitattributes", CARD})
    if foreign and MANIFEST not in remote.files and not target.replace:
        said = f"{target.repo} holds something that mmq did not put there ({foreign[0]}, {len(foreign)} files)"
        raise PublishError(said, "give another --repo, or --replace to publish over it")
    if target.private and not remote.private:
        raise PublishError(f"{target.repo} is there already, and public", "say --public if everybody may see this")
    if target.revision and not target.create_pr:
        try:
            return open_remote(target.repo, target.revision)
        except HubMissing:
            return remote
    return remote


def package(
    folder: Path, facts: Facts, target: Target, declared: Declared, problems: tuple[str, ...], remote: Remote | None
) -> Package:
    """Files, card and benchmark results, and what has to go. PublishError when results are claimed wrongly."""
    for task in declared.benchmarks:
        if not any(m["task"] == task for m in (facts.report or {}).get("measures", [])):
            raise PublishError(f"--benchmark {task}: the artifact was not measured on this task")
        if DRAWINGS in data_name(facts):
            raise PublishError(f"--benchmark {task}: it was measured on {data_name(facts)}, which are no benchmark")
    files: dict[str, Path | bytes] = {name: folder / name for name in facts.manifest["files"]}
    files[MANIFEST] = folder / MANIFEST
    if facts.report is not None:
        files[REPORT] = folder / REPORT
    results = benchmark_results(facts, declared)
    if results:
        files[RESULTS] = results.encode()
    changelog = history(facts, remote)
    files[CARD] = render(target.repo, facts, declared, problems, changelog).encode()
    absent = [name for name, found in files.items() if isinstance(found, Path) and not found.is_file()]
    for name in absent:  # only with --force: what is not there cannot be sent
        del files[name]
    stale = sorted(remote.files.keys() - files.keys() - {".gitattributes"}) if remote else []
    return Package(files, tuple(stale), problems)


def history(facts: Facts, remote: Remote | None) -> str:
    """The card's changelog: what changed since the artifact that is there now, before what its card says already."""
    if remote is None or MANIFEST not in remote.files:
        return ""
    before = read_facts(remote.commit, remote.read)
    changes = difference(before, facts)
    lines = [f"- {c.what}: {c.first} → {c.second}" if c.first else f"- {c.what}: {c.second}" for c in changes]
    title = f"### {datetime.now(UTC):%Y-%m-%d}, since `{remote.commit[:12]}`"
    entry = title + "\n\n" + ("\n".join(lines) or "- the same artifact with a new card")
    _, _, rest = (remote.read(CARD) or b"").decode(errors="replace").partition(BEGIN)
    earlier = rest.partition(END)[0].strip()
    return f"{entry}\n\n{earlier}" if earlier else entry


def inherited(facts: Facts, declared: Declared) -> Declared:
    """`declared` with the license of the full-precision model where none is given and the hub tells."""
    from dataclasses import replace

    base = base_model(facts, declared)
    if declared.license or not base:
        return declared
    try:
        data = _card_data(base)
    except HubError:
        return declared  # the card then has no license: better than a wrong one
    keys = ("license", "license_name", "license_link")
    return replace(declared, license={key: str(data[key]) for key in keys if data.get(key)})


def _card_data(repo: str) -> Mapping[str, Any]:
    from huggingface_hub import ModelCard

    remote = open_remote(repo)
    text = (remote.read(CARD) or b"").decode(errors="replace")
    return dict(ModelCard(text, ignore_metadata_errors=True).data.to_dict()) if text.startswith("---") else {}


def told(facts: Facts) -> str:
    """What the publisher may not know that the files tell; empty when there is nothing."""
    repo = str(facts.recipe["model"]["repo"])
    local = repo.startswith((".", "/", "~")) or repo.count("/") > 1
    return f"recipe.yaml, which is published as it is, names the source as {repo}" if local else ""


def publish(found: Package, target: Target, remote: Remote | None, on_event: Listener) -> Done:
    """Upload and commit, then compare with the manifest. HubError when the hub refuses or cannot be reached."""
    from huggingface_hub import HfApi

    check_name(target.repo)
    need_token()
    api = HfApi(library_name="mmq")
    with speaking(target.repo, "creating the repository"):
        if remote is None:
            api.create_repo(target.repo, private=target.private, exist_ok=True)
        if target.revision and not target.create_pr:
            api.create_branch(target.repo, branch=target.revision, exist_ok=True)
    parent = open_remote(target.repo, None if target.create_pr else target.revision)
    on_event(Event("note", 0, 0, f"uploading {len(found.files)} files to {target.repo}; nobody sees them yet"))
    commit, url = _commit(api, found, target, parent)
    after = open_remote(target.repo, commit)
    if not found.problems:
        verify_remote(after, on_event)
    return Done(url, commit, len(found.files), sum(found.sizes().values()))


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
                return arrived, f"{api.endpoint}/{target.repo}/commit/{arrived}"
            wait = _wait(root(error), attempt)
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
    asked = response.headers.get("Retry-After", "")
    wait = float(asked) if asked.isdigit() else 2.0**attempt
    return wait if wait <= LONGEST_WAIT else None


def _arrived(found: Package, target: Target, parent: Remote) -> str | None:
    """The commit's id when it was made although its answer was lost: a new head that holds exactly our files."""
    try:
        now = open_remote(target.repo, target.revision)
    except HubError:
        return None
    if now.commit == parent.commit or now.files.keys() - {".gitattributes"} != found.files.keys():
        return None
    sizes = found.sizes()
    same = all(now.files[name].size == size for name, size in sizes.items())
    hashed = {name: f.sha256 for name, f in now.files.items() if f.sha256 and isinstance(found.files.get(name), Path)}
    return now.commit if same and all(sha256(Path(str(found.files[n]))) == h for n, h in hashed.items()) else None
