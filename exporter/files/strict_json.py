"""Strict JSON reader for untrusted files: returns an object or raises CheckpointError."""

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exporter.errors import CheckpointError

MOST_BYTES = 64 * 2**20  # about the index size of a checkpoint with a million tensors


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    CheckpointError if the file is missing, unreadable, too large, not JSON, nested too deeply or not an object.
    """
    return parse_object(read_small(path), str(path))


def read_small(path: Path, most: int = MOST_BYTES) -> bytes:
    """The content of a regular file of at most `most` bytes; CheckpointError for anything else."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device might never end
            raise CheckpointError(f"{path}: not a regular file")
        if status.st_size > most:
            raise CheckpointError(f"{path}: {status.st_size:,} bytes; mmq reads at most {most:,} bytes of this file")
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file", "a model folder needs config.json next to its shards") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None


def parse_object(raw: bytes, where: str, unique: bool = False) -> dict[str, Any]:
    """The JSON object in `raw`.

    where: its file, for messages. unique: if True, a duplicate key is an error; otherwise its last value is used.
    """
    hook: Callable[[list[tuple[str, Any]]], dict[str, Any]] = _unique if unique else dict
    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=hook)
    except RecursionError:
        raise CheckpointError(f"{where}: its JSON is nested too deeply") from None
    except ValueError as error:  # includes invalid UTF-8, and numbers with more digits than Python parses
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise CheckpointError(f"{where}: cannot be read as JSON ({reason})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: expected a JSON object, not {kind(data)}")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError for a duplicate key."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return entries


def kind(value: Any) -> str:
    """Description of a JSON value: `a list`, `null`, `the text 'x'`, `the number 3`; long values are shortened."""
    if value is None or isinstance(value, bool):
        return str(json.dumps(value))
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    return f"the number {value}"
