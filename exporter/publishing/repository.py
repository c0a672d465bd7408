"""What will be in the repository: proof that it may be published, files, card, changelog, and what has to go."""

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
from exporter.model.hub import Remote, RemoteFile, open_remote
from exporter.publishing.artifact_diff import difference
from exporter.publishing.artifact_summary import Summary, read_summary
from exporter.publishing.card import (
    BEGIN,
    CARD,
    DRAWINGS,
    END,
    RESULTS,
    Declared,
    base_model,
    benchmark_results,
    data_name,
    render,
)
from exporter.serving.launch import lacks_start

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Package:
    """Everything that will be in the repository. files: path -> a local file or bytes; removed: stale remote files.

    unchanged: the repository holds exactly this already.
    """

    files: Mapping[str, Path | bytes]
    removed: tuple[str, ...]
    problems: tuple[str, ...]
    unchanged: bool = False

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


def refuse_unproven(folder: Path, problems: tuple[str, ...]) -> None:
    """PublishError with every reason."""
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        hint = "`mmq evaluate` measures it again; --force publishes it all the same, and the card will say so"
        raise PublishError(f"{folder} is not published:\n{lines}", hint)


def package(
    folder: Path,
    summary: Summary,
    repo: str,
    declared: Declared,
    problems: tuple[str, ...],
    remote: Remote | None,
    replace: bool = False,
) -> Package:
    """Files, card and benchmark results, and what has to go.

    replace: also weights that mmq did not put there go. PublishError when results are claimed wrongly or foreign
    weights are in the way, ArtifactError when the manifest names anything but plain files of the folder.
    """
    check_declared(declared)
    for task in declared.benchmarks:
        if not any(measure.task == task for measure in (summary.report.measures if summary.report else ())):
            raise PublishError(f"--benchmark {task}: the artifact was not measured on this task")
        if DRAWINGS in data_name(summary):
            raise PublishError(f"--benchmark {task}: it was measured on {data_name(summary)}, which are no benchmark")
    files = local_files(folder, summary)
    results = benchmark_results(summary, declared)
    if results:
        files[RESULTS] = results.encode()
    removed = stale(remote, {*files, CARD}, replace) if remote else ()
    earlier = changelog(remote)
    lacking = lacks_start(folder)
    files[CARD] = render(repo, summary, declared, problems, earlier, lacking).encode()
    if remote and not removed and all(same(found, remote.files.get(name)) for name, found in files.items()):
        return Package(files, (), problems, unchanged=True)
    files[CARD] = render(repo, summary, declared, problems, history(summary, remote, earlier), lacking).encode()
    return Package(files, removed, problems)


