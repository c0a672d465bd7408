"""JSON from files that anybody may have written: an object, or one CheckpointError that says what is wrong with it."""

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exporter.errors import CheckpointError

MOST_BYTES = 64 * 2**20  # the index of a checkpoint of a million tensors is about this large


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    CheckpointError when the file is missing, unreadable, too large, not JSON, nested too deeply or not an object.
    """
    return parse_object(read_small(path), str(path))


def read_small(path: Path, most: int = MOST_BYTES) -> bytes:
    """The content of a regular file of at most `most` bytes; CheckpointError for anything else."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device might never end
            raise CheckpointError(f"{path}: not a file")
        if status.st_size > most:
            raise CheckpointError(f"{path}: {status.st_size:,} bytes; mmq reads at most {most:,} there")
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file", "a model folder needs config.json beside its shards") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None


def parse_object(raw: bytes, where: str, unique: bool = False) -> dict[str, Any]:
    """The JSON object in `raw`.

    where: its file, for messages. unique: whether a key that occurs twice is an error; else the last one counts.
    """
    hook: Callable[[list[tuple[str, Any]]], dict[str, Any]] = _unique if unique else dict
    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=hook)
    except RecursionError:
        raise CheckpointError(f"{where}: its JSON is nested too deeply") from None
    except ValueError as error:  # also text that is not UTF-8, and numbers of more digits than Python reads
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise CheckpointError(f"{where}: cannot be read as JSON ({reason})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: expected a JSON object, it holds {kind(data)}")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError when a key occurs twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return found


def kind(value: Any) -> str:
    """What a JSON value is, in words: `a list`, `null`, `the text 'x'`, `the number 3`; long values are cut."""
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
