"""Atomic file writes: write to a temporary file in the same folder, fsync, then rename."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from exporter.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, then fsync and rename: `path` is absent, unchanged or complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> None:
    """Write one safetensors file atomically. Disk errors become CheckpointError; the temporary file is removed."""
    from safetensors.torch import save_file

    try:
        with atomic(path) as temporary:
            save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, temporary, dict(metadata))
            temporary.chmod(0o644)  # safetensors creates files that only the owner may read
    except (OSError, SafetensorError) as error:
        raise disk_error(path, error) from None


def write_text(path: Path, text: str) -> None:
    """Write one text file atomically; CheckpointError on disk errors."""
    try:
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise disk_error(path, error) from None


def make_folder(path: Path) -> None:
    """Create the folder and its parents if missing; CheckpointError on disk errors."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(path, error) from None


def disk_error(path: Path, error: Exception) -> CheckpointError:
    """CheckpointError for a failed write, with the path, the reason and the free space."""
    parent = next((p for p in path.parents if p.exists()), Path("/"))
    stats = os.statvfs(parent)
    free = stats.f_bavail * stats.f_frsize
    reason = "the disk is full" if "No space" in str(error) else str(error)
    hint = "free some space" if reason == "the disk is full" else None
    return CheckpointError(f"{path}: write failed: {reason} ({free / 2**20:,.0f} MiB free)", hint)
