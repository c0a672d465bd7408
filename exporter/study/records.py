"""SQLite file of a study's measurements: one row per setting, committed as soon as it is scored."""

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
FULL = "none"  # method of the full-precision setting
ERROR, SAMPLES = "score error", "samples"  # scores that say how certain `score` is; older studies lack them
CHANGE, CHANGE_ERROR = "score change", "score change error"  # of `score` from the full-precision model's; as above
NO_SCORES = (ERROR, SAMPLES, CHANGE, CHANGE_ERROR)  # columns that tables of scores omit
SCHEMA = """
CREATE TABLE IF NOT EXISTS points (
  id TEXT PRIMARY KEY,      -- digest of the units and the exam, so that a setting is measured once
  exam TEXT NOT NULL,       -- digest of samples, model, calibration and way of scoring
  about TEXT NOT NULL,      -- JSON: bits of each component, method, group size, blocks, role
  bytes INTEGER NOT NULL,   -- of the artifact, including scales and kept tensors
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
  sha256 TEXT NOT NULL      -- of the setting and its scores; settings of older versions have no row
);
CREATE TABLE IF NOT EXISTS runs (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  exam TEXT NOT NULL        -- exam of this run, also if the run scored no setting
);
"""
# Settings by the last run with their exam, then by `about`. A random forest depends on the order of its rows, so the
# order must not depend on when workers finish. Without runs, the order of insertion.
IN_ORDER = """
SELECT id, exam, about, bytes, bits_per_weight, seconds, cpu_seconds,
  coalesce((SELECT max(number) FROM runs WHERE runs.exam = points.exam), 0) AS run
FROM points ORDER BY run, CASE run WHEN 0 THEN rowid END, about, rowid
"""


EXAM_DIGITS = 12  # digits of an exam's digest in tables


@dataclass(frozen=True)
class ScoredSetting:
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
        """One row of the CSV file."""
        plain = {"bytes": self.bytes, "bits_per_weight": self.bits_per_weight, "seconds": self.seconds}
        return {**self.about, **plain, **self.scores, "exam": self.exam[:EXAM_DIGITS]}


@dataclass(frozen=True)
class PlottedSetting:
    """A setting in a plot. share: score as a share of the full-precision score, with its 95 % interval."""

    bits_per_weight: float
    share: float
    interval: tuple[float, float] | None = None
    name: str = ""
    bytes: int = 0


class Records:
    """The open SQLite file; use it as a context manager. `add` returns after the row is on disk."""

    def __init__(self, path: Path) -> None:
        self.damaged: tuple[str, ...] = ()  # messages about rows that `all` omitted
        self._path = path
        make_folder(path.parent)
        try:
            self._db = sqlite3.connect(path)
            self._db.executescript(SCHEMA)
        except sqlite3.Error as error:
            raise DataError(f"{path} is not a study's database: {error}", "choose another folder") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()

    def add(self, setting: ScoredSetting) -> None:
        """Insert or replace one setting with its scores, in one transaction."""
        about = json.dumps(dict(setting.about))
        fields = (
            setting.id,
            setting.exam,
            about,
            setting.bytes,
            setting.bits_per_weight,
            setting.seconds,
            setting.cpu_seconds,
        )
        with self._database_errors_explained(), self._db:
            self._db.execute("INSERT OR REPLACE INTO points VALUES (?, ?, ?, ?, ?, ?, ?)", fields)
            rows = [(setting.id, metric, float(value)) for metric, value in setting.scores.items()]
            self._db.execute("DELETE FROM scores WHERE point = ?", (setting.id,))
            self._db.executemany("INSERT INTO scores VALUES (?, ?, ?)", rows)
            self._db.execute("INSERT OR REPLACE INTO checksums VALUES (?, ?)", (setting.id, checksum(setting)))

    def begin(self, exam: str) -> None:
        """Record that a run uses this exam, so that its settings come last."""
        with self._database_errors_explained(), self._db:
            self._db.execute("INSERT INTO runs (exam) VALUES (?)", (exam,))

    def all(self) -> dict[str, ScoredSetting]:
        """All settings by id, those of the last run's exam last, without damaged ones."""
        with self._database_errors_explained():
            return self._all()

    @contextmanager
    def _database_errors_explained(self) -> Iterator[None]:
        """Turn an error of the database into a DataError."""
        try:
            yield
        except (sqlite3.Error, ValueError) as error:
            hint = (
                "free some disk space, or delete the file if it is damaged: units are kept, settings are scored again"
            )
            raise DataError(f"{self._path} cannot be used: {error}", hint) from None

    def _all(self) -> dict[str, ScoredSetting]:
        scores: dict[str, dict[str, float]] = {}
        for point, metric, value in self._db.execute("SELECT point, metric, value FROM scores ORDER BY rowid"):
            scores.setdefault(point, {})[metric] = value
        sums = dict(self._db.execute("SELECT point, sha256 FROM checksums"))
        settings = {
            row[0]: ScoredSetting(
                row[0], row[1], json.loads(row[2]), row[3], row[4], row[5], row[6], scores.get(row[0], {})
            )
            for row in self._db.execute(IN_ORDER)
        }
        damaged_ids = [name for name, setting in settings.items() if name in sums and checksum(setting) != sums[name]]
        self.damaged = tuple(f"{self._path}: setting {name} is damaged; it is scored again" for name in damaged_ids)
        return {name: setting for name, setting in settings.items() if name not in damaged_ids}


