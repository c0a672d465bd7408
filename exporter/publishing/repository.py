"""Prepare the content of a hub repository: files, card, changelog, and stale files to remove."""

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from yaml import YAMLError

from exporter.artifact.artifact import REPORT
from exporter.artifact.manifest import MANIFEST
from exporter.errors import ArtifactError, HubError, PublishError
from exporter.files.file_hashes import sha256
from exporter.files.hub import Remote, RemoteFile, open_remote
from exporter.publishing.artifact_diff import difference
from exporter.publishing.artifact_summary import Summary, read_summary
from exporter.publishing.card import (
    BEGIN,
    CARD,
    DRAWINGS,
    END,
    RESULTS,
    CardDeclarations,
    base_model,
    benchmark_results,
    data_name,
    render,
)

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Package:
    """Content of a repository. files: path -> local file or bytes. removed: stale remote files to delete.

    unchanged: whether the repository already has exactly this content.
    """

    files: Mapping[str, Path | bytes]
    removed: tuple[str, ...]
    problems: tuple[str, ...]
    unchanged: bool = False

    @property
    def card(self) -> str:
        """Text of README.md."""
        text = self.files[CARD]
        assert isinstance(text, bytes)
        return text.decode()

    def sizes(self) -> dict[str, int]:
        """Path -> size in bytes."""
        return {name: _size(content) for name, content in sorted(self.files.items())}


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def refuse_unproven(folder: Path, problems: tuple[str, ...]) -> None:
    """PublishError that lists all problems."""
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        hint = "`mmq evaluate` evaluates it again; --force publishes it anyway, and the card then lists these problems"
        raise PublishError(f"mmq does not publish {folder}:\n{lines}", hint)


def package(
    folder: Path,
    summary: Summary,
    repo: str,
    declared: CardDeclarations,
    problems: tuple[str, ...],
    remote: Remote | None,
    replace: bool = False,
) -> Package:
    """Collect files, card and benchmark results, and the remote files to remove.

    replace: also remove weights that mmq did not publish. PublishError when a benchmark was not measured or the
    repository has foreign weights; ArtifactError when the manifest names a symbolic link.
    """
    check_declared(declared)
    for task in declared.benchmarks:
        if not any(measure.task == task for measure in (summary.report.measures if summary.report else ())):
            raise PublishError(f"--benchmark {task}: the artifact was not measured on this task")
        if DRAWINGS in data_name(summary):
            raise PublishError(
                f"--benchmark {task}: the artifact was measured on {data_name(summary)}, not on a benchmark data set"
            )
    files = local_files(folder, summary)
    results = benchmark_results(summary, declared)
    if results:
        files[RESULTS] = results.encode()
    removed = stale_files(remote, {*files, CARD}, replace) if remote else ()
    earlier = stored_changelog(remote)
    files[CARD] = render(repo, summary, declared, problems, earlier).encode()
    if remote and not removed and all(same_content(content, remote.files.get(name)) for name, content in files.items()):
        return Package(files, (), problems, unchanged=True)
    changelog = updated_changelog(summary, remote, earlier)
    files[CARD] = render(repo, summary, declared, problems, changelog).encode()
    return Package(files, removed, problems)


