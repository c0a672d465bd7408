"""Settings of a study as rows of a table: score and change from full precision, with 95 % intervals, and samples."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from exporter.evaluation.bootstrap import Difference, gate_interval
from exporter.study.records import CHANGE, CHANGE_ERROR, ERROR, FULL, SAMPLES, PlottedSetting, ScoredSetting, is_full
from exporter.study.score_table import SUFFIX

Z95 = 1.96  # standard errors in half of a 95 % interval
Interval = tuple[float, float]
Item = TypeVar("Item")


@dataclass(frozen=True)
class SettingRow:
    """One setting.

    id: of its record. name: bits of its components, or its name in an allocation. method: method and scale groups.
    score: with its interval. change: setting minus full precision, as a share of the full-precision score, with its
    interval; None without a full-precision score. samples: of all tasks; None if an older version did not record them.
    scores: main metric of each task. full: the full-precision model.
    """

    id: str
    name: str
    method: str
    bytes: int
    bits_per_weight: float
    score: float
    interval: Interval | None
    change: float | None
    change_interval: Interval | None
    samples: int | None
    scores: tuple[tuple[str, float], ...] = ()
    full: bool = False

    @property
    def holds(self) -> bool:
        """Whether the interval of the change contains 0: the samples show neither a loss nor a gain."""
        return self.change_interval is not None and self.change_interval[0] <= 0 <= self.change_interval[1]

    def plotted(self) -> PlottedSetting | None:
        """The setting as a point of a plot, None without a full-precision score."""
        if self.change is None:
            return None
        low_high = self.change_interval
        interval = None if low_high is None else (1 + low_high[0], 1 + low_high[1])
        return PlottedSetting(self.bits_per_weight, 1 + self.change, interval, self.name, self.bytes)


def rows_of(settings: Sequence[ScoredSetting], score: str = "score") -> list[SettingRow]:
    """Rows of the settings that have this score, smallest first. settings: may have several exams."""
    full_by_exam = references(settings, score)
    rows = [row_of(s, score, full_by_exam.get(s.exam)) for s in settings if score in s.scores]
    return sorted(rows, key=lambda row: (row.bytes, -row.score))


def references(settings: Sequence[ScoredSetting], score: str) -> dict[str, ScoredSetting]:
    """Exam -> its full-precision model, where it was measured."""
    return {setting.exam: setting for setting in settings if is_reference(setting) and score in setting.scores}


def is_reference(setting: ScoredSetting) -> bool:
    """Whether a setting of a grid or of an allocation's front is the full-precision model."""
    return setting.about["name"] == "full" if "name" in setting.about else is_full(setting)


def row_of(setting: ScoredSetting, score: str, reference: ScoredSetting | None) -> SettingRow:
    """A setting as a row. reference: the full-precision model of the same exam."""
    value, samples = setting.scores[score], setting.scores.get(SAMPLES)
    certain = score == "score" and bool(samples) and ERROR in setting.scores
    full = reference.scores[score] if reference else value - setting.scores[CHANGE] if _paired(setting, score) else 0.0
    change_interval = None
    if full > 0 and certain:
        difference = _difference(setting, reference, full)
        change_interval = None if difference is None else _change_interval(difference, int(samples or 0), full)
    return SettingRow(
        id=setting.id,
        name=setting_name(setting),
        method=_method(setting),
        bytes=setting.bytes,
        bits_per_weight=setting.bits_per_weight,
        score=value,
        interval=score_interval(value, setting.scores[ERROR], int(samples or 0)) if certain else None,
        change=value / full - 1 if full > 0 else None,
        change_interval=None if is_reference(setting) else change_interval,
        samples=int(samples) if samples else None,
        scores=tuple((name.removesuffix(" exact"), v) for name, v in setting.scores.items() if _is_task_score(name)),
        full=is_reference(setting),
    )


def _paired(setting: ScoredSetting, score: str) -> bool:
    return score == "score" and CHANGE in setting.scores


def _is_task_score(name: str) -> bool:
    return name.endswith((" exact", " r1"))


def setting_name(setting: ScoredSetting) -> str:
    """A setting in words: `vision 3, language 4 bits`, its name in an allocation, or `full precision`."""
    if is_reference(setting):
        return "full precision"
    if "name" in setting.about:
        return str(setting.about["name"])
    bits = [(key.removesuffix(SUFFIX), value) for key, value in setting.about.items() if key.endswith(SUFFIX)]
    quantized = ", ".join(f"{name} {value}" for name, value in bits if value != 16)
    kinds = (("blocks", "blocks"), ("role", "linears"))
    parts = [f"{word} {setting.about[key]}" for key, word in kinds if setting.about.get(key, "all") != "all"]
    return "; ".join([f"{quantized or 'no component'} bits", *parts])


def _method(setting: ScoredSetting) -> str:
    method, group = str(setting.about.get("method", "")), str(setting.about.get("group_size", ""))
    if method in ("", FULL):
        return ""
    words = [method, f"g{group}" if group.isdigit() else f"per {group}" if group else ""]
    words += ["zero points"] * (setting.about.get("zero_points") == "yes")
    return " ".join([*filter(None, words), *["sequential"] * bool(setting.about.get("sequential"))])


def _difference(setting: ScoredSetting, reference: ScoredSetting | None, full: float) -> Difference | None:
    """Change from full precision: paired if the records have it, else as of independent samples, which is wider."""
    value, samples = setting.scores["score"], setting.scores[SAMPLES]
    if CHANGE in setting.scores:
        change, error = setting.scores[CHANGE], setting.scores[CHANGE_ERROR]
    elif reference is not None and ERROR in reference.scores:
        change, error = value - full, math.hypot(setting.scores[ERROR], reference.scores[ERROR])
    else:
        return None
    half = Z95 * error
    return Difference(full, value, change, change - half, change + half, error * math.sqrt(samples))


def _change_interval(difference: Difference, samples: int, full: float) -> Interval:
    """Interval of a change as a share of the full score, widened for losses that no sample showed (`gate_interval`)."""
    low, high = gate_interval(difference, samples, 1.0)  # shares of exact answers
    return max(low / full, -1.0), high / full


def score_interval(score: float, error: float, samples: int) -> Interval:
    """95 % interval of a score with its standard error.

    For scores from 0 to 1 this is Wilson's interval (JASA 22, 1927) with the number of independent samples that has
    this standard error; it stays within 0 and 1 and has a width also if all samples agree. Others: score ± 1.96 error.
    """
    if not 0 <= score <= 1:
        return score - Z95 * error, score + Z95 * error
    count = min(score * (1 - score) / error**2, samples * 1e3) if error > 0 and 0 < score < 1 else float(samples)
    square = Z95**2 / count
    middle = (score + square / 2) / (1 + square)
    half = Z95 * math.sqrt(score * (1 - score) / count + square / (4 * count)) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def front_rows(rows: Sequence[SettingRow]) -> list[SettingRow]:
    """Rows on the Pareto front of score over bytes, smallest first."""
    return pareto_front(rows, lambda row: (row.bytes, row.score))


def pareto_front(items: Iterable[Item], place: Callable[[Item], tuple[float, float]]) -> list[Item]:
    """Items on the Pareto front, smallest first: no item of at most their size scores at least as high.

    place: size and score of an item.
    """
    front: list[Item] = []
    for item in sorted(items, key=lambda item: (place(item)[0], -place(item)[1])):
        if not front or place(item)[1] > place(front[-1])[1]:
            front.append(item)
    return front
