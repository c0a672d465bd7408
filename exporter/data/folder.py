"""A local folder of pictures and texts, as the hub's `imagefolder` lays it out.

`DIR/metadata.jsonl` has one object a line: `file_name`, and `caption` or `captions`, and/or `question` with `answer`
or `answers`; optional `id` and `kind`. Several lines may share a picture. `DIR/train`, `DIR/validation` and `DIR/test`
may each hold their own; a folder without them gives half of its pictures to train and half to test. Pictures without
any metadata can be calibrated on, for captioning alone.
"""

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from exporter.errors import DataError
from exporter.tasks.sample import Sample

SPLITS = ("train", "validation", "test")
METADATA = "metadata.jsonl"
SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
SHOWN = 20  # problems in one message

_FIELDS = {
    "captioning": "`caption` or `captions`",
    "vqa": "`question` with `answer` or `answers`",
}


class _BadLineError(Exception):
    """What is wrong with one line or picture."""


@dataclass(frozen=True)
class _Row:
    """One usable line. where: file and line, for messages. name: the picture relative to the user's folder."""

    where: str
    name: str
    path: Path
    identity: str
    question: str | None
    references: tuple[str, ...]
    kind: str


def samples(path: Path, task: str, split: str, limit: int, seed: int) -> list[Sample]:
    """At most `limit` samples of `path`, chosen by `seed`, independent of the order of lines.

    Every chosen picture is opened once here. Raises one DataError with all problems: bad lines, missing or unreadable
    or oversized pictures, paths out of the folder, repeated ids; or when nothing fits task and split.
    """
    if not path.is_dir():
        raise DataError(f"no data folder {path}", f"make one with pictures and a {METADATA}, or leave --data out")
    folder = _split_folder(path, split)
    if not (folder / METADATA).is_file():
        rows, problems = _bare_rows(path, folder, task, split)
    else:
        rows, problems = _described_rows(path, folder, task)
        if folder == path and not problems:
            rows = _half(rows, split)
    chosen = _choose(rows, limit, seed)
    problems += [problem for row in chosen if (problem := _picture_problem(row))]
    _raise_all(path, problems)
    if not chosen:
        raise DataError(f"{folder / METADATA}: no line for task {task}, split {split}", f"{task} needs {_FIELDS[task]}")
    return [Sample(r.identity, partial(open_picture, r.path), r.question, r.references, r.kind) for r in chosen]