def checksum(setting: ScoredSetting) -> str:
    """sha256 of a setting and its scores."""
    return digest([asdict(setting) | {"about": dict(setting.about), "scores": dict(setting.scores)}])


def read_records(folder: Path) -> list[ScoredSetting]:
    """All settings of a study's folder or SQLite file. Raises DataError if the file does not exist."""
    path = folder / FILE if folder.is_dir() else folder
    if not path.exists():
        raise DataError(f"{folder} contains no {FILE}", "run `mmq study` first")
    with Records(path) as records:
        return list(records.all().values())


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of all columns, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def as_csv(settings: Sequence[ScoredSetting]) -> str:
    """The settings as CSV text, with the columns that `mmq study importance` reads."""
    rows = [setting.row() for setting in settings]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def is_whole(setting: ScoredSetting) -> bool:
    """Whether a setting quantizes whole components: all blocks and all roles."""
    return setting.about.get("blocks") == EVERYTHING and setting.about.get("role") == EVERYTHING


def kind_of(setting: ScoredSetting) -> str:
    """Quantization kind of a setting: method, group size, zero points, sequential; `none` for full precision.

    A plot may mix only settings of one kind and the full-precision model, because it identifies settings by their bits.
    """
    method, group = str(setting.about.get("method")), str(setting.about.get("group_size", ""))
    parts = [method, f"g{group}" if group.isdigit() else group] if method != FULL else [FULL]
    parts += ["zero-points"] * (setting.about.get("zero_points") == "yes")
    parts += ["sequential"] * bool(setting.about.get("sequential"))
    return "-".join(part for part in parts if part)


def is_full(setting: ScoredSetting) -> bool:
    """Whether a setting is the full-precision model."""
    return setting.about.get("method") in (None, FULL)


def full_outside_grid(settings: Sequence[ScoredSetting]) -> ScoredSetting | None:
    """The full-precision model, if no other setting keeps a component that the study varies in 16 bits.

    A study measures it as the reference of changes even if its grid lacks 16 bits. Such a corner far from all other
    settings belongs in no map of the grid.
    """
    full = next((setting for setting in settings if is_full(setting)), None)
    others = [setting.about for setting in settings if not is_full(setting)]
    names = [
        name for name in columns(others) if name.endswith("_bits") and any(about.get(name) != 16 for about in others)
    ]
    return None if any(about.get(name) == 16 for about in others for name in names) or not others else full


def last_exam(settings: Sequence[ScoredSetting]) -> list[ScoredSetting]:
    """Settings with the exam of the last run: same samples, same scoring, same kind of units.

    settings: in the order of `Records.all`.
    """
    return [setting for setting in settings if setting.exam == settings[-1].exam]


def comparable(settings: Sequence[ScoredSetting], parts: bool = False) -> list[ScoredSetting]:
    """Settings with comparable scores: those of the last exam.

    parts: include settings that quantize some blocks or one role; without it they are included only if no others exist.
    """
    last_settings = last_exam(settings)
    whole_settings = [setting for setting in last_settings if is_whole(setting)]
    return last_settings if parts or all(is_full(setting) for setting in whole_settings) else whole_settings
