"""Files in a cluster's object store: put by the process that starts a job, and written once per machine.

A worker writes them below a private folder of its machine; the folder is removed at the end of the job.
"""

import fcntl
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import MmqError
from exporter.files.writing import disk_error

PATTERNS = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt", "*.yaml")  # files that mmq reads from a model
PIECE = 64 * 2**20  # bytes of one object
MODEL, ADAPTER, SAMPLES = "model", "adapter", "samples.zip"  # names below a machine's folder

Put = Callable[[Any], Any]  # a value -> its reference


@dataclass(frozen=True)
class Shipment:
    """Files for a worker. job: digest of the job. files: relative name -> references of its pieces."""

    job: str
    files: Mapping[str, tuple[Any, ...]]

    def with_files(self, more: Mapping[str, tuple[Any, ...]]) -> "Shipment":
        """The shipment with further files."""
        return Shipment(self.job, {**self.files, **more})


def shipped(files: Mapping[str, Path], put: Put) -> dict[str, tuple[Any, ...]]:
    """Put files into the object store. files: name on the workers -> file of this machine."""
    return {name: _pieces(path, put) for name, path in files.items()}


def folder_files(folder: Path, below: str) -> dict[str, Path]:
    """The files of a model's or an artifact's folder, by their names on the workers; links are followed."""
    paths = (path for pattern in PATTERNS for path in sorted(folder.glob(pattern)) if path.is_file())
    return {f"{below}/{path.name}": path for path in paths}


def model_files(folder: Path, adapter: str | None) -> dict[str, Path]:
    """The files of a model and of its adapter, by their names on the workers."""
    files = folder_files(folder, MODEL)
    return files | folder_files(Path(adapter).expanduser(), ADAPTER) if adapter else files


def received_adapter(folder: Path, adapter: str | None) -> str | None:
    """The adapter's place below a machine's folder; None for a model without one."""
    return str(folder / ADAPTER) if adapter else None


def _pieces(path: Path, put: Put) -> tuple[Any, ...]:
    import numpy as np

    size = path.stat().st_size
    if not size:
        return ()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return tuple(
            put(np.frombuffer(content[start : start + PIECE], dtype=np.uint8)) for start in range(0, size, PIECE)
        )


def machine_folder(job: str) -> Path:
    """The job's private folder on this worker's machine; MmqError when another user owns it."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    folder = Path(tempfile.gettempdir()) / f"mmq-ray-{os.getuid()}-{node[:16]}-{job[:16]}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise MmqError(f"{folder} belongs to another user", "remove it on the workers' machines, or set TMPDIR there")
    return folder


def received(shipment: Shipment) -> Path:
    """The job's folder on this machine with the shipment's files; each is written once per machine."""
    import ray

    folder = machine_folder(shipment.job)
    write_missing(shipment, folder, ray.get)
    return folder


def write_missing(shipment: Shipment, folder: Path, get: Callable[[Any], Any]) -> None:
    """Write the files that `folder` lacks; one worker of a machine at a time. get: the value of a reference."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name, pieces in shipment.files.items():
            path = folder / name
            if path.exists():
                continue
            temporary = path.with_name(f".{path.name}.tmp")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with temporary.open("wb") as file:
                    for piece in pieces:
                        file.write(memoryview(get(piece)))
                temporary.replace(path)
            except OSError as error:
                raise disk_error(path, error) from None


def remove_received(job: str) -> None:
    """Remove the job's folder on this worker's machine."""
    shutil.rmtree(machine_folder(job), ignore_errors=True)
