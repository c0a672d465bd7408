"""Table of scores over bits as arrays, read from a CSV file or a study's folder.

A column `COMPONENT_bits` holds bits; the other columns hold scores and sizes. The files of arXiv 2601.15287 name the
components `vit` and `llm`.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.errors import DataError, did_you_mean
from exporter.study.records import ScoredSetting, columns, comparable, full_outside_grid, read_records

SUFFIX = "_bits"
KINDS = (
    "method",
    "group_size",
    "zero_points",
    "sequential",
    "blocks",
    "role",
    "exam",
)  # columns besides bits that affect a score
LOSSES = ("kl", "nll")  # last words of scores whose lower values are better
ALIASES = {"vit": "vision", "vision_tower": "vision", "llm": "language", "q_former": "qformer"}
# Default column of the score: the first of these that the file has, compared without case.
SCORES = ("score", "cider", "accuracy", "acc", "relaxed_accuracy", "anls", "overall", "r_mean", "txt_r1", "meteor")

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """bits f64 `[rows, components]`, scores f64 `[rows]` (larger is better), and the names of the columns.

    notes: limits of figures that are computed from the table. full: score of the full-precision model, if its bits are
    not on the grid.
    """

    components: tuple[str, ...]
    bits: Floats
    scores: Floats
    metric: str
    notes: tuple[str, ...] = ()
    full: float | None = None

    def where(self, rows: NDArray[np.bool_]) -> "Table":
        """The table of the selected rows. rows: bool `[rows]`."""
        return replace(self, bits=self.bits[rows], scores=self.scores[rows])

    def full_score(self) -> float:
        """`full`, else the mean score of rows with the largest bits of every component, else the best score."""
        if self.full is not None:
            return self.full
        top = (self.bits == self.bits.max(0)).all(1)
        return float(self.scores[top].mean() if top.any() else self.scores.max())


def read_table(path: Path, score: str | None = None, conditions: Sequence[str] = ()) -> Table:
    """Read the table of a study's folder, a SQLite file or a CSV file; the arguments are those of `read_csv`."""
    if path.is_dir() or path.suffix == ".sqlite":
        condition_columns = {condition.partition("=")[0] for condition in conditions}
        settings = comparable(read_records(path), parts=bool(condition_columns & {"blocks", "roles", "role"}))
        rows = [setting.row() for setting in settings]
        kept_rows = _matching_rows(rows, columns(rows), conditions, path)
        kept_settings = [setting for setting, row in zip(settings, rows, strict=True) if row in kept_rows]
        return from_settings(kept_settings, score, str(path))
    return read_csv(path, score, conditions)


def from_settings(settings: Sequence[ScoredSetting], score: str | None, source: str) -> Table:
    """The table of a study's settings. The full-precision model is a row only if the grid has its bits."""
    alone = full_outside_grid(settings)
    rows = [setting.row() for setting in settings if setting is not alone]
    table = from_rows(rows, columns(rows), score, source)
    return replace(table, full=alone.scores[table.metric]) if alone and table.metric in alone.scores else table


def read_csv(path: Path, score: str | None = None, conditions: Sequence[str] = ()) -> Table:
    """Read a CSV file with a header line. score: column of the score. conditions: `COLUMN=VALUE`, to select rows.

    Raises DataError if the file, a column or a number is missing.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    reader = csv.DictReader(io.StringIO(text))
    names = list(reader.fieldnames or ())
    rows = [row for row in reader if any(row.values())]
    return from_rows(_matching_rows(rows, names, conditions, path), names, score, str(path))


def _matching_rows(
    rows: Sequence[dict[str, Any]], names: Sequence[str], conditions: Sequence[str], source: Path
) -> list[dict[str, Any]]:
    """The rows that match every `COLUMN=VALUE`, and always the full-precision model, whose method is `none`."""
    required = [condition.partition("=")[::2] for condition in conditions]
    for name, _ in required:
        _require_column(name, names, source)
    for name, value in required:
        values = list(dict.fromkeys(str(row.get(name)) for row in rows))
        if value not in values:
            raise DataError(f"{source} has no row with {name}={value}", f"the values are {', '.join(values[:8])}")
    return [row for row in rows if all(str(row.get(name)) in (value, "none") for name, value in required)]


def from_rows(rows: Sequence[dict[str, Any]], names: Sequence[str], score: str | None, source: str) -> Table:
    """A table from rows as dicts; values may be strings. Raises DataError as `read_csv` does."""
    bits = [name for name in names if name.endswith(SUFFIX)]
    if not bits or not rows:
        raise DataError(
            f"{source} has no {'column COMPONENT_bits' if not bits else 'rows'}",
            "expected a header like vision_bits,language_bits,score and a row for each measured setting",
        )
    metric = score or _default_score(names, source)
    _require_column(metric, names, source)
    require_gain(metric)
    problems: list[str] = []
    values = [[_number(row, name, i, problems) for name in (*bits, metric)] for i, row in enumerate(rows)]
    if problems:
        raise DataError(f"{source}: " + "; ".join(problems[:5]), "every row needs numbers for its bits and its score")
    component_names = [name.removesuffix(SUFFIX) for name in bits]
    array = np.array(values, dtype=np.float64)
    components = tuple(ALIASES.get(name, name) for name in component_names)
    table = Table(components, array[:, :-1], array[:, -1], metric, _mixing_notes(rows))
    if not table.full_score() > 0:
        raise DataError(f"{source}: the full-precision {metric} is {table.full_score():g}", "it must be positive")
    return _without_constant_components(table, source)


def require_gain(metric: str) -> None:
    """Raise DataError for a score whose lower values are better, because shares of the score need the opposite."""
    if metric.split()[-1:] and metric.split()[-1].lower() in LOSSES:
        raise DataError(f"lower values of {metric} are better", "choose a score whose higher values are better")


def _mixing_notes(rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """A note per column of KINDS with several values, without those of the full-precision model."""
    notes = []
    for name in KINDS:
        values = [str(v) for v in dict.fromkeys(row.get(name) for row in rows) if v not in (None, "", "none", "fp16")]
        if len(values) > 1:
            option = f"--where {name}={values[0]}"
            notes.append(f"settings of {name} {', '.join(values[:4])} are mixed: {option} selects one of them")
    return tuple(notes)


def _without_constant_components(table: Table, source: str) -> Table:
    """The table without components whose bits are constant. Raises DataError if all are constant."""
    changes = np.ptp(table.bits, 0) > 0
    if not changes.any():
        raise DataError(f"{source}: the bits of no component change", "measure more settings first")
    names = tuple(name for name, varies in zip(table.components, changes, strict=True) if varies)
    return replace(table, components=names, bits=table.bits[:, changes])


def _default_score(names: Sequence[str], source: str) -> str:
    lower = {name.lower(): name for name in reversed(names)}
    for name in SCORES:
        if name in lower:
            return lower[name]
    others = ", ".join(name for name in names if not name.endswith(SUFFIX))
    raise DataError(f"{source} has no known column of a score", f"choose one with --score: {others}")


def _require_column(name: str, names: Sequence[str], source: object) -> None:
    if name not in names:
        raise DataError(f"{source} has no column '{name}'.{did_you_mean(name, names)}", ", ".join(names))


def _number(row: dict[str, Any], name: str, index: int, problems: list[str]) -> float:
    try:
        value = float(row.get(name, ""))
    except (TypeError, ValueError):
        value = float("nan")
    if not np.isfinite(value):
        problems.append(f"row {index + 1}: {name} is {row.get(name)!r}")
    return value
