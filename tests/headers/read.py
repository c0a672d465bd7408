"""Read the stored headers, and write checkpoints of the real size that take no disk."""

import copy
import json
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

HEADERS = Path(__file__).parent
HEADER_NAMES = tuple(sorted(path.stem for path in HEADERS.glob("*.json")))
SMALLEST = (  # of each family
    "llava-hf--llava-1.5-7b-hf",
    "llava-hf--llava-v1.6-mistral-7b-hf",
    "llava-hf--llava-onevision-qwen2-0.5b-ov-hf",
    "Qwen--Qwen2-VL-2B-Instruct",
    "Qwen--Qwen2.5-VL-3B-Instruct",
    "Qwen--Qwen3-VL-2B-Instruct",
    "HuggingFaceM4--Idefics3-8B-Llama3",
    "HuggingFaceTB--SmolVLM-256M-Instruct",
    "Salesforce--blip2-opt-2.7b",
    "Salesforce--blip2-itm-vit-g",
)
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}

Header = dict[str, tuple[str, tuple[int, ...]]]  # name -> (safetensors dtype, shape), in file order


@cache
def header_file(name: str) -> dict[str, Any]:
    """The parsed `tests/headers/NAME.json`."""
    parsed: dict[str, Any] = json.loads((HEADERS / f"{name}.json").read_text(encoding="utf-8"))
    return parsed


def header_config(name: str) -> dict[str, Any]:
    """config.json of a real checkpoint, as a fresh copy."""
    return copy.deepcopy(dict(header_file(name)["config"]))


def expand(tensors: dict[str, list[Any]]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor, block by block."""
    for prefix, members in groupby(tensors.items(), key=lambda item: item[0].partition("{i}")[0]):
        entries = list(members)
        if "{i}" not in entries[0][0]:
            yield from ((name, dtype, tuple(shape)) for name, (dtype, shape) in entries)
            continue
        stacks = [(name, dtype, shape, range(*map(int, blocks.split(":")))) for name, (dtype, shape, blocks) in entries]
        assert all(name.startswith(prefix) for name, *_ in stacks)
        for i in range(max(blocks.stop for *_, blocks in stacks)):
            yield from ((n.replace("{i}", str(i)), d, tuple(s)) for n, d, s, blocks in stacks if i in blocks)


def header(name: str) -> Header:
    """Dtype and shape of every tensor of a real checkpoint, e.g. `header("llava-hf--llava-1.5-7b-hf")`."""
    return {tensor: (dtype, shape) for tensor, dtype, shape in expand(header_file(name)["tensors"])}


def load_header(name: str) -> tuple[dict[str, Any], Header]:
    """config.json and header of a real checkpoint."""
    return header_config(name), header(name)


def shards(name: str) -> list[Header]:
    """The header cut into shards in file order; a new shard starts when the next tensor would pass `shard_bytes`."""
    limit, size = header_file(name)["shard_bytes"], 0
    parts: list[Header] = [{}]
    for tensor, (dtype, shape) in header(name).items():
        needed = prod(shape) * ITEM_BYTES[dtype]
        if size and size + needed > limit:
            parts.append({})
            size = 0
        parts[-1][tensor] = (dtype, shape)
        size += needed
    return parts


def write_sparse_shard(path: Path, tensors: Header) -> int:
    """A safetensors file whose data is one hole (all zeros, no disk). Returns the bytes of data it stands for."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return offset


def write_sparse_checkpoint(folder: Path, name: str) -> Path:
    """A hub-style checkpoint of the real size (config.json, shards, index) whose weights are zeros and take no disk."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(header_config(name), indent=2), encoding="utf-8")
    parts = shards(name)
    if len(parts) == 1:
        write_sparse_shard(folder / "model.safetensors", parts[0])
        return folder
    names = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    total = sum(write_sparse_shard(folder / file, part) for file, part in zip(names, parts, strict=True))
    weight_map = {tensor: file for file, part in zip(names, parts, strict=True) for tensor in part}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return folder
