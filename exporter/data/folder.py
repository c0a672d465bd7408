"""Local data folder of pictures and texts, in the layout of the hub's `imagefolder`.

`DIR/metadata.jsonl` has one object per line: `file_name`, and `caption` or `captions` (or `text`), and/or `question`
with `answer` or `answers`; optional `id` and `kind`. `DIR/metadata.csv` has the same fields as columns, one text each;
`DIR/metadata.parquet` has them as columns of strings and lists of strings.
Several lines may share a picture. `DIR/train`, `DIR/validation` and `DIR/test` may each have their own metadata;
without these folders, half of the pictures are train and half are test. Pictures without metadata can only be used to
calibrate, for captioning.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from exporter.data.rows import BadRowError, Row, Rows, below, digest, to_samples
from exporter.data.tasks import vqa
from exporter.data.tasks.sample import Sample
from exporter.distribution import install_extra
from exporter.errors import DataError, one_line

SPLITS = ("train", "validation", "test")
METADATA = "metadata.jsonl"
TABLE = "metadata.csv"
PARQUET = "metadata.parquet"
METADATA_FILES = (METADATA, TABLE, PARQUET)
SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))

_FIELDS = {
    "captioning": "`caption`, `captions` or `text`",
    "vqa": "`question` with `answer` or `answers`",
    "retrieval": "`caption`, `captions` or `text`",
}


def samples(path: Path, task: str, split: str, limit: int, seed: int) -> list[Sample]:
    """At most `limit` samples of `path`, selected by `seed`, independent of the order of lines.

    Opens every selected picture once. Raises one DataError with all problems (invalid lines, missing, unreadable or
    oversized pictures, paths outside the folder, duplicate ids), or if no line fits the task and split.
    """
    if not path.is_dir():
        raise DataError(f"no data folder {path}", f"create it with pictures and a {METADATA}, or omit --data")
    folder = _split_folder(path, split)
    file = metadata_of(folder)
    if file is None:
        result = _bare_rows(path, folder, task, split)
    else:
        result = _described_rows(path, folder, file, task)
        if folder == path and not result.problems:
            result.rows = half(result.rows, split)
    no_lines = f"{file or folder / METADATA}: no line for task {task}, split {split}"
    return to_samples(result, limit, seed, no_lines, f"{task} needs {_FIELDS[task]}")


def has_pictures(path: Path) -> bool:
    """Whether a folder or one of its splits has metadata, or a picture is anywhere below it."""
    places = (path, *(path / split for split in SPLITS))
    described = any((place / name).is_file() for place in places for name in METADATA_FILES)
    return described or any(file.suffix.lower() in SUFFIXES for file in path.rglob("*"))


def metadata_of(folder: Path) -> Path | None:
    """The folder's metadata file; DataError if it has several."""
    tables = [folder / name for name in METADATA_FILES if (folder / name).is_file()]
    if len(tables) > 1:
        raise DataError(f"{folder} has both {tables[0].name} and {tables[1].name}", "remove one of them")
    return tables[0] if tables else None


def _split_folder(path: Path, split: str) -> Path:
    present = [name for name in SPLITS if (path / name).is_dir()]
    if not present:
        return path
    if split not in present:
        raise DataError(f"{path} has no folder '{split}' (it has {', '.join(present)})")
    return path / split


def _bare_rows(path: Path, folder: Path, task: str, split: str) -> Rows:
    """All pictures of a folder without metadata, for calibration on captioning."""
    if task != "captioning" or split != "train":
        raise DataError(
            f"{folder} has no {METADATA}, which {task} on split {split} needs",
            f"write one JSON object per line with `file_name` and {_FIELDS[task]}. Pictures without metadata can only "
            "be used for calibration, with calibration.tasks: [captioning]",
        )
    files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in SUFFIXES]
    if not files:
        raise DataError(f"{folder} contains neither {METADATA} nor pictures ({', '.join(sorted(SUFFIXES))})")
    names = [file.relative_to(path).as_posix() for file in files]
    return Rows(path, [Row(name, name, path / name, name, None, ()) for name in names])


def _described_rows(path: Path, folder: Path, file: Path, task: str) -> Rows:
    """Lines of the metadata that fit the task, and the problems of all lines."""
    result = Rows(path)
    places: dict[str, str] = {}
    readers = {METADATA: _lines, TABLE: _table, PARQUET: _parquet_rows}
    for number, read in readers[file.name](file):
        where = f"{file.relative_to(path)}:{number}"
        with result.at(where):
            entry = read()
            row = None if entry is None else _parse(entry, where, path, folder, task)
            if row is None:
                continue
            result.rows.append(row)
            if row.identity in places:
                raise BadRowError(f"id '{row.identity}' is also on line {places[row.identity].rpartition(':')[2]}")
            places[row.identity] = where
    return result


def _lines(file: Path) -> Iterator[tuple[int, Callable[[], dict[str, Any] | None]]]:
    """Number of every line of a JSON lines file, and a function that parses it (None: an empty line)."""
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        yield number, partial(_json_object, line)


