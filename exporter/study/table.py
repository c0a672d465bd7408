"""Scores by bits: a CSV file, or the table of a study, as arrays.

A column `COMPONENT_bits` holds bits; the others hold scores and sizes. The paper's own files call the components `vit`
and `llm`.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.errors import DataError, did_you_mean
from exporter.study.records import columns, comparable, read_records

SUFFIX = "_bits"
KINDS = (
    "method",
    "group_size",
    "zero_points",
    "sequential",
    "blocks",
    "role",
    "exam",
)  # what changes a score besides bits
LOSSES = ("kl", "nll")  # last words of scores of which less is better
ALIASES = {"vit": "vision", "vision_tower": "vision", "llm": "language", "q_former": "qformer"}
# What is taken as the score when the user names none: the first of these that the file has, in any case.
SCORES = ("score", "cider", "accuracy", "acc", "overall", "r_mean", "txt_r1", "meteor")
ALL_BLOCKS = "all"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """bits f64 `[rows, components]`, scores f64 `[rows]` (larger is better), and what the columns are called.

    notes: what the reader of figures made from it should know.
    """

    components: tuple[str, ...]
    bits: Floats
    scores: Floats
    metric: str
    notes: tuple[str, ...] = ()

    def where(self, rows: NDArray[np.bool_]) -> "Table":
        """Some of the rows, bool `[rows]`."""
        return Table(self.components, self.bits[rows], self.scores[rows], self.metric, self.notes)

    def full_score(self) -> float:
        """Mean score where every component has its most bits; the best score when there is no such row."""
        top = (self.bits == self.bits.max(0)).all(1)
        return float(self.scores[top].mean() if top.any() else self.scores.max())


def read_table(path: Path, score: str | None = None, conditions: Sequence[str] = ()) -> Table:
    """A study's folder or SQLite file, or a CSV file; see `read_csv`."""
    if path.is_dir() or path.suffix == ".sqlite":
        asked = {condition.partition("=")[0] for condition in conditions}
        rows = [
            found.row() for found in comparable(read_records(path), parts=bool(asked & {"blocks", "roles", "role"}))
        ]
        return from_rows(_fitting(rows, columns(rows), conditions, path), columns(rows), score, str(path))
    return read_csv(path, score, conditions)


def read_csv(path: Path, score: str | None = None, conditions: Sequence[str] = ()) -> Table:
    """A CSV file with a header line. score: its column; conditions: `COLUMN=VALUE`, rows that do not fit are left out.

    DataError when the file, a column or a number is missing.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    reader = csv.DictReader(io.StringIO(text))
    names = list(reader.fieldnames or ())
    rows = [row for row in reader if any(row.values())]
    return from_rows(_fitting(rows, names, conditions, path), names, score, str(path))


def _fitting(
    rows: Sequence[dict[str, Any]], names: Sequence[str], conditions: Sequence[str], where: Path
) -> list[dict[str, Any]]:
    """The rows that every `COLUMN=VALUE` fits; the full model, whose method is `none`, is always among them."""
    wanted = [condition.partition("=")[::2] for condition in conditions]
    for name, _ in wanted:
        _known(name, names, where)
    for name, value in wanted:
        there = list(dict.fromkeys(str(row.get(name)) for row in rows))
        if value not in there:
            raise DataError(f"{where} has no row with {name}={value}", f"there are {', '.join(there[:8])}")
    return [row for row in rows if all(str(row.get(name)) in (value, "none") for name, value in wanted)]


def from_rows(rows: Sequence[dict[str, Any]], names: Sequence[str], score: str | None, where: str) -> Table:
    """Rows as dictionaries to a table; values may be texts."""
    bits = [name for name in names if name.endswith(SUFFIX)]
    if not bits or not rows:
        raise DataError(
            f"{where} has no {'column COMPONENT_bits' if not bits else 'rows'}",
            "expected a header like vision_bits,language_bits,score and a row for each measured setting",
        )
    metric = score or _usual_score(names, where)
    _known(metric, names, where)
    require_gain(metric)
    problems: list[str] = []
    values = [[_number(row, name, i, problems) for name in (*bits, metric)] for i, row in enumerate(rows)]
    if problems:
        raise DataError(f"{where}: " + "; ".join(problems[:5]), "every row needs its bits and its score as numbers")
    bare = [name.removesuffix(SUFFIX) for name in bits]
    array = np.array(values, dtype=np.float64)
    components = tuple(ALIASES.get(name, name) for name in bare)
    found = Table(components, array[:, :-1], array[:, -1], metric, _mixed(rows))
    if not found.full_score() > 0:
        raise DataError(f"{where}: the full model's {metric} is {found.full_score():g}", "shares of it say nothing")
    return _varying(found, where)


def require_gain(metric: str) -> None:
    """DataError for a score of which less is better: losses and shares are counted from the best."""
    if metric.split()[-1:] and metric.split()[-1].lower() in LOSSES:
        raise DataError(f"of {metric} less is better", "choose a score of which more is better")


def _mixed(rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """A note on each column besides bits whose values differ; the full model's do not count."""
    notes = []
    for name in KINDS:
        values = [str(v) for v in dict.fromkeys(row.get(name) for row in rows) if v not in (None, "", "none", "fp16")]
        if len(values) > 1:
            one = f"--where {name}={values[0]}"
            notes.append(f"settings of {name} {', '.join(values[:4])} are mixed: {one} takes one of them")
    return tuple(notes)


def _varying(table: Table, where: str) -> Table:
    """Without components whose bits never change: nothing can be said of them."""
    changes = np.ptp(table.bits, 0) > 0
    if not changes.any():
        raise DataError(f"{where}: the bits of no component change", "measure more settings first")
    names = tuple(name for name, kept in zip(table.components, changes, strict=True) if kept)
    return Table(names, table.bits[:, changes], table.scores, table.metric, table.notes)


def _usual_score(names: Sequence[str], where: str) -> str:
    lower = {name.lower(): name for name in reversed(names)}
    for name in SCORES:
        if name in lower:
            return lower[name]
    others = ", ".join(name for name in names if not name.endswith(SUFFIX))
    raise DataError(f"{where}: which column is the score?", f"name it by --score: {others}")


def _known(name: str, names: Sequence[str], where: object) -> None:
    if name not in names:
        raise DataError(f"{where} has no column '{name}'.{did_you_mean(name, names)}", ", ".join(names))


def _number(row: dict[str, Any], name: str, index: int, problems: list[str]) -> float:
    try:
        value = float(row.get(name, ""))
    except (TypeError, ValueError):
        value = float("nan")
    if not np.isfinite(value):
        problems.append(f"row {index + 1}: {name} is {row.get(name)!r}")
    return value