def open_picture(path: Path) -> Image.Image:
    """The picture in RGB, turned as its EXIF data says."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def _split_folder(path: Path, split: str) -> Path:
    present = [name for name in SPLITS if (path / name).is_dir()]
    if not present:
        return path
    if split not in present:
        raise DataError(f"{path} has no folder '{split}' (it has {', '.join(present)})")
    return path / split


def _bare_rows(path: Path, folder: Path, task: str, split: str) -> tuple[list[_Row], list[str]]:
    """Every picture of a folder without metadata, to calibrate captioning on, and what is wrong with any."""
    if task != "captioning" or split != "train":
        raise DataError(
            f"{folder} has no {METADATA}, which {task} on split {split} needs",
            f"one JSON object a line: `file_name` and {_FIELDS[task]}. Pictures alone can only be calibrated on, "
            "with calibration.tasks: [captioning]",
        )
    found = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in SUFFIXES]
    if not found:
        raise DataError(f"{folder} holds neither {METADATA} nor pictures ({', '.join(sorted(SUFFIXES))})")
    rows, problems = [], []
    for file in found:
        name = file.relative_to(path).as_posix()
        try:
            rows.append(_Row(name, name, _inside(path, path, name), name, None, (), ""))
        except _BadLineError as error:
            problems.append(f"{name}: {error}")
    return rows, problems


def _described_rows(path: Path, folder: Path, task: str) -> tuple[list[_Row], list[str]]:
    """Lines of the metadata that fit the task, and what is wrong with any line."""
    rows: list[_Row] = []
    problems: list[str] = []
    seen: dict[str, str] = {}
    lines = (folder / METADATA).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{(folder / METADATA).relative_to(path)}:{number}"
        try:
            row = _parse(line, where, path, folder, task)
        except _BadLineError as error:
            problems.append(f"{where}: {error}")
            continue
        if row is None:
            continue
        if row.identity in seen:
            problems.append(f"{where}: id '{row.identity}' is also on line {seen[row.identity].rpartition(':')[2]}")
        seen.setdefault(row.identity, where)
        rows.append(row)
    return rows, problems


def _parse(line: bytes, where: str, path: Path, folder: Path, task: str) -> _Row | None:
    """One line; None when it is fine but says nothing about the task."""
    try:
        entry = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise _BadLineError("not UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise _BadLineError(f"not JSON ({error})") from None
    if not isinstance(entry, dict):
        raise _BadLineError("not a JSON object")
    name = _text(entry, "file_name")
    if name is None:
        raise _BadLineError("`file_name` is missing")
    file = _inside(path, folder, name)
    question, references = _question(entry), _references(entry, task)
    if not references or (task == "vqa" and question is None):
        return None
    relative = (folder / name).relative_to(path).as_posix()
    asked = question if task == "vqa" else None
    identity = _text(entry, "id") or (f"{relative}: {asked}" if asked else relative)
    return _Row(where, relative, file, identity, asked, references, _text(entry, "kind") or "")


def _text(entry: dict[str, Any], key: str) -> str | None:
    value = entry.get(key)
    if value is None:
        return None
    if key == "id" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise _BadLineError(f"`{key}` must be a text that is not empty")
    return value


def _texts(entry: dict[str, Any], one: str, many: str) -> tuple[str, ...]:
    """`one` as a text or `many` as a list of texts; empty when neither is there."""
    single, listed = _text(entry, one), entry.get(many)
    if single is not None and listed is not None:
        raise _BadLineError(f"give `{one}` or `{many}`, not both")
    if listed is None:
        return () if single is None else (single,)
    if not isinstance(listed, list) or not listed or not all(isinstance(t, str) and t.strip() for t in listed):
        raise _BadLineError(f"`{many}` must be a list of texts that are not empty")
    return tuple(listed)


def _question(entry: dict[str, Any]) -> str | None:
    question, answers = _text(entry, "question"), _texts(entry, "answer", "answers")
    if (question is None) != (not answers):
        raise _BadLineError("a `question` goes with `answer` or `answers`")
    return question


def _references(entry: dict[str, Any], task: str) -> tuple[str, ...]:
    captions = _texts(entry, "caption", "captions")
    return captions if task == "captioning" else _texts(entry, "answer", "answers")


def _inside(path: Path, folder: Path, name: str) -> Path:
    """The file of `name` below `folder`; nothing outside of `path` is opened, not even through a link."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise _BadLineError(f"`file_name` must stay in the folder: '{name}'")
    file = folder / name
    if not file.resolve().is_relative_to(path.resolve()):
        raise _BadLineError(f"'{name}' is a link out of the folder")
    if not file.is_file():
        raise _BadLineError(f"no picture '{name}'")
    return file


def _half(rows: Sequence[_Row], split: str) -> list[_Row]:
    """Train or test pictures of a folder without splits: names in the order of their hash, cut in the middle."""
    if split == "validation":
        raise DataError("a data folder without train, validation and test folders has no validation split")
    names = sorted({row.name for row in rows}, key=_hash)
    middle = (len(names) + 1) // 2
    wanted = set(names[:middle] if split == "train" else names[middle:])
    return [row for row in rows if row.name in wanted]


def _choose(rows: Sequence[_Row], limit: int, seed: int) -> list[_Row]:
    return sorted(rows, key=lambda row: _hash(f"{seed}:{row.identity}"))[:limit]


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _picture_problem(row: _Row) -> str | None:
    """Why the picture cannot be used, or None. Decodes it whole, within Pillow's limit on pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            open_picture(row.path)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return f"{row.where}: '{row.name}' has more than {Image.MAX_IMAGE_PIXELS} pixels"
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # what Pillow's readers raise on damaged files
        return f"{row.where}: '{row.name}' cannot be read ({type(error).__name__})"
    return None


def _raise_all(path: Path, problems: Sequence[str]) -> None:
    if not problems:
        return
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    lines = [f"  {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  and {len(problems) - SHOWN} more")
    raise DataError("\n".join([f"{path} has {count}", *lines]))
