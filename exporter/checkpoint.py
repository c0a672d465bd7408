"""Checkpoints as named tensors in safetensors files: headers first, one tensor at a time, atomic writes.

File format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON header, data).
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from exporter.errors import CheckpointError
from exporter.events import Event, ignore
from exporter.file_hashes import hash_files, start_hashing

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER = 100 * 2**20  # the format's own limit
SHARD_BYTES = 10**9  # size of the shards we write; one is held in memory until it is complete


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor. stored: its name in the file; file: the shard. dtype: what it is read as."""

    name: str
    stored: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())

    @property
    def bytes(self) -> int:
        """Bytes of data."""
        return self.size * self.dtype.itemsize


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of one safetensors file; CheckpointError when the file is damaged or cut short."""
    hint = "download the file again; `mmq doctor` shows where the hub cache is"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(MAX_HEADER, size - 8):
                raise CheckpointError(f"{path}: not a safetensors file, or cut short inside its header", hint)
            header: dict[str, Any] = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the shard is missing", "the index names it; download it again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (struct.error, ValueError):
        raise CheckpointError(f"{path}: its safetensors header is damaged", hint) from None
    try:
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (TypeError, KeyError, IndexError):
        raise CheckpointError(f"{path}: its safetensors header is damaged", hint) from None
    if size < expected:
        raise CheckpointError(f"{path}: truncated, {size:,} bytes where the header promises {expected:,}", hint)
    return header


class Checkpoint:
    """A folder with config.json and safetensors shards, read by tensor name.

    tensors: name -> TensorInfo, from the headers alone. Names are canonical (see `Family.canonical_name`).
    """

    def __init__(self, folder: Path, config: dict[str, Any], tensors: dict[str, TensorInfo], origin: str) -> None:
        self.folder = folder
        self.config = config
        self.tensors = tensors
        self.origin = origin
        self._open: dict[str, Any] = {}

    @classmethod
    def open(cls, folder: Path, rename: Callable[[str], str] = str, origin: str = "") -> "Checkpoint":
        """Read config.json and every shard's header; no tensor data is touched."""
        config = read_json(folder / "config.json")
        promised = shard_files(folder)
        headers = {file: read_header(folder / file) for file in promised}
        return cls.from_headers(folder, config, headers, promised, rename, origin)

    @classmethod
    def from_headers(
        cls,
        folder: Path,
        config: dict[str, Any],
        headers: Mapping[str, dict[str, Any]],
        promised: Mapping[str, set[str]],
        rename: Callable[[str], str] = str,
        origin: str = "",
    ) -> "Checkpoint":
        """From headers that are already read. promised: shard -> the tensors that its index names."""
        tensors: dict[str, TensorInfo] = {}
        for file, header in headers.items():
            absent = sorted(promised[file] - header.keys())
            if absent:
                raise CheckpointError(f"{folder / file}: the index promises {absent[0]} ({len(absent)} missing)")
            for stored, entry in header.items():
                if stored == "__metadata__":
                    continue
                if entry["dtype"] not in DTYPES:
                    raise CheckpointError(f"{folder / file}: {stored} has the unknown dtype {entry['dtype']}")
                name = rename(stored)
                if name in tensors:
                    raise CheckpointError(f"{folder}: {name} is stored twice ({tensors[name].file}, {file})")
                tensors[name] = TensorInfo(name, stored, DTYPES[entry["dtype"]], tuple(entry["shape"]), file)
        return cls(folder, config, tensors, origin or str(folder))

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU (memory-mapped: pages come in as they are used)."""
        info = self.tensors[name]
        try:
            if info.file not in self._open:
                self._open[info.file] = safe_open(self.folder / info.file, framework="pt", device="cpu")
            tensor: Tensor = self._open[info.file].get_tensor(info.stored)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / info.file}: cannot read {name} ({error})") from None
        return tensor.to(info.dtype)

    def files(self) -> list[str]:
        """The shard files, sorted."""
        return sorted({info.file for info in self.tensors.values()})

    def start_hashing(self) -> None:
        """Begin to hash every shard in the background, so that `shard_hashes` and `digest` have little to wait for."""
        start_hashing(self.folder / file for file in self.files())

    def shard_hashes(self, on_event: Callable[[Event], None] = ignore) -> dict[str, str]:
        """Shard file -> sha256 of the whole file, hex; each is read once per process (see `file_hashes`)."""
        paths = [self.folder / file for file in self.files()]
        hashes = hash_files(paths, lambda done, total: on_event(Event("hash", done >> 20, total >> 20)))
        return {path.name: hashed for path, hashed in hashes.items()}

    def digest(self, on_event: Callable[[Event], None] = ignore) -> str:
        """The checkpoint's identity: sha256 over every byte of every shard, and the configuration."""
        content = {"config": self.config, "shards": self.shard_hashes(on_event)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError says what is wrong with it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file", "a model folder needs config.json beside its shards") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return data


def shard_files(folder: Path) -> dict[str, set[str]]:
    """Shard file name -> the tensor names its index promises (empty without an index)."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        if (folder / "model.safetensors").exists():
            return {"model.safetensors": set()}
        other = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        hint = f"mmq reads safetensors only, never pickles ({other[0]})" if other else None
        raise CheckpointError(f"{folder}: no model.safetensors and no model.safetensors.index.json", hint)
    files: dict[str, set[str]] = {}
    for name, file in read_json(index).get("weight_map", {}).items():
        if Path(file).name != file:
            raise CheckpointError(f"{index}: shard path {file!r} leaves the folder")
        files.setdefault(file, set()).add(name)
    if not files:
        raise CheckpointError(f"{index}: it names no tensors")
    return files


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write to a temporary neighbor, then fsync and rename: `path` is either absent, old, or complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """One safetensors file, atomically. Disk errors become CheckpointError and leave nothing behind."""
    try:
        with atomic(path) as temporary:
            save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, temporary, dict(metadata))
            temporary.chmod(0o644)  # the library makes files that only their owner may read
    except (OSError, SafetensorError) as error:
        raise disk_error(path, error) from None


def write_text(path: Path, text: str) -> None:
    """One text file, atomically."""
    try:
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise disk_error(path, error) from None


def make_folder(path: Path) -> None:
    """The folder and its parents, if they are not there; CheckpointError says what the disk objects to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(path, error) from None


def disk_error(path: Path, error: Exception) -> CheckpointError:
    """A write failed: say where and how much room is left."""
    parent = next((p for p in path.parents if p.exists()), Path("/"))
    stats = os.statvfs(parent)
    free = stats.f_bavail * stats.f_frsize
    reason = "the disk is full" if "No space" in str(error) else str(error)
    hint = "free some space" if reason == "the disk is full" else None
    return CheckpointError(f"{path}: cannot be written: {reason} ({free / 2**20:,.0f} MiB free)", hint)


class ShardWriter:
    """Collects tensors into `model-0000N-of-0000M.safetensors` shards and their index.

    shard_bytes: a new shard starts when the current one would grow beyond this.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.shards: list[list[str]] = []
        self.total = 0
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Queue one tensor; a full shard is written out."""
        size = tensor.numel() * tensor.itemsize
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += size
        self.total += size

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.safetensors"

    def _flush(self) -> None:
        write_tensors(self._part(len(self.shards)), self._pending, {"format": "pt"})
        self.shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> list[str]:
        """Write the last shard, give the files their final names, write the index; returns the file names."""
        self._flush()
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
        return names


def sha256(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
