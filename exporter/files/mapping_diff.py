"""Differences between two nested mappings as text, for errors about changed inputs of a job."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SHOWN = 12  # most differences in the result
SHORT = 40  # most characters of a value in the result; longer values are reported as "differs"
ABSENT = "absent"
NAMED_BY_LEAF = frozenset({"files", "versions", "methods"})  # sections left out of the name of an entry
SAMPLES = "samples"

Path = tuple[str | int, ...]  # keys and list indices of a value


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line per difference: `torch 2.13.0 -> 2.14.0`, `chat_template.jinja differs`, `caption of sample 3`.

    The key "samples" holds a list of mappings, one per sample. Names of entries of "files", "versions" and "methods" do
    not include the section.
    """
    lines = []
    for path, old, new in _differences((), before, now):
        if path[-1] == SAMPLES and isinstance(old, list) and isinstance(new, list):
            lines += _sample_changes(old, new)
        else:
            lines.append(_line(path, old, new))
    return [*lines[:SHOWN], f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else lines


def _differences(path: Path, old: Any, new: Any) -> Iterator[tuple[Path, Any, Any]]:
    if old == new:
        return
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences((*path, key), old.get(key, ABSENT), new.get(key, ABSENT))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and path[-1] != SAMPLES:
        for number, pair in enumerate(zip(old, new, strict=True)):
            yield from _differences((*path, number), *pair)
    else:
        yield path, old, new


def _line(path: Path, old: Any, new: Any) -> str:
    shown_path = path[1:] if path[0] in NAMED_BY_LEAF else path
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in shown_path)[1:]
    shown = [str(value) for value in (old, new)]
    if ABSENT in shown and max(map(len, shown)) > SHORT:
        return f"{name} is {'new' if shown[0] == ABSENT else 'missing'}"
    if max(map(len, shown)) > SHORT or any(isinstance(value, Mapping | list) for value in (old, new)):
        return f"{name} differs"
    return f"{name} {shown[0]} -> {shown[1]}"


def _sample_changes(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line per changed field of the samples; the rendered prompt only if nothing else of a sample changed."""
    if len(old) != len(new):
        return [f"{len(old)} {SAMPLES} -> {len(new)} {SAMPLES}"]
    places: dict[str, list[int]] = {}
    for place, (before, now) in enumerate(zip(old, new, strict=True)):
        fields = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
        for field in [name for name in fields if name != "prompt"] or fields:
            places.setdefault(field, []).append(place)
    return [_sample_line(field, where, new) for field, where in places.items()]


def _sample_line(field: str, places: Sequence[int], samples: Sequence[Mapping[str, Any]]) -> str:
    first = f"sample {places[0] + 1} ({samples[places[0]].get('id')})"
    return f"{field} of {first}" if len(places) == 1 else f"{field} of {len(places)} samples, the first is {first}"