def check_declared(declared: CardDeclarations) -> None:
    """PublishError when the hub would reject the publisher's values for the card; the hub has further rules."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    problems = []
    for option, name in [("--base-model", declared.base_model), *(("--dataset", name) for name in declared.datasets)]:
        try:
            validate_repo_id(name or "any")
        except HFValidationError:
            problems.append(f"{option} {name} is not a hub id like ORG/NAME")
    license_id = declared.license.get("license", "any")
    if not re.fullmatch("[a-z0-9][a-z0-9.+-]*", license_id):
        problems.append(
            f"--license {license_id} is not a license identifier of the hub, such as mit, apache-2.0 or other"
        )
    codes = [code for code in declared.language if not re.fullmatch("[a-z]{2,3}(-[A-Za-z0-9]+)*", code)]
    problems += [f"--language {code} is not a language code such as en" for code in codes]
    if problems:
        raise PublishError("the card would be invalid:\n" + "\n".join(f"  {line}" for line in problems))


def local_files(folder: Path, summary: Summary) -> dict[str, Path | bytes]:
    """Name -> path of manifest, report and the files that the manifest names; missing files are left out.

    The manifest is untrusted: ArtifactError when it names a symbolic link, which may point out of the folder.
    """
    names = [*summary.manifest.files, MANIFEST, *([REPORT] if summary.report is not None else [])]
    outside = [name for name in names if (folder / name).is_symlink()]
    if outside:
        lines = "\n".join(f"  {name}" for name in outside)
        raise ArtifactError(f"{folder}: mmq publishes only plain files of this folder, not symbolic links:\n{lines}")
    return {name: folder / name for name in names if (folder / name).is_file()}


def stale_files(remote: Remote, new: set[str], replace: bool) -> tuple[str, ...]:
    """Remote files of an earlier artifact that are not in the new one: files of its manifest, and mmq's own files.

    Other files stay, except weights that mmq did not publish, because vLLM would load them too: PublishError, or with
    `replace` they are removed as well.
    """
    ours = {RESULTS}
    if MANIFEST in remote.files:
        ours |= {MANIFEST, REPORT}
        with suppress(ArtifactError):  # a damaged manifest does not identify mmq's files
            ours |= set(read_summary(remote.name, remote.read).manifest.files)
    others = remote.files.keys() - new - {".gitattributes"}
    weights = {name for name in others - ours if "/" not in name and (name.endswith(".safetensors") or name == INDEX)}
    if weights and not replace:
        message = f"{remote.repo} has weights that mmq did not publish: {', '.join(sorted(weights))}"
        raise PublishError(message, "vLLM would load them too: delete them, or give --replace to remove them")
    return tuple(sorted((others & ours) | weights))


def same_content(local: Path | bytes, remote: RemoteFile | None) -> bool:
    """Whether a remote file has this content: compares sha256 where the hub reports it, else git's blob hash."""
    if remote is None or remote.size != _size(local):
        return False
    if remote.sha256 is not None:
        return remote.sha256 == (hashlib.sha256(local).hexdigest() if isinstance(local, bytes) else sha256(local))
    content = local if isinstance(local, bytes) else local.read_bytes()
    return remote.git == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def stored_changelog(remote: Remote | None) -> str:
    """Changelog entries of the card in the repository; empty without an earlier artifact."""
    if remote is None or MANIFEST not in remote.files:
        return ""
    _, _, after = (remote.read(CARD) or b"").decode(errors="replace").partition(BEGIN)
    return after.partition(END)[0].strip()


def updated_changelog(summary: Summary, remote: Remote | None, earlier: str) -> str:
    """Changelog of the new card: differences from the artifact in the repository, then the `earlier` entries."""
    if remote is None or MANIFEST not in remote.files:
        return ""
    try:
        changes = difference(read_summary(remote.name, remote.read), summary)
    except ArtifactError:
        lines = ["- mmq could not read the previous artifact, so the changes are unknown"]
    else:
        lines = [f"- {c.what}: {c.first} → {c.second}" if c.first else f"- {c.what}: {c.second}" for c in changes]
    title = f"### {datetime.now(UTC):%Y-%m-%d}, since `{remote.commit[:12]}`"
    entry = title + "\n\n" + ("\n".join(lines) or "- the same artifact with a new card")
    return f"{entry}\n\n{earlier}" if earlier else entry


def with_source_license(summary: Summary, declared: CardDeclarations) -> CardDeclarations:
    """`declared` with the license of the full-precision model, where the publisher gives none and the hub has one."""
    from dataclasses import replace

    base = base_model(summary, declared)
    if declared.license or not base:
        return declared
    try:
        data = _card_data(base)
    except (HubError, ValueError, TypeError, YAMLError):
        return declared  # a card without license is better than one with a wrong license
    keys = ("license", "license_name", "license_link")
    return replace(declared, license={key: str(data[key]) for key in keys if data.get(key)})


def _card_data(repo: str) -> Mapping[str, Any]:
    from huggingface_hub import ModelCard

    remote = open_remote(repo)
    text = (remote.read(CARD) or b"").decode(errors="replace")
    return dict(ModelCard(text, ignore_metadata_errors=True).data.to_dict()) if text.startswith("---") else {}


def disclosure_note(summary: Summary) -> str:
    """Note that recipe.yaml, which is published, contains local paths; empty when it contains none."""
    model = summary.recipe.model
    paths = [path for path in (model.repo, model.adapter) if path]
    local = [path for path in paths if path.startswith((".", "/", "~")) or path.count("/") > 1]
    return f"recipe.yaml is published unchanged and contains the local path {' and '.join(local)}" if local else ""
