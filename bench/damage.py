"""Random damage to files, by seed: replaced and removed JSON values; flipped, inserted and removed bytes."""

import copy
import json
from collections.abc import Iterator
from random import Random
from typing import Any

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 13, 255, 2**31, 2**63, 10**9, 10**30, 0.5, -0.0, 1e308, float("nan")),
    *("", "x", "0", "\0", "\ud800", "../x", "/etc/passwd", "a" * 5000, "<image>", "{{", "float16", "cpu", "\x1b[2J"),
    *([], [[]], [None], [0], [1, 2], ["x"], {}, {"a": 1}, {"": None}, [[0] * 50], {"a": {"b": {"c": []}}}),
)
TEXTS: tuple[bytes, ...] = (
    *(b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 50_000, b'{"a":' * 50_000),
    *(b'{"a": 1' + b"0" * 5000 + b"}", b"{}" + b" " * 99_999, b"\0" * 64, b'{"a": 1, "a": 2}', b"PK\x03\x04", b"{}x"),
)


def places(content: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path (keys and indices) of every value below `content`."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield (*way, key)
        yield from places(value, (*way, key))


def damaged_json(content: Any, random: Random, keys: tuple[str, ...] = ()) -> bytes:
    """A JSON document with one to three values replaced, removed, moved or copied; sometimes invalid JSON.

    keys: names of keys that may be added.
    """
    if random.random() < 0.08:
        return random.choice(TEXTS)
    content = copy.deepcopy(content)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        ways = list(places(content))
        if not ways:
            break
        _change(content, random.choice(ways), random, keys)
    raw = json.dumps(content).encode()
    return damaged_bytes(raw, random) if random.random() < 0.05 else raw


def _change(content: Any, way: tuple[Any, ...], random: Random, keys: tuple[str, ...]) -> None:
    holder = content
    for key in way[:-1]:
        holder = holder[key]
    how, key = random.random(), way[-1]
    if how < 0.2:
        del holder[key]
    elif how < 0.3 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        holder[key] = holder[key] * random.choice((-1, 0, 2, 3, 10**6)) + random.choice((-1, 0, 1))
    elif how < 0.4 and isinstance(holder, dict):
        holder[random.choice((*keys, "x", "auto_map", "num_labels", "model_type"))] = random.choice(VALUES)
    elif how < 0.5 and isinstance(holder, dict):
        holder[random.choice(list(holder))] = copy.deepcopy(holder[key])
    else:
        holder[key] = copy.deepcopy(random.choice(VALUES))


def damaged_bytes(raw: bytes, random: Random) -> bytes:
    """Flip, insert, remove, duplicate or truncate bytes at one to eight positions."""
    content = bytearray(raw)
    for _ in range(random.choice((1, 1, 2, 4, 8))):
        at = random.randrange(len(content) + 1)
        how = random.randrange(6)
        if how == 0 and content:
            content[at % len(content)] ^= 1 << random.randrange(8)
        elif how == 1:
            content[at:at] = random.randbytes(random.randrange(1, 9))
        elif how == 2:
            del content[at : at + random.randrange(1, 64)]
        elif how == 3:
            content[at:at] = content[at : at + random.randrange(1, 64)]
        elif how == 4:
            content[at : at + 4] = random.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\x01"))
        else:
            del content[at + (len(content) - at) // 2 :]
    return bytes(content)
