"""An artifact in a repository of the hub, checked by its manifest without downloading its weights.

The hub knows the sha256 of every large file, so weights are compared without a byte of them; small files are fetched
and hashed; the names of packed tensors come from the headers, by range requests.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from exporter.artifact.artifact import Artifact, described_groups
from exporter.artifact.coverage import missing_from_manifest
from exporter.artifact.manifest import Manifest
from exporter.errors import ArtifactError, CheckpointError
from exporter.events import Event, Listener
from exporter.formats import FORMATS
from exporter.model.checkpoint import Checkpoint
from exporter.model.hub import Remote
from exporter.publishing.artifact_summary import read_summary


@dataclass(frozen=True)
class Published:
    """What was checked. files: compared by hash; fetched: bytes of small files that were downloaded for it."""

    name: str
    files: int
    linears: int
    fetched: int


def verify_remote(remote: Remote, on_event: Listener) -> Published:
    """ArtifactError naming everything in which the repository is not what its manifest says."""
    summary = read_summary(remote.name, remote.read)
    expected = summary.manifest.files
    problems, fetched = [], 0
    for i, (name, digest) in enumerate(sorted(expected.items())):
        found = remote.files.get(name)
        if found is None:
            problems.append(f"{name}: missing")
        elif found.sha256 is None:
            content = remote.read(name) or b""
            fetched += len(content)
            if hashlib.sha256(content).hexdigest() != digest:
                problems.append(f"{name}: its content is not the one that was written")
        elif found.sha256 != digest:
            problems.append(f"{name}: its content is not the one that was written")
        on_event(Event("verify", i + 1, len(expected), name))
    shards = {name for name in remote.files if name.endswith(".safetensors") and "/" not in name}
    problems += [f"{name}: not in the manifest" for name in sorted(shards - expected.keys())]
    problems += _missing(remote, summary.manifest, quiet=bool(problems))
    if problems:
        lines = "\n".join(f"  {problem}" for problem in dict.fromkeys(problems))
        raise ArtifactError(f"{remote.name} does not match its manifest:\n{lines}", "publish it again")
    return Published(remote.name, len(expected), len(summary.manifest.linears), fetched)


def _missing(remote: Remote, manifest: Manifest, quiet: bool) -> list[str]:
    """The manifest must name everything, and every packed linear must have the tensors that its format gives it.

    quiet: headers that cannot be read are no problem of their own, because another is known already.
    """
    try:
        artifact = open_headers(remote, manifest)
    except ArtifactError:
        if quiet:
            return []
        raise
    problems = missing_from_manifest(artifact)
    for module in manifest.linears if not problems else ():
        try:
            names = FORMATS[manifest.format].tensor_names(module, artifact.scheme_of(module))
            problems += [f"{name}: missing" for name in names if name not in artifact.checkpoint.tensors]
        except ArtifactError as error:
            problems.append(f"{module}: {error}")
    return problems


def open_headers(remote: Remote, manifest: Manifest) -> Artifact:
    """The artifact as its headers show it; its tensors cannot be read. ArtifactError when a header is damaged."""
    config = json.loads(remote.read("config.json") or b"{}")
    try:
        headers = remote.headers()
        nothing: dict[str, set[str]] = {file: set() for file in headers}
        checkpoint = Checkpoint.from_headers(Path(remote.name), config, headers, nothing, origin=remote.name)
    except CheckpointError as error:
        raise ArtifactError(error.message, "publish it again") from None
    groups = described_groups(manifest.format, config, remote.name)
    return Artifact(checkpoint, manifest, groups, torch.device("cpu"))
