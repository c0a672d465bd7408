"""Common code of all readers of local data: rows and problems, selection by seed, validation of fields and pictures.

A reader collects rows and problems; `to_samples` selects rows, opens every selected picture once, and returns samples
or raises. No row is skipped silently: an unusable line, id or picture is a problem, and any problem stops the job.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from exporter.data.pictures import PictureError, open_picture
from exporter.data.tasks.sample import Sample
from exporter.errors import DataError
from exporter.out_of_memory import is_shortage

SHOWN = 20  # most problems in one message
MOST_BYTES = 255  # limit of common file systems for one path component


class BadRowError(Exception):
    """One line, entry or picture is unusable; the message gives the reason."""


@dataclass(frozen=True)
class Row:
    """One usable entry. where: file and position, for messages. name: the picture relative to the user's folder.

    metrics: `Sample.metrics`.
    """

    where: str
    name: str
    path: Path
    identity: str
    question: str | None
    references: tuple[str, ...]
    kind: str = ""
    metrics: tuple[str, ...] = ()


@dataclass
class Rows:
    """Rows and problems that a reader has collected from `folder`."""

    folder: Path
    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        """Record a BadRowError raised inside as a problem at `where` and continue."""
        try:
            yield
        except BadRowError as error:
            self.problems.append(f"{where}: {error}")


class Selection(list[Sample]):
    """The selected samples. available: number of samples in the data, of which these are a selection."""

    def __init__(self, samples: Iterable[Sample], available: int) -> None:
        super().__init__(samples)
        self.available = available


def to_samples(rows: Rows, limit: int, seed: int, empty_message: str, hint: str | None = None) -> list[Sample]:
    """At most `limit` samples, selected by `seed`, independent of the order of rows; opens every selected picture.

    Raises one DataError with all problems, or with `empty_message` and `hint` if there are no rows.
    """
    unwritable = [f"{row.where}: contains text that is not UTF-8" for row in rows.rows if not _is_writable(row)]
    selected = sorted(rows.rows, key=lambda row: digest(f"{seed}:{row.identity}"))[:limit]
    pictures = {row.path: row for row in reversed(selected)}
    broken = [problem for row in selected if pictures[row.path] is row and (problem := _picture_problem(rows, row))]
    raise_all(rows.folder, [*rows.problems, *unwritable, *broken])
    if not selected:
        raise DataError(empty_message, hint)
    return Selection(
        [
            Sample(
                r.identity,
                partial(_reopened, r.path),
                r.question,
                r.references,
                r.kind,
                file=r.name,
                metrics=r.metrics,
            )
            for r in selected
        ],
        len(rows.rows),
    )


def _reopened(path: Path) -> Image.Image:
    """A picture that could be read when the samples were selected; DataError if it changed since then."""
    try:
        return open_picture(path)
    except PictureError as error:
        raise DataError(f"{path} changed while the job ran: {error}", "run the same command again") from None


def digest(text: str) -> bytes:
    """sha256 of a text: a stable pseudo-random sort key."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def below(folder: Path, name: str) -> Path:
    """The path of `name` below `folder`; BadRowError for a name outside the folder or an invalid file name."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise BadRowError(f"`file_name` must stay in the folder: '{name}'")
    longest = max((len(part.encode("utf-8", "surrogatepass")) for part in Path(name).parts), default=0)
    if "\0" in name or not is_unicode(name) or longest > MOST_BYTES:
        raise BadRowError(f"invalid file name {name!a}")
    return folder / name


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded as UTF-8: JSON escapes and file names may contain lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_writable(row: Row) -> bool:
    return all(map(is_unicode, (row.name, row.identity, row.question or "", row.kind, *row.references)))


def _picture_problem(rows: Rows, row: Row) -> str | None:
    """Why the picture cannot be used, or None. Decodes the whole picture, within Pillow's limit on pixels.

    Does not open files outside the user's folder, not even through a symbolic link, except the links of a snapshot in
    the hub's cache to the files of the same repository.
    """
    try:
        target = row.path.resolve()
        if not any(target.is_relative_to(root) for root in (rows.folder.resolve(), *_cache_roots(rows.folder))):
            return f"{row.where}: '{row.name}' is a link to a file outside the folder"
        if not row.path.is_file():
            return f"{row.where}: no picture '{row.name}'"
        open_picture(row.path)
    except PictureError as error:
        return f"{row.where}: '{row.name}': {error}"
    except (OSError, RuntimeError) as error:  # a file that vanished, or a loop of links
        if is_shortage(error):
            raise
        return f"{row.where}: '{row.name}' cannot be read ({type(error).__name__})"
    return None


def _cache_roots(folder: Path) -> list[Path]:
    """Folders to which the links of a snapshot in the hub's cache point: REPO/blobs of REPO/snapshots/COMMIT."""
    places = [folder.absolute(), *folder.absolute().parents]
    repositories = [place.parent.parent for place in places if place.parent.name == "snapshots"]
    return [(repo / "blobs").resolve() for repo in repositories if re.match(r"(datasets|models)--", repo.name)]


