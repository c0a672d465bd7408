"""Checkpoints as named tensors in safetensors files: headers first, one tensor at a time, atomic writes.

File format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON header, data).
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from exporter.errors import CheckpointError
from exporter.events import Event, Listener, ignore
from exporter.files.file_hashes import hash_files, start_hashing
from exporter.files.safetensors_header import Entry, read_header
from exporter.files.strict_json import kind, read_json
from exporter.model.adapter import Adapter

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


class Checkpoint:
    """A folder with config.json and safetensors shards, read by tensor name.

    tensors: name -> TensorInfo, from the headers alone. Names are canonical (see `Family.canonical_name`).
    ignored: names of stored tensors that are no part of the model. adapter: merged into tensors as they are read.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        tensors: dict[str, TensorInfo],
        origin: str,
        ignored: tuple[str, ...] = (),
        adapter: Adapter | None = None,
    ) -> None:
        self.folder = folder
        self.config = config
        self.tensors = tensors
        self.origin = origin
        self.ignored = ignored
        self.adapter = adapter
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
        headers: Mapping[str, Mapping[str, Entry]],
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
                name = rename(stored)
                if name in tensors:
                    raise CheckpointError(f"{folder}: {name} is stored twice ({tensors[name].file}, {file})")
                tensors[name] = TensorInfo(name, stored, entry.dtype, entry.shape, file)
        return cls(folder, config, tensors, origin or str(folder))

    def changed(self, **fields: Any) -> "Checkpoint":
        """The same checkpoint with another `config`, `tensors`, `ignored` or `adapter`."""
        known = {"config": self.config, "tensors": self.tensors, "ignored": self.ignored, "adapter": self.adapter}
        return Checkpoint(self.folder, origin=self.origin, **(known | fields))

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU (memory-mapped: pages come in as they are used), the adapter merged."""
        return self._read_stored(name).to(self.tensors[name].dtype)

    def not_finite(self, name: str) -> CheckpointError:
        """The error that says why a tensor that came from here holds infinities or NaN."""
        info, stored = self.tensors[name], self._read_stored(name)
        bad = int((~torch.isfinite(stored)).sum())
        if bad:
            return CheckpointError(
                f"{name} holds {bad} values that are not finite ({info.file})",
                "the checkpoint is damaged, or its training diverged; download it again",
            )
        asked, peak = str(info.dtype).removeprefix("torch."), float(stored.abs().max())
        most = torch.finfo(info.dtype).max
        if peak > most:
            return CheckpointError(
                f"{name} holds values up to {peak:.6g} ({info.file}), and {asked} goes up to {most:.6g}",
                f"the recipe's model.dtype reads the tensors as {asked}: set it to bfloat16 in a copy of the recipe",
            )
        return CheckpointError(f"{name} is finite, and no more once scales are folded into it", "use another method")

    def _read_stored(self, name: str) -> Tensor:
        """One tensor in the dtype of its file, the adapter merged."""
        info = self.tensors[name]
        try:
            if info.file not in self._open:
                self._open[info.file] = safe_open(self.folder / info.file, framework="pt", device="cpu")
            tensor: Tensor = self._open[info.file].get_tensor(info.stored)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / info.file}: cannot read {name} ({error})") from None
        return self.adapter.merged(name, tensor) if self.adapter else tensor

    def files(self) -> list[str]:
        """The shard files, sorted."""
        return sorted({info.file for info in self.tensors.values()})

    def start_hashing(self) -> None:
        """Begin to hash every shard in the background, so that `shard_hashes` and `digest` have little to wait for."""
        start_hashing([self.folder / file for file in self.files()] + (self.adapter.files if self.adapter else []))

    def shard_hashes(self, on_event: Listener = ignore) -> dict[str, str]:
        """Shard file -> sha256 of the whole file, hex, and those of the adapter; each is read once per process."""
        paths = [self.folder / file for file in self.files()] + (self.adapter.files if self.adapter else [])
        hashes = hash_files(paths, lambda done, total: on_event(Event("hash", done >> 20, total >> 20)))
        for path, hashed in hashes.items():
            _require_hub_hash(path, hashed)
        return {path.name: hashed for path, hashed in hashes.items()}

    def dtypes(self) -> dict[str, int]:
        """Dtype -> how many tensors are read as it, which need not be how they are stored."""
        return dict(Counter(str(info.dtype).removeprefix("torch.") for info in self.tensors.values()))

    def digest(self, on_event: Listener = ignore) -> str:
        """The checkpoint's identity: sha256 over every byte of every shard, the configuration and `dtypes`."""
        content = {"config": self.config, "shards": self.shard_hashes(on_event), "dtypes": self.dtypes()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _require_hub_hash(path: Path, hashed: str) -> None:
    """CheckpointError when a file of the hub's cache is not what was downloaded: its target is named by its sha256."""
    target = path.resolve()
    if target.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", target.name) and target.name != hashed:
        raise CheckpointError(
            f"{path}: its content is not what the hub has: it was damaged after the download, or changed",
            f"delete {target}; the next run downloads it again",
        )


def shard_files(folder: Path) -> dict[str, set[str]]:
    """Shard file name -> the tensor names its index promises (empty without an index)."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        if (folder / "model.safetensors").exists():
            return {"model.safetensors": set()}
        if (folder / "adapter_config.json").exists():
            base = f"give the base model by --model, and this folder by --adapter {folder}"
            raise CheckpointError(f"{folder}: it holds an adapter and no model", base)
        other = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        hint = f"mmq reads safetensors only, never pickles ({other[0]})" if other else None
        raise CheckpointError(f"{folder}: no model.safetensors and no model.safetensors.index.json", hint)
    return promised_files(read_json(index), str(index))


def promised_files(index: Mapping[str, Any], where: str) -> dict[str, set[str]]:
    """Shard file name -> the tensor names that a parsed index promises. where: the index, for messages."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{where}: `weight_map` must be an object, it is {kind(weight_map)}")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{where}: {name}: expected the name of a shard, it is {kind(file)}")
        if Path(file).name != file or "\0" in file:
            raise CheckpointError(f"{where}: shard path {file!r} leaves the folder")
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{where}: {name} is in {file!r}; mmq reads safetensors only, never pickles")
        files.setdefault(file, set()).add(name)
    if not files:
        raise CheckpointError(f"{where}: it names no tensors")
    return files