def check_declared(declared: Declared) -> None:
    """PublishError when the hub would not take the card for what its publisher said; the hub knows more rules."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    problems = []
    for option, name in [("--base-model", declared.base_model), *(("--dataset", name) for name in declared.datasets)]:
        try:
            validate_repo_id(name or "any")
        except HFValidationError:
            problems.append(f"{option} {name}: not a hub id like ORG/NAME")
    license_id = declared.license.get("license", "any")
    if not re.fullmatch("[a-z0-9][a-z0-9.+-]*", license_id):
        problems.append(f"--license {license_id}: not an identifier of the hub, such as mit, apache-2.0 or other")
    codes = [code for code in declared.language if not re.fullmatch("[a-z]{2,3}(-[A-Za-z0-9]+)*", code)]
    problems += [f"--language {code}: not a code such as en" for code in codes]
    if problems:
        raise PublishError("the card would not be valid:\n" + "\n".join(f"  {line}" for line in problems))


def local_files(folder: Path, summary: Summary) -> dict[str, Path | bytes]:
    """What the manifest names, manifest and report; what is absent is left out (a reason not to publish without force).

    The manifest may be anybody's: ArtifactError, always, when it names a link, which leads out of the folder.
    """
    names = [*summary.manifest.files, MANIFEST, *([REPORT] if summary.report is not None else [])]
    outside = [name for name in names if (folder / name).is_symlink()]
    if outside:
        lines = "\n".join(f"  {name}" for name in outside)
        raise ArtifactError(f"{folder}: only plain files of this folder are ever published, not\n{lines}")
    return {name: folder / name for name in names if (folder / name).is_file()}


def stale(remote: Remote, kept: set[str], replace: bool) -> tuple[str, ...]:
    """What an earlier artifact left: only what its manifest names, and what mmq itself writes beside it.

    Other files stay, but weights among them would be loaded with ours: PublishError, or with `replace` they go too.
    """
    ours = {RESULTS}
    if MANIFEST in remote.files:
        ours |= {MANIFEST, REPORT}
        with suppress(ArtifactError):  # a damaged manifest does not say what else was mmq's
            ours |= set(read_summary(remote.name, remote.read).manifest.files)
    there = remote.files.keys() - kept - {".gitattributes"}
    weights = {name for name in there - ours if "/" not in name and (name.endswith(".safetensors") or name == INDEX)}
    if weights and not replace:
        said = f"{remote.repo} holds weights that mmq did not put there: {', '.join(sorted(weights))}"
        raise PublishError(said, "an engine would load them too: delete them, or --replace removes them")
    return tuple(sorted((there & ours) | weights))


def same(found: Path | bytes, there: RemoteFile | None) -> bool:
    """Whether the repository has this content: by sha256 where the hub knows it, else by git's hash."""
    if there is None or there.size != _size(found):
        return False
    if there.sha256 is not None:
        return there.sha256 == (hashlib.sha256(found).hexdigest() if isinstance(found, bytes) else sha256(found))
    content = found if isinstance(found, bytes) else found.read_bytes()
    return there.git == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def changelog(remote: Remote | None) -> str:
    """What the card that is there says of earlier changes."""
    if remote is None or MANIFEST not in remote.files:
        return ""
    _, _, rest = (remote.read(CARD) or b"").decode(errors="replace").partition(BEGIN)
    return rest.partition(END)[0].strip()


def history(summary: Summary, remote: Remote | None, earlier: str) -> str:
    """The card's changelog: what changed since the artifact that is there now, before the `earlier` entries."""
    if remote is None or MANIFEST not in remote.files:
        return ""
    try:
        changes = difference(read_summary(remote.name, remote.read), summary)
    except ArtifactError:
        lines = ["- the artifact that was here could not be read, so nothing says what changed"]
    else:
        lines = [f"- {c.what}: {c.first} → {c.second}" if c.first else f"- {c.what}: {c.second}" for c in changes]
    title = f"### {datetime.now(UTC):%Y-%m-%d}, since `{remote.commit[:12]}`"
    entry = title + "\n\n" + ("\n".join(lines) or "- the same artifact with a new card")
    return f"{entry}\n\n{earlier}" if earlier else entry


def inherited(summary: Summary, declared: Declared) -> Declared:
    """`declared` with the license of the full-precision model where none is given and the hub tells."""
    from dataclasses import replace

    base = base_model(summary, declared)
    if declared.license or not base:
        return declared
    try:
        data = _card_data(base)
    except (HubError, ValueError, TypeError, YAMLError):
        return declared  # the card then has no license: better than a wrong one
    keys = ("license", "license_name", "license_link")
    return replace(declared, license={key: str(data[key]) for key in keys if data.get(key)})


def _card_data(repo: str) -> Mapping[str, Any]:
    from huggingface_hub import ModelCard

    remote = open_remote(repo)
    text = (remote.read(CARD) or b"").decode(errors="replace")
    return dict(ModelCard(text, ignore_metadata_errors=True).data.to_dict()) if text.startswith("---") else {}


def told(summary: Summary) -> str:
    """What the publisher may not know that the files tell; empty when there is nothing."""
    model = summary.recipe.model
    paths = [path for path in (model.repo, model.adapter) if path]
    local = [path for path in paths if path.startswith((".", "/", "~")) or path.count("/") > 1]
    return f"recipe.yaml, which is published as it is, names the source as {' and '.join(local)}" if local else ""
