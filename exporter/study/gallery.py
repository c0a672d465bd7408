"""Plots of a study's folder, as PNG files and as one HTML page."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

from exporter.amounts import size
from exporter.errors import DataError, did_you_mean
from exporter.files.writing import atomic, make_folder, write_text
from exporter.model.inference.openai_client import data_url
from exporter.study import study_plots
from exporter.study.importance import importance, need_forest
from exporter.study.records import (
    ERROR,
    FILE,
    SAMPLES,
    PlottedSetting,
    ScoredSetting,
    columns,
    is_full,
    is_whole,
    kind_of,
    last_exam,
    read_records,
)
from exporter.study.sensitivity import TABLE
from exporter.study.study_plots import Plot
from exporter.study.table import SUFFIX, Table, from_rows, read_csv, require_gain

TEMPLATE = "page.html.jinja"
ALLOCATED = "mmq allocate"
KEPT = 0.99  # share of the full-precision score that a setting must keep to be recommended
Z95 = 1.96  # standard errors in half of a 95 % interval
SIZE = "bpw"  # column of bits per weight in a paper's CSV file


def gather(
    folder: Path, score: str = "score", papers: Sequence[Path] = (), note: Callable[[str], None] = lambda text: None
) -> list[Plot]:
    """Plots of all results in a study's folder.

    papers: CSV files with a column `bpw` and a score, drawn for comparison. note: callback that receives the reason for
    each missing plot. Raises DataError if the folder has no results.
    """
    grids = read_records(folder) if (folder / FILE).exists() else []
    groups = [[setting for setting in grids if _sequential(setting) == sequential] for sequential in (False, True)]
    grids = [setting for sequential in groups for setting in last_exam(sequential)]
    front = folder / f"{TABLE}-front.sqlite"
    allocations = last_exam(read_records(front)) if front.exists() else []  # allocations of the last run only
    sensitivity_file = folder / f"{TABLE}.sqlite"
    _require_score([*grids, *allocations], score)
    gallery: list[Plot] = []
    for label, table in _tables(grids, score):
        gallery += study_plots.heat_maps(table, label)
        gallery += _importance(table, label, note)
    series = _series(grids, allocations, score)
    paper_series = {f"paper: {path.stem}": paper_points(path) for path in papers}
    if series or paper_series:
        gallery += study_plots.pareto(series, paper_series, ALLOCATED)
    if sensitivity_file.exists():
        gallery.append(study_plots.sensitivity(last_exam(read_records(sensitivity_file))))
    if not gallery:
        raise DataError(f"{folder} contains no study", "run `mmq study` or `mmq allocate` first")
    return gallery


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
        rows = [
            setting.row()
            for setting in grids
            if is_whole(setting)
            and (kind_of(setting) == kind or (is_full(setting) and _sequential(setting) == sequential))
        ]
        try:
            tables.append((kind, from_rows(rows, columns(rows), score, "the study")))
        except DataError:
            continue  # no component's bits vary
    return tables


def _sequential(setting: ScoredSetting) -> bool:
    return bool(setting.about.get("sequential"))


def _series(
    grids: Sequence[ScoredSetting], allocations: Sequence[ScoredSetting], score: str
) -> dict[str, list[PlottedSetting]]:
    """Series name -> its settings, with scores relative to the full-precision model's on the same exam."""
    full = {
        setting.exam: setting.scores[score]
        for setting in [*grids, *allocations]
        if setting.bits_per_weight >= 16 and score in setting.scores
    }
    full |= {
        setting.exam: setting.scores[score]
        for setting in allocations
        if setting.about.get("name") == "full" and score in setting.scores
    }
    series: dict[str, list[PlottedSetting]] = {}
    for setting in [*grids, *allocations]:
        if not full.get(setting.exam) or score not in setting.scores:
            continue
        name = str(setting.about.get("name", ""))
        label = (
            f"grid, {kind_of(setting)}"
            if not name
            else ALLOCATED
            if name.startswith("choice")
            else "hand-written recipes"
        )
        if name != "full" and setting.bits_per_weight < 16:
            series.setdefault(label, []).append(_point(setting, score, full[setting.exam]))
    return series


def _point(setting: ScoredSetting, score: str, full: float) -> PlottedSetting:
    error = Z95 * setting.scores[ERROR] / full if score == "score" and ERROR in setting.scores else None
    bits = [f"{key.removesuffix(SUFFIX)} {value}" for key, value in setting.about.items() if key.endswith(SUFFIX)]
    name = str(setting.about.get("name", "")) or ", ".join(bits)
    return PlottedSetting(setting.bits_per_weight, setting.scores[score] / full, error, name, setting.bytes)


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


def front_table(folder: Path, score: str = "score") -> list[PlottedSetting]:
    """The settings of a study's folder on the Pareto front, smallest first; empty without a full-precision score."""
    grids = last_exam(read_records(folder / FILE)) if (folder / FILE).exists() else []
    front = folder / f"{TABLE}-front.sqlite"
    allocations = last_exam(read_records(front)) if front.exists() else []
    points = [point for points in _series(grids, allocations, score).values() for point in points]
    return study_plots.front(points)


def samples_text(folder: Path) -> str:
    """How many samples the scores are means of; empty for studies of an older version."""
    settings = [
        setting
        for file in (FILE, f"{TABLE}-front.sqlite")
        if (folder / file).exists()
        for setting in last_exam(read_records(folder / file))
    ]
    counts = sorted({int(setting.scores[SAMPLES]) for setting in settings if SAMPLES in setting.scores})
    return f"{' or '.join(f'{count:,}' for count in counts)} samples for each setting" if counts else ""


def write_page(gallery: Sequence[Plot], folder: Path, path: Path, score: str = "score") -> Path:
    """Write one self-contained HTML page with all plots, without scripts and without network access.

    folder: of the study; its name is the title.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["size"] = size
    front = front_table(folder, score)
    page = environment.get_template(TEMPLATE).render(
        name=folder.resolve().name,
        score=score,
        samples=samples_text(folder),
        verdict=verdict(front),
        front=front,
        plots=[as_data(plot) for plot in gallery],
    )
    write_text(path, page)
    return path


def verdict(front: Sequence[PlottedSetting]) -> str:
    """The first sentence of the page: the smallest setting that keeps 99 % of the score, else the best one."""
    if not front:
        return ""
    good = next((point for point in front if point.share >= KEPT), front[-1])
    interval = f" (± {good.error:.1%}, 95 % interval)" if good.error is not None else ""
    prefix = (
        "The smallest setting that keeps 99 % of the score" if good.share >= KEPT else "No setting keeps 99 %; the best"
    )
    return f"{prefix} is {good.name}: {good.share:.1%}{interval} at {good.bits_per_weight:.2f} bits per weight."


def as_data(plot: Plot) -> dict[str, str]:
    """A plot for a page: title, description and data URL."""
    return {"title": plot.title, "about": plot.about, "url": data_url(plot.png)}
