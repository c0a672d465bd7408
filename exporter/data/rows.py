"""What all readers of local data share: rows, problems told all at once, the choice by seed, and opening pictures.

A reader finds rows and problems; `to_samples` chooses, opens every chosen picture once and raises or returns. Nothing
is left out in silence: a line, an id or a picture that cannot be used is a problem, and any problem stops the job.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from exporter.data.pictures import PictureError, open_picture
from exporter.errors import DataError
from exporter.tasks.sample import Sample

SHOWN = 20  # problems in one message
MOST_BYTES = 255  # of one part of a path, on every usual file system


class BadRowError(Exception):
    """What is wrong with one line, entry or picture."""


@dataclass(frozen=True)
class Row:
    """One usable entry. where: file and place in it, for messages. name: the picture relative to the user's folder."""

    where: str
    name: str
    path: Path
    identity: str
    question: str | None
    references: tuple[str, ...]
    kind: str = ""


@dataclass
class Rows:
    """What a reader found so far in `folder`."""

    folder: Path
    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        """A BadRowError raised inside becomes a problem of that place, and reading goes on."""
        try:
            yield
        except BadRowError as error:
            self.problems.append(f"{where}: {error}")


def to_samples(found: Rows, limit: int, seed: int, nothing: str, hint: str | None = None) -> list[Sample]:
    """At most `limit` samples, chosen by `seed`, independent of the order of rows; every chosen picture is opened.

    Raises one DataError with all problems, or with `nothing` and `hint` when there is no row at all.
    """
    unwritable = [f"{row.where}: holds text that is not UTF-8" for row in found.rows if not _is_writable(row)]
    chosen = sorted(found.rows, key=lambda row: digest(f"{seed}:{row.identity}"))[:limit]
    pictures = {row.path: row for row in reversed(chosen)}
    broken = [problem for row in chosen if pictures[row.path] is row and (problem := _picture_problem(found, row))]
    raise_all(found.folder, [*found.problems, *unwritable, *broken])
    if not chosen:
        raise DataError(nothing, hint)
    return [
        Sample(r.identity, partial(open_picture, r.path), r.question, r.references, r.kind, file=r.name) for r in chosen
    ]


def digest(text: str) -> bytes:
    """sha256 of a text: a stable pseudo-random sort key."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def below(folder: Path, name: str) -> Path:
    """The path of `name` below `folder`; BadRowError for a name that points elsewhere or that no file has."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise BadRowError(f"`file_name` must stay in the folder: '{name}'")
    longest = max((len(part.encode("utf-8", "surrogatepass")) for part in Path(name).parts), default=0)
    if "\0" in name or not is_unicode(name) or longest > MOST_BYTES:
        raise BadRowError(f"no file can have the name {name!a}")
    return folder / name


def is_unicode(text: str) -> bool:
    """Whether a text can be written: JSON's escapes, and names on disk, may hold halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_writable(row: Row) -> bool:
    return all(map(is_unicode, (row.name, row.identity, row.question or "", row.kind, *row.references)))


def _picture_problem(found: Rows, row: Row) -> str | None:
    """Why the picture cannot be used, or None. Decodes it whole, within Pillow's limit on pixels.

    Nothing outside of the user's folder is opened, not even through a link.
    """
    try:
        if not row.path.resolve().is_relative_to(found.folder.resolve()):
            return f"{row.where}: '{row.name}' is a link out of the folder"
        if not row.path.is_file():
            return f"{row.where}: no picture '{row.name}'"
        open_picture(row.path)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return f"{row.where}: '{row.name}' has more than {Image.MAX_IMAGE_PIXELS} pixels"
    except PictureError as error:
        return f"{row.where}: '{row.name}': {error}"
    except Exception as error:  # noqa: BLE001 (Pillow's readers raise many kinds on damaged files)
        return f"{row.where}: '{row.name}' cannot be read ({type(error).__name__})"
    return None


def raise_all(path: Path, problems: Sequence[str]) -> None:
    """One DataError with all problems, the first of them by name; nothing when there are none."""
    if not problems:
        return
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    lines = [f"  {problem.encode('utf-8', 'backslashreplace').decode()}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  and {len(problems) - SHOWN} more")
    raise DataError("\n".join([f"{path} has {count}", *lines]))


def first_file(folder: Path, names: Iterable[str], what: str, layout: str) -> Path:
    """The first of `names` that is a file below `folder`. DataError lists all of them and the official layout."""
    if not folder.is_dir():
        raise DataError(f"no data folder {folder}", f"unpack {layout}")
    tried = list(names)
    for name in tried:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder} has no {what}: looked for {', '.join(tried)}", f"unpack {layout}")


def first_folder(folder: Path, names: Iterable[str], what: str, layout: str) -> Path:
    """The first of `names` that is a folder below `folder`."""
    tried = list(names)
    for name in tried:
        if (folder / name).is_dir():
            return folder / name
    raise DataError(f"{folder} has no {what}: looked for {', '.join(tried)}", f"unpack {layout}")


def load_json(file: Path, hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The content of a JSON file; a file that is none is a DataError. hook: as `json.loads`' object_pairs_hook."""
    try:
        return json.loads(file.read_bytes(), object_pairs_hook=hook)
    except UnicodeDecodeError:
        raise DataError(f"{file} is not UTF-8", "download it again") from None
    except (ValueError, RecursionError) as error:  # ValueError: also a number of more digits than Python reads
        raise DataError(f"{file} is not JSON ({error})", "download it again: it may be cut short") from None


def entries(content: Any, key: str, file: Path) -> list[dict[str, Any]]:
    """The list of objects that an official file holds under `key`. DataError when it holds something else."""
    listed = content.get(key) if isinstance(content, dict) else None
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise DataError(f"{file} has no list of objects `{key}`", "is it the official file of this data set?")
    return listed


def text(entry: dict[str, Any], key: str) -> str:
    """A text that must be there and not empty (BadRowError)."""
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise BadRowError(f"`{key}` must be a text that is not empty")
    return value


def texts(listed: Sequence[Any], what: str) -> tuple[str, ...]:
    """All of `listed`, which must be texts and not all empty; those that are not empty come first (BadRowError).

    The official files hold a few empty captions; they stay among the references.
    """
    if not all(isinstance(value, str) for value in listed) or not any(value.strip() for value in listed):
        raise BadRowError(f"{what} must be texts, and not all empty")
    return tuple(sorted(listed, key=lambda value: not value.strip()))


def number(entry: dict[str, Any], key: str) -> int:
    """A whole number that must be there (BadRowError); ids in the official files are numbers."""
    value = entry.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadRowError(f"`{key}` must be a whole number")
    return value


def check_id(entry: dict[str, Any], key: str) -> None:
    """BadRowError unless there is an id, a whole number or a text: for ids that are only compared."""
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise BadRowError(f"`{key}` must be a whole number or a text that is not empty")


def repeated(ids: Iterable[Any], what: str, where: str) -> list[str]:
    """One problem for every id that comes more than once. What is no id at all is left to checks of each entry."""
    counts = Counter(identity for identity in ids if isinstance(identity, int | str))
    return [f"{where}: {what} {identity} is there {count} times" for identity, count in counts.items() if count > 1]
