"""Reader and validator of safetensors headers.

File format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON header, data). The
header gives every tensor a dtype, a shape and a byte range; the ranges cover the data without gaps or overlaps.
"""

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from exporter.dtypes import DTYPES, Dtype
from exporter.errors import CheckpointError
from exporter.files.strict_json import kind, parse_object

METADATA = "__metadata__"
MAX_HEADER = 100 * 2**20  # the format's own limit
MAX_DIMENSIONS = 64  # torch's own limit
MAX_LENGTH = 2**48  # of one dimension, larger than any file
HINT = "download the file again; `mmq doctor` shows where the hub cache is"


@dataclass(frozen=True)
class Entry:
    """Header entry of one tensor. start, end: byte range in the data section."""

    dtype: Dtype
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """Tensor name -> entry of one safetensors file; CheckpointError if it is damaged, truncated or too long."""
    try:
        if not path.is_file() and path.exists():  # opening a pipe would block forever
            raise CheckpointError(f"{path}: not a regular file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(MAX_HEADER, size - 8):
                raise CheckpointError(f"{path}: not a safetensors file, or truncated inside its header", HINT)
            raw = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the shard is missing", "the index lists it; download it again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except struct.error:
        raise CheckpointError(f"{path}: not a safetensors file: it has fewer than 8 bytes", HINT) from None
    try:
        header = parse_object(raw, f"{path}, its safetensors header", unique=True)
    except CheckpointError as error:
        raise CheckpointError(error.message, HINT) from None
    return check_header(header, str(path), size - 8 - length)


def read_excerpts(path: Path, name: str, places: int, length: int) -> list[bytes]:
    """Stored bytes of tensor `name` at evenly spaced places, the first and the last bytes among them.

    length: bytes at each place, fewer when the tensor has fewer. CheckpointError if the file is damaged.
    """
    entry = read_header(path)[name]
    with path.open("rb") as file:
        (header,) = struct.unpack("<Q", file.read(8))
        most = max(entry.end - entry.start - length, 0)
        excerpts = []
        for offset in sorted({most * place // (places - 1) for place in range(places)}):
            file.seek(8 + header + entry.start + offset)
            excerpts.append(file.read(min(length, entry.end - entry.start - offset)))
    return excerpts


def check_header(header: Mapping[str, Any], where: str, data_bytes: int | None) -> dict[str, Entry]:
    """Validate a parsed header and return its entries.

    where: the file, for messages. data_bytes: size of its data section, None if unknown. CheckpointError for the first
    invalid entry, or if the byte ranges do not match the data.
    """
    entries = {name: _entry(name, value, where) for name, value in header.items() if name != METADATA}
    _check_metadata(header.get(METADATA, {}), where)
    reached, before = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != reached:
            how = "overlap" if entry.start < reached else "leave a gap"
            raise _damaged(where, name, f"its bytes start at {entry.start:,} and {how} after {before or 'the header'}")
        reached, before = entry.end, name
    if data_bytes is not None and reached != data_bytes:
        if reached > data_bytes:
            message = f"{where}: truncated: {data_bytes:,} bytes of data, and its header requires {reached:,}"
            raise CheckpointError(message, HINT)
        raise CheckpointError(f"{where}: {data_bytes - reached:,} bytes follow the data described by its header", HINT)
    return entries


def _entry(name: str, value: Any, where: str) -> Entry:
    """Validate the header entry of one tensor; CheckpointError describes the first problem."""
    if not isinstance(value, dict):
        raise _damaged(where, name, f"expected an object, it is {kind(value)}")
    dtype = value.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        reason = f"unknown dtype {dtype[:40]}" if isinstance(dtype, str) else f"`dtype` is {kind(dtype)}"
        raise _damaged(where, name, f"{reason}; mmq reads {', '.join(DTYPES)}")
    shape = _naturals(value.get("shape"))
    if shape is None or len(shape) > MAX_DIMENSIONS:
        raise _damaged(where, name, f"`shape` must be a list of at most {MAX_DIMENSIONS} whole numbers from 0")
    offsets = _naturals(value.get("data_offsets"))
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(where, name, "`data_offsets` must be two whole numbers from 0, in order")
    expected = prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        raise _damaged(where, name, f"{offsets[1] - offsets[0]:,} bytes, and {dtype} {list(shape)} takes {expected:,}")
    return Entry(DTYPES[dtype], shape, offsets[0], offsets[1])


def _naturals(value: Any) -> tuple[int, ...] | None:
    """A list of whole numbers from 0 to `MAX_LENGTH` as a tuple; None for any other value."""
    if not isinstance(value, list) or any(type(v) is not int or not 0 <= v <= MAX_LENGTH for v in value):
        return None
    return tuple(value)


def _check_metadata(metadata: Any, where: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{where}: the `{METADATA}` of its safetensors header must be an object of strings", HINT)


def _damaged(where: str, name: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{where}: its safetensors header is damaged: {name}: {reason}", HINT)