def _json_object(line: bytes) -> dict[str, Any] | None:
    if not line.strip():
        return None
    try:
        entry = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadRowError("not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"not JSON ({error})") from None
    if not isinstance(entry, dict):
        raise BadRowError("not a JSON object")
    return entry


def _table(file: Path) -> Iterator[tuple[int, Callable[[], dict[str, Any] | None]]]:
    """Last line of every row of a CSV file, and a function that gives its filled cells by column."""
    try:
        content = file.read_bytes().decode("utf-8-sig")
        rows = csv.DictReader(io.StringIO(content, newline=""), strict=True)
        if "file_name" not in (rows.fieldnames or ()):
            raise DataError(f"{file} has no column `file_name`", f"its columns are: {', '.join(rows.fieldnames or ())}")
        for row in rows:
            yield rows.line_num, partial(_cells, row)
    except UnicodeDecodeError:
        raise DataError(f"{file} is not UTF-8", "save it as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{file}:{rows.line_num + 1}: not CSV ({error})", "quote texts that contain commas") from None


def _parquet_rows(file: Path) -> Iterator[tuple[int, Callable[[], dict[str, Any] | None]]]:
    """Number of every row of a parquet file, from 1, and a function that gives its values by column, without nulls."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        hint = f"{install_extra('hub')}, or write {METADATA}"
        raise DataError(f"{file} needs pyarrow", hint) from None
    try:
        table = ParquetFile(file)
        if "file_name" not in table.schema_arrow.names:
            columns = ", ".join(table.schema_arrow.names)
            raise DataError(f"{file} has no column `file_name`", f"its columns are: {columns}")
        number = 0
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, partial(dict, {key: value for key, value in row.items() if value not in (None, "", [])})
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(f"{file} is not a parquet file ({one_line(str(error))})", "write it again") from None


def _cells(row: dict[str | Any, Any]) -> dict[str, Any]:
    if None in row:
        raise BadRowError("more cells than the header has columns; quote texts that contain commas")
    return {key: value for key, value in row.items() if value}


def _parse(entry: dict[str, Any], where: str, path: Path, folder: Path, task: str) -> Row | None:
    """The row of one entry; None if it is valid but has no text for the task."""
    name = _text(entry, "file_name")
    if name is None:
        raise BadRowError("`file_name` is missing")
    file = below(folder, name)
    question, references = _question(entry), _references(entry, task)
    if question is None and not _references(entry, "captioning"):
        raise BadRowError("no text: a row needs a caption, or a question with its answers")
    if not references or (task == "vqa" and question is None):
        return None
    relative = (folder / name).relative_to(path).as_posix()
    task_question = question if task == "vqa" else None
    identity = _text(entry, "id") or (f"{relative}: {task_question}" if task_question else relative)
    kind, metrics = _text(entry, "kind") or "", _metrics(entry, task)
    return Row(where, relative, file, identity, task_question, references, kind, metrics)


def _metrics(entry: dict[str, Any], task: str) -> tuple[str, ...]:
    """The metric that the row names, for `vqa`."""
    metric = _text(entry, "metric")
    if metric is None or task != "vqa":
        return ()
    if metric not in vqa.METRICS:
        raise BadRowError(f"`metric` must be one of {', '.join(vqa.METRICS)}, not '{metric}'")
    return (metric,)


def _text(entry: dict[str, Any], key: str) -> str | None:
    value = entry.get(key)
    if value is None:
        return None
    if key == "id" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise BadRowError(f"`{key}` must be a non-empty string")
    return value


def _texts(entry: dict[str, Any], singular: str, plural: str) -> tuple[str, ...]:
    """The string `singular` or the list of strings `plural`; empty if both are missing."""
    single, listed = _text(entry, singular), entry.get(plural)
    if single is not None and listed is not None:
        raise BadRowError(f"give `{singular}` or `{plural}`, not both")
    if listed is None:
        return () if single is None else (single,)
    if not isinstance(listed, list) or not listed or not all(isinstance(t, str) and t.strip() for t in listed):
        raise BadRowError(f"`{plural}` must be a list of non-empty strings")
    return tuple(listed)


def _question(entry: dict[str, Any]) -> str | None:
    question, answers = _text(entry, "question"), _texts(entry, "answer", "answers")
    if (question is None) != (not answers):
        raise BadRowError("`question` needs `answer` or `answers`, and they need `question`")
    return question


def _references(entry: dict[str, Any], task: str) -> tuple[str, ...]:
    captions = _texts(entry, "caption", "captions") or _texts(entry, "text", "texts")
    return captions if task != "vqa" else _texts(entry, "answer", "answers")


def half(rows: Sequence[Row], split: str) -> list[Row]:
    """Train or test half of the pictures of a folder without splits: names sorted by hash, cut in the middle."""
    if split == "validation":
        raise DataError(
            "a data folder without train, validation and test folders has no validation split",
            "move its pictures and lines into folders with these names; `mmq datasets folder` has an example",
        )
    names = sorted({row.name for row in rows}, key=digest)
    middle = (len(names) + 1) // 2
    selected = set(names[:middle] if split == "train" else names[middle:])
    return [row for row in rows if row.name in selected]
