"""What was measured, in one SQLite file: a row for every setting, written the moment it is known."""

import csv
import io
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from exporter.errors import DataError
from exporter.evaluation.answers import digest
from exporter.files.writing import make_folder

FILE = "study.sqlite"
EVERYTHING = "all"  # blocks, or roles
FULL = "none"  # method of the setting that keeps everything
SCHEMA = """
CREATE TABLE IF NOT EXISTS points (
  id TEXT PRIMARY KEY,      -- digest of its units and of the exam: the same setting is measured once
  exam TEXT NOT NULL,       -- digest of what it was scored on and how
  about TEXT NOT NULL,      -- JSON: bits of each component, method, group size, blocks, role
  bytes INTEGER NOT NULL,   -- of the artifact, scales and kept tensors counted
  bits_per_weight REAL NOT NULL,
  seconds REAL NOT NULL,    -- wall time of scoring
  cpu_seconds REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS scores (
  point TEXT NOT NULL REFERENCES points(id),
  metric TEXT NOT NULL,
  value REAL NOT NULL,
  PRIMARY KEY (point, metric)
);
CREATE TABLE IF NOT EXISTS checksums (
  point TEXT PRIMARY KEY REFERENCES points(id),
  sha256 TEXT NOT NULL      -- of the setting and its scores; settings of older versions have none
);
CREATE TABLE IF NOT EXISTS runs (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  exam TEXT NOT NULL        -- what this run scored on, also when all of it was known already
);
"""
# Settings by when a run last asked for their exam, then by what they are: a forest depends on the order of its rows, so
# it must not be that in which workers finished. Without runs, by when they were measured.
IN_ORDER = """
SELECT id, exam, about, bytes, bits_per_weight, seconds, cpu_seconds,
  coalesce((SELECT max(number) FROM runs WHERE runs.exam = points.exam), 0) AS run
FROM points ORDER BY run, CASE run WHEN 0 THEN rowid END, about, rowid
"""


EXAM_DIGITS = 12  # of an exam's digest, in tables


@dataclass(frozen=True)
class Measured:
    """One setting and its scores; fields as in the table."""

    id: str
    exam: str
    about: Mapping[str, str | int]
    bytes: int
    bits_per_weight: float
    seconds: float
    cpu_seconds: float
    scores: Mapping[str, float]

    def row(self) -> dict[str, Any]:
        """One line of the CSV file."""
        plain = {"bytes": self.bytes, "bits_per_weight": self.bits_per_weight, "seconds": self.seconds}
        return {**self.about, **plain, **self.scores, "exam": self.exam[:EXAM_DIGITS]}


class Records:
    """The file, open; use as a context manager. Every `add` is on disk when it returns."""

    def __init__(self, path: Path) -> None:
        self.damaged: tuple[str, ...] = ()  # what `all` left out, in words
        self._path = path
        make_folder(path.parent)
        try:
            self._db = sqlite3.connect(path)
            self._db.executescript(SCHEMA)
        except sqlite3.Error as error:
            raise DataError(f"{path} is no study: {error}", "give another folder") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()

    def add(self, found: Measured) -> None:
        """Keep one setting, with all its scores or not at all."""
        about = json.dumps(dict(found.about))
        plain = (found.id, found.exam, about, found.bytes, found.bits_per_weight, found.seconds, found.cpu_seconds)
        with self._explained(), self._db:
            self._db.execute("INSERT OR REPLACE INTO points VALUES (?, ?, ?, ?, ?, ?, ?)", plain)
            rows = [(found.id, metric, float(value)) for metric, value in found.scores.items()]
            self._db.execute("DELETE FROM scores WHERE point = ?", (found.id,))
            self._db.executemany("INSERT INTO scores VALUES (?, ?, ?)", rows)
            self._db.execute("INSERT OR REPLACE INTO checksums VALUES (?, ?)", (found.id, checksum(found)))

    def begin(self, exam: str) -> None:
        """Keep that a run scores by this exam, so that its settings come last."""
        with self._explained(), self._db:
            self._db.execute("INSERT INTO runs (exam) VALUES (?)", (exam,))

    def all(self) -> dict[str, Measured]:
        """Everything measured, by id; the exam of the last run comes last. Damaged settings are left out."""
        with self._explained():
            return self._all()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn an error of the database into a DataError."""
        try:
            yield
        except (sqlite3.Error, ValueError) as error:
            hint = "free some space; if the file is damaged, delete it: units are kept, and settings are scored again"
            raise DataError(f"{self._path} cannot be used: {error}", hint) from None

    def _all(self) -> dict[str, Measured]:
        scores: dict[str, dict[str, float]] = {}
        for point, metric, value in self._db.execute("SELECT point, metric, value FROM scores ORDER BY rowid"):
            scores.setdefault(point, {})[metric] = value
        sums = dict(self._db.execute("SELECT point, sha256 FROM checksums"))
        settings = {
            row[0]: Measured(row[0], row[1], json.loads(row[2]), row[3], row[4], row[5], row[6], scores.get(row[0], {}))
            for row in self._db.execute(IN_ORDER)
        }
        wrong = [name for name, found in settings.items() if name in sums and checksum(found) != sums[name]]
        self.damaged = tuple(f"{self._path}: setting {name} is damaged; it is scored again" for name in wrong)
        return {name: found for name, found in settings.items() if name not in wrong}


def checksum(found: Measured) -> str:
    """sha256 of a setting with its scores."""
    return digest([asdict(found) | {"about": dict(found.about), "scores": dict(found.scores)}])


def read_records(folder: Path) -> list[Measured]:
    """Everything a study folder holds; DataError when it holds nothing."""
    path = folder / FILE if folder.is_dir() else folder
    if not path.exists():
        raise DataError(f"{folder} holds no {FILE}", "`mmq study` makes one")
    with Records(path) as records:
        return list(records.all().values())


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every column that some row has, in order."""
    return list(dict.fromkeys(name for row in rows for name in row))


def as_csv(found: Sequence[Measured]) -> str:
    """The table as CSV text, with the columns that `mmq study importance` reads."""
    rows = [one.row() for one in found]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def is_whole(one: Measured) -> bool:
    """Whether a setting names whole components."""
    return one.about.get("blocks") == EVERYTHING and one.about.get("role") == EVERYTHING


def kind_of(one: Measured) -> str:
    """How a setting was quantized, bits and places aside: method, group size and the rest; `none` for the full model.

    Only settings of one kind (and the full model) may stand in one picture: their bits would be the same.
    """
    method, group = str(one.about.get("method")), str(one.about.get("group_size", ""))
    parts = [method, f"g{group}" if group.isdigit() else group] if method != FULL else [FULL]
    parts += ["zero-points"] * (one.about.get("zero_points") == "yes")
    parts += ["sequential"] * bool(one.about.get("sequential"))
    return "-".join(part for part in parts if part)


def is_full(one: Measured) -> bool:
    """Whether a setting keeps everything."""
    return one.about.get("method") in (None, FULL)


def last_exam(found: Sequence[Measured]) -> list[Measured]:
    """Settings scored as in the last run: on the same samples, in the same way, from shared units or in sequence.

    found: in the order of `Records.all`.
    """
    return [one for one in found if one.exam == found[-1].exam]


def comparable(found: Sequence[Measured], parts: bool = False) -> list[Measured]:
    """Settings whose scores may stand in one table: those of the last exam.

    parts: keep settings of some blocks or one role too; without it they go, unless there is nothing else.
    """
    same = last_exam(found)
    whole = [one for one in same if is_whole(one)]
    return same if parts or all(is_full(one) for one in whole) else whole
