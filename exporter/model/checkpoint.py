"""Checkpoints in safetensors files: reads headers first, then one tensor at a time, by name; hashes the shards.

File format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON header, data).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from exporter.dtypes import Dtype
from exporter.errors import CheckpointError
from exporter.events import Event, Listener, ignore
from exporter.files.file_hashes import hash_files, start_hashing
from exporter.files.safetensors_header import Entry, read_header
from exporter.files.strict_json import kind, read_json
from exporter.lazy_torch import torch
from exporter.model.adapter import Adapter

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 10**9  # size of written shards; one is in memory until it is complete


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry in a header.

    name: checkpoint name. stored: its name in the file. dtype: the dtype in which it is read. file: the shard.
    """

    name: str
    stored: str
    dtype: Dtype
    shape: tuple[int, ...]
    file: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of data in the dtype in which the tensor is read."""
        return self.size * self.dtype.itemsize


class Checkpoint:
    """A folder with config.json and safetensors shards, read by tensor name.

    tensors: name -> TensorInfo, from the headers. Names are canonical (see `Family.canonical_name`). origin: the source
    in messages. ignored: names of stored tensors that are not part of the model. adapter: merged into tensors when they
    are read.
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
    def open(cls, folder: Path, rename: Callable[[str], str] = str, origin: str = "") -> Checkpoint:
        """Read config.json and the headers of all shards; reads no tensor data."""
        config = read_json(folder / "config.json")
        indexed = shard_files(folder)
        headers = {file: read_header(folder / file) for file in indexed}
        return cls.from_headers(folder, config, headers, indexed, rename, origin)

    @classmethod
    def from_headers(
        cls,
        folder: Path,
        config: dict[str, Any],
        headers: Mapping[str, Mapping[str, Entry]],
        indexed: Mapping[str, set[str]],
        rename: Callable[[str], str] = str,
        origin: str = "",
    ) -> Checkpoint:
        """A checkpoint from parsed headers. indexed: shard -> the tensor names that the index lists for it."""
        tensors: dict[str, TensorInfo] = {}
        for file, header in headers.items():
            absent = sorted(indexed[file] - header.keys())
            if absent:
                problem = f"the index lists {absent[0]}, which the shard lacks ({len(absent)} missing)"
                raise CheckpointError(f"{folder / file}: {problem}")
            for stored, entry in header.items():
                name = rename(stored)
                if name in tensors:
                    raise CheckpointError(f"{folder}: {name} is stored twice ({tensors[name].file}, {file})")
                tensors[name] = TensorInfo(name, stored, entry.dtype, entry.shape, file)
        return cls(folder, config, tensors, origin or str(folder))

    def changed(self, **fields: Any) -> Checkpoint:
        """The same checkpoint with another `config`, `tensors`, `ignored` or `adapter`."""
        current = {"config": self.config, "tensors": self.tensors, "ignored": self.ignored, "adapter": self.adapter}
        return Checkpoint(self.folder, origin=self.origin, **(current | fields))

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU with the adapter merged (memory-mapped: pages are read when they are used)."""
        return self._read_stored(name).to(self.tensors[name].dtype.torch)

    def not_finite(self, name: str) -> CheckpointError:
        """The error that explains why the tensor `name` has an infinity or NaN after it was read and changed."""
        info, stored = self.tensors[name], self._read_stored(name)
        bad = int((~torch.isfinite(stored)).sum())
        if bad:
            return CheckpointError(
                f"{name} has {bad} values that are not finite ({info.file})",
                "the checkpoint is damaged, or its training diverged; download it again",
            )
        dtype, peak = info.dtype, float(stored.abs().max())
        limit = torch.finfo(dtype.torch).max
        if peak > limit:
            return CheckpointError(
                f"{name} has values up to {peak:.6g} ({info.file}), but the largest {dtype} is {limit:.6g}",
                f"the recipe's model.dtype reads the tensors as {dtype}: set it to bfloat16 in a copy of the recipe",
            )
        return CheckpointError(f"{name} is finite, but folding scales into it overflows", "use another method")

    def refuse_vanished(self, name: str) -> None:
        """CheckpointError when float16 cannot represent the values of a float32 tensor because they are too small."""
        stored = self._read_stored(name)
        peak = float(stored.abs().max())
        if stored.dtype == torch.float32 and peak > 0:
            raise CheckpointError(
                f"{name} has values of at most {peak:.6g} ({self.tensors[name].file}), which float16 cannot represent",
                "the recipe's model.dtype reads the tensors as float16: set it to bfloat16 in a copy of the recipe",
            )

    def _read_stored(self, name: str) -> Tensor:
        """One tensor in the dtype of its file, with the adapter merged."""
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

    def paths(self) -> list[Path]:
        """The shards and the adapter's files."""
        return [self.folder / file for file in self.files()] + (self.adapter.files if self.adapter else [])

    def start_hashing(self) -> None:
        """Start to hash all shards in the background, so that `shard_hashes` and `digest` wait less."""
        start_hashing(self.paths())

    def shard_hashes(self, on_event: Listener = ignore) -> dict[str, str]:
        """File name -> hex sha256 of every shard and of the adapter's files; each file is read once per process.

        CheckpointError when a file of the hub's cache was modified after the download.
        """
        hashes = hash_files(self.paths(), lambda done, total: on_event(Event("hash", done >> 20, total >> 20)))
        for path, digest in hashes.items():
            _require_hub_hash(path, digest)
        return {path.name: digest for path, digest in hashes.items()}

    def dtypes(self) -> dict[str, int]:
        """Dtype -> number of tensors that are read in it, which can differ from the stored dtype."""
        return dict(Counter(info.dtype.name for info in self.tensors.values()))

    def digest(self, on_event: Listener = ignore) -> str:
        """The checkpoint's identity: sha256 over every byte of every shard, the configuration and `dtypes`."""
        content = {"config": self.config, "shards": self.shard_hashes(on_event), "dtypes": self.dtypes()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _require_hub_hash(path: Path, digest: str) -> None:
    """CheckpointError when a file of the hub's cache does not match the sha256 that names its target."""
    target = path.resolve()
    if target.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", target.name) and target.name != digest:
        raise CheckpointError(
            f"{path}: its content differs from the hub's: the file was damaged or modified after the download",
            f"delete {target}; the next run downloads it again",
        )


def shard_files(folder: Path) -> dict[str, set[str]]:
    """Shard file name -> the tensor names that the index lists (empty without an index)."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        if (folder / "model.safetensors").exists():
            return {"model.safetensors": set()}
        if (folder / "adapter_config.json").exists():
            options = f"pass the base model with --model, and this folder with --adapter {folder}"
            raise CheckpointError(f"{folder}: the folder contains an adapter but no model", options)
        others = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        hint = f"mmq reads only safetensors files, not pickles ({others[0]})" if others else None
        raise CheckpointError(f"{folder}: no model.safetensors and no model.safetensors.index.json", hint)
    return indexed_files(read_json(index), str(index))


def indexed_files(index: Mapping[str, Any], where: str) -> dict[str, set[str]]:
    """Shard file name -> the tensor names that a parsed index lists. where: the index, for messages."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{where}: `weight_map` must be an object, got {kind(weight_map)}")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{where}: {name}: expected the name of a shard, got {kind(file)}")
        if Path(file).name != file or "\0" in file:
            raise CheckpointError(f"{where}: shard path {file!r} is outside of the folder")
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{where}: {name} is in {file!r}; mmq reads only safetensors files, not pickles")
        files.setdefault(file, set()).add(name)
    if not files:
        raise CheckpointError(f"{where}: `weight_map` lists no tensors")
    return files
