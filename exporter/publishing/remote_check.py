"""Verify an artifact in a repository of the hub against its manifest, without a download of its weights.

The hub reports the sha256 of every large file, so weights are compared by hash. Small files are downloaded and hashed.
Range requests read the names of packed tensors from the headers.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from exporter.artifact.artifact import Artifact, described_groups
from exporter.artifact.manifest import Manifest
from exporter.artifact.manifest_coverage import missing_from_manifest
from exporter.errors import ArtifactError, CheckpointError
from exporter.events import Event, Listener
from exporter.files.hub import Remote
from exporter.files.strict_json import parse_object
from exporter.formats import FORMATS
from exporter.model.checkpoint import Checkpoint
from exporter.publishing.artifact_summary import read_summary


@dataclass(frozen=True)
class RemoteVerification:
    """Result of the verification. files, linears: numbers of checked files and linears. fetched: downloaded bytes."""

    name: str
    files: int
    linears: int
    fetched: int


def verify_remote(remote: Remote, on_event: Listener) -> RemoteVerification:
    """Check a repository; ArtifactError lists every difference from its manifest."""
    summary = read_summary(remote.name, remote.read)
    expected = summary.manifest.files
    problems, fetched = [], 0
    for i, (name, digest) in enumerate(sorted(expected.items())):
        file = remote.files.get(name)
        if file is None:
            problems.append(f"{name}: missing")
        elif file.sha256 is None:
            content = remote.read(name) or b""
            fetched += len(content)
            if hashlib.sha256(content).hexdigest() != digest:
                problems.append(f"{name}: its content differs from the export")
        elif file.sha256 != digest:
            problems.append(f"{name}: its content differs from the export")
        on_event(Event("verify", i + 1, len(expected), name))
    shards = {name for name in remote.files if name.endswith(".safetensors") and "/" not in name}
    problems += [f"{name}: not in the manifest" for name in sorted(shards - expected.keys())]
    problems += _missing(remote, summary.manifest, quiet=bool(problems))
    if problems:
        lines = "\n".join(f"  {problem}" for problem in dict.fromkeys(problems))
        raise ArtifactError(f"{remote.name} does not match its manifest:\n{lines}", "publish it again")
    return RemoteVerification(remote.name, len(expected), len(summary.manifest.linears), fetched)


def _missing(remote: Remote, manifest: Manifest, quiet: bool) -> list[str]:
    """Problems of the manifest's completeness, and tensors that packed linears need for their format but lack.

    quiet: ignore unreadable headers, because another problem is already known.
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
    """Open an artifact from its headers; its tensors cannot be read. ArtifactError when a header is damaged."""
    try:
        config = parse_object(remote.read("config.json") or b"{}", f"{remote.name}: config.json")
        headers = remote.headers()
        nothing: dict[str, set[str]] = {file: set() for file in headers}
        checkpoint = Checkpoint.from_headers(Path(remote.name), config, headers, nothing, origin=remote.name)
    except CheckpointError as error:
        raise ArtifactError(error.message, "publish it again") from None
    groups = described_groups(manifest.format, config, remote.name)
    return Artifact(checkpoint, manifest, groups, torch.device("cpu"))