def raise_all(path: Path, problems: Sequence[str]) -> None:
    """Raise one DataError with the number of problems and the first `SHOWN` of them; return if there are none."""
    if not problems:
        return
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    lines = [f"  {problem.encode('utf-8', 'backslashreplace').decode()}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  and {len(problems) - SHOWN} more")
    error = DataError("\n".join([f"{path} has {count}", *lines]))
    error.problems = tuple(problems)
    raise error


def first_file(folder: Path, names: Iterable[str], what: str, layout: str) -> Path:
    """The first of `names` that is a file below `folder`. DataError lists all names and the official layout."""
    if not folder.is_dir():
        raise DataError(f"no data folder {folder}", f"unpack {layout}")
    tried = list(names)
    for name in tried:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder} has no {what}: looked for {', '.join(tried)}", f"unpack {layout}")


def first_folder(folder: Path, names: Iterable[str], what: str, layout: str) -> Path:
    """The first of `names` that is a folder below `folder`; DataError as `first_file`."""
    tried = list(names)
    for name in tried:
        if (folder / name).is_dir():
            return folder / name
    raise DataError(f"{folder} has no {what}: looked for {', '.join(tried)}", f"unpack {layout}")


def load_json(file: Path, hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The content of a JSON file; DataError if it is not JSON. hook: `object_pairs_hook` of `json.loads`."""
    try:
        return json.loads(file.read_bytes(), object_pairs_hook=hook)
    except UnicodeDecodeError:
        raise DataError(f"{file} is not UTF-8", "download it again") from None
    except (ValueError, RecursionError) as error:  # ValueError includes numbers with more digits than Python parses
        raise DataError(f"{file} is not JSON ({error})", "download it again; it may be truncated") from None


def entries(content: Any, key: str, file: Path) -> list[dict[str, Any]]:
    """The list of objects under `key` in an official file. DataError if it is anything else."""
    listed = content.get(key) if isinstance(content, dict) else None
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise DataError(f"{file} has no list of objects `{key}`", "use the official file of this data set")
    return listed


def text(entry: dict[str, Any], key: str) -> str:
    """The non-empty string under `key`; BadRowError if it is anything else."""
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise BadRowError(f"`{key}` must be a non-empty string")
    return value


def texts(listed: Sequence[Any], what: str) -> tuple[str, ...]:
    """`listed` as a tuple, non-empty strings first; BadRowError unless all are strings and at least one is not empty.

    The official files contain a few empty captions, which stay among the references.
    """
    if not all(isinstance(value, str) for value in listed) or not any(value.strip() for value in listed):
        raise BadRowError(f"{what} must be strings, and at least one must not be empty")
    return tuple(sorted(listed, key=lambda value: not value.strip()))


def number(entry: dict[str, Any], key: str) -> int:
    """The whole number under `key` (ids in the official files); BadRowError if it is anything else."""
    value = entry.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadRowError(f"`{key}` must be a whole number")
    return value


def check_id(entry: dict[str, Any], key: str) -> None:
    """BadRowError unless the id under `key` is a whole number or a non-empty string."""
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise BadRowError(f"`{key}` must be a whole number or a non-empty string")


def repeated(ids: Iterable[Any], what: str, where: str) -> list[str]:
    """One problem for every duplicate id. Values that are not ids are left to the checks of each entry."""
    counts = Counter(identity for identity in ids if isinstance(identity, int | str))
    return [f"{where}: {what} {identity} occurs {count} times" for identity, count in counts.items() if count > 1]
