"""Writer of safetensors shards; background threads write and hash a shard while the next one fills."""

import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from exporter.files.file_hashes import sha256
from exporter.files.writing import disk_error, write_text

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 10**9  # size of the shards that mmq writes


class ShardWriter:
    """Collects tensors into `model-0000N-of-0000M.safetensors` shards and their index.

    shard_bytes: a new shard starts if the current one would exceed this. Background threads write and hash full shards;
    host memory holds at most one and a half shards. Call `sync_folder` to wait until the files are on disk.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.shards: list[list[str]] = []
        self.total = 0
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._pool = ThreadPoolExecutor(5, "shard")  # one thread writes, the others hash
        self._saves: list[Future[None]] = []
        self._hashes: list[Future[str]] = []

    def add(self, name: str, tensor: "Tensor") -> None:
        """Add one tensor and start writing a full shard. CheckpointError if an earlier shard could not be written."""
        size = tensor.numel() * tensor.itemsize
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += size
        self.total += size
        if self._saves and 2 * self._pending_bytes > self.shard_bytes:
            self._saves[-1].result()

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.safetensors"

    def _flush(self) -> None:
        if self._saves:
            self._saves[-1].result()
        part = self._part(len(self.shards))
        save = self._pool.submit(_save, part, self._pending)
        self.shards.append(list(self._pending))
        self._saves.append(save)
        self._hashes.append(self._pool.submit(_hash_when, save, part))
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> dict[str, str]:
        """Write the last shard and the index, rename the files to their final names; returns file name -> sha256."""
        self._flush()
        hashes = [future.result() for future in self._hashes]
        self._pool.shutdown()
        count = len(self.shards)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if count == 1:
            names = ["model.safetensors"]
        for i, name in enumerate(names):
            self._part(i).replace(self.folder / name)
        weight_map = {tensor: names[i] for i, shard in enumerate(self.shards) for tensor in shard}
        index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(weight_map.items()))}
        if count > 1:
            write_text(self.folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        return dict(zip(names, hashes, strict=True))


def _save(path: Path, tensors: "dict[str, Tensor]") -> None:
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path, {"format": "pt"})
        path.chmod(0o644)  # safetensors creates files that only the owner may read
    except (OSError, SafetensorError) as error:
        raise disk_error(path, error) from None


def _hash_when(saved: Future[None], path: Path) -> str:
    """sha256 of a file, computed from the page cache after `saved` is done."""
    saved.result()
    return sha256(path)


def sync_folder(folder: Path) -> None:
    """fsync every file of a folder and the folder itself; OSError on failure."""
    for path in [*sorted(folder.iterdir()), folder]:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
