"""Plots and rows of a study's folder: its grids, its allocations, its sensitivities."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

from exporter.errors import DataError, did_you_mean
from exporter.files.writing import atomic, make_folder
from exporter.study import study_plots
from exporter.study.importance import importance, need_forest
from exporter.study.records import (
    FILE,
    PlottedSetting,
    ScoredSetting,
    is_full,
    is_whole,
    kind_of,
    last_exam,
    read_records,
)
from exporter.study.score_table import SUFFIX, Table, from_settings, read_csv, require_gain
from exporter.study.sensitivity import TABLE
from exporter.study.setting_rows import SettingRow, is_reference, references, row_of, rows_of
from exporter.study.study_plots import Plot

ALLOCATED = "mmq allocate"
SIZE = "bpw"  # column of bits per weight in a paper's CSV file


def gather(
    folder: Path, score: str = "score", papers: Sequence[Path] = (), note: Callable[[str], None] = lambda text: None
) -> list[Plot]:
    """Plots of all results in a study's folder.

    papers: CSV files with a column `bpw` and a score, drawn for comparison. note: callback that receives the reason for
    each missing plot. Raises DataError if the folder has no results.
    """
    grids, allocations = read_grids(folder), read_allocations(folder)
    sensitivity_file = folder / f"{TABLE}.sqlite"
    _require_score([*grids, *allocations], score)
    gallery: list[Plot] = []
    for label, table in _tables(grids, score):
        gallery += study_plots.heat_maps(table, label)
        gallery += _importance(table, label, note)
    series = _series([*grids, *allocations], score)
    paper_series = {f"paper: {path.stem}": paper_points(path) for path in papers}
    if series or paper_series:
        gallery += study_plots.pareto(series, paper_series, ALLOCATED)
    if sensitivity_file.exists():
        gallery.append(study_plots.sensitivity(last_exam(read_records(sensitivity_file))))
    if not (gallery or grids or allocations):
        raise DataError(f"{folder} contains no study", "run `mmq study` or `mmq allocate` first")
    return gallery


def read_grids(folder: Path) -> list[ScoredSetting]:
    """Settings of the last exam of the grid, and of the grid that was quantized sequentially."""
    settings = read_records(folder) if (folder / FILE).exists() else []
    groups = [[setting for setting in settings if _sequential(setting) == sequential] for sequential in (False, True)]
    return [setting for group in groups for setting in last_exam(group)]


def read_allocations(folder: Path) -> list[ScoredSetting]:
    """Allocations and recipes of the last run of `mmq allocate`, with the full-precision model."""
    front = folder / f"{TABLE}-front.sqlite"
    return last_exam(read_records(front)) if front.exists() else []


def table_rows(folder: Path, score: str = "score") -> list[SettingRow]:
    """Every setting of a study's folder as a row, smallest first."""
    return rows_of([*read_grids(folder), *read_allocations(folder)], score)


def components_of(folder: Path) -> set[str]:
    """Names of the components whose bits a study varies."""
    settings = read_records(folder) if (folder / FILE).exists() else []
    return {name.removesuffix(SUFFIX) for setting in settings for name in setting.about if name.endswith(SUFFIX)}


def _require_score(settings: Sequence[ScoredSetting], score: str) -> None:
    """Raise DataError for a score that no setting has, or whose lower values are better."""
    names = list(dict.fromkeys(name for setting in settings for name in setting.scores))
    if names and score not in names:
        raise DataError(
            f"no setting has a score '{score}'.{did_you_mean(score, names)}", f"the scores are {', '.join(names)}"
        )
    require_gain(score)


def _importance(table: Table, label: str, note: Callable[[str], None]) -> list[Plot]:
    """Plots of importance, or none and a note with the reason."""
    try:
        need_forest()
        result = importance(table)
    except DataError as error:
        note(f"no plot of importance for {label}: {error.message}" + (f" ({error.hint})" if error.hint else ""))
        return []
    for text in result.notes:
        note(f"{label}: {text}")
    return [study_plots.importance_bars(result, label), study_plots.marginal_lines(result, label)]


def _tables(grids: Sequence[ScoredSetting], score: str) -> list[tuple[str, Table]]:
    """One table per quantization kind (`kind_of`), of settings that quantize whole components."""
    tables = []
    for kind, sequential in dict.fromkeys(
        (kind_of(setting), _sequential(setting)) for setting in grids if not is_full(setting)
    ):
        settings = [
            setting
            for setting in grids
            if is_whole(setting)
            and (kind_of(setting) == kind or (is_full(setting) and _sequential(setting) == sequential))
        ]
        try:
            tables.append((kind, from_settings(settings, score, "the study")))
        except DataError:
            continue  # no component's bits vary
    return tables


def _sequential(setting: ScoredSetting) -> bool:
    return bool(setting.about.get("sequential"))


def _series(settings: Sequence[ScoredSetting], score: str) -> dict[str, list[PlottedSetting]]:
    """Series name -> its settings, with scores relative to the full-precision model's on the same exam."""
    series: dict[str, list[PlottedSetting]] = {}
    full_by_exam = references(settings, score)
    for setting in settings:
        if score in setting.scores and not is_reference(setting):
            point = row_of(setting, score, full_by_exam.get(setting.exam)).plotted()
            if point is not None:
                series.setdefault(_series_name(setting), []).append(point)
    return series


def _series_name(setting: ScoredSetting) -> str:
    name = str(setting.about.get("name", ""))
    if not name:
        return f"grid, {kind_of(setting)}"
    return ALLOCATED if name.startswith("choice") else "hand-written recipes"


def paper_points(path: Path) -> list[PlottedSetting]:
    """The settings of a CSV file with a column `bpw`."""
    table = read_csv(path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        sizes = [row.get(SIZE) for row in csv.DictReader(file)]
    if any(not size for size in sizes):
        raise DataError(f"{path} has no column {SIZE}", f"add bits per weight as column {SIZE}, or drop this --paper")
    full = table.full_score()
    return [
        PlottedSetting(float(size or 0), float(value) / full) for size, value in zip(sizes, table.scores, strict=True)
    ]


def write_plots(gallery: Sequence[Plot], folder: Path) -> list[Path]:
    """Write the plots as PNG files to `folder`; returns their paths."""
    make_folder(folder)
    for plot in gallery:
        with atomic(folder / plot.name) as temporary:
            temporary.write_bytes(plot.png)
    return [folder / plot.name for plot in gallery]
