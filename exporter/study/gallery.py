"""All pictures of a study's folder, as PNG files and as one HTML page."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

from exporter.errors import DataError, did_you_mean
from exporter.files.writing import atomic, make_folder, write_text
from exporter.inference.openai_client import data_url
from exporter.study import pictures
from exporter.study.importance import importance, need_forest
from exporter.study.pictures import Picture
from exporter.study.records import FILE, Measured, columns, is_full, is_whole, kind_of, last_exam, read_records
from exporter.study.sensitivity import TABLE
from exporter.study.table import SUFFIX, Table, from_rows, read_csv, require_gain

TEMPLATE = "page.html.jinja"
ALLOCATED = "mmq allocate"
SIZE = "bpw"  # the column of a paper's file with bits a weight


def gather(
    folder: Path, score: str = "score", papers: Sequence[Path] = (), note: Callable[[str], None] = lambda text: None
) -> list[Picture]:
    """Everything that can be drawn of what the folder holds.

    papers: CSV files with a column `bpw` and a score, whose points are drawn beside. note: is told what is left out,
    and why. DataError when nothing is there.
    """
    grids = read_records(folder) if (folder / FILE).exists() else []
    ways = [[one for one in grids if _sequential(one) == way] for way in (False, True)]
    grids = [one for way in ways for one in last_exam(way)]
    front = folder / f"{TABLE}-front.sqlite"
    choices = last_exam(read_records(front)) if front.exists() else []  # of the last allocation
    alone = folder / f"{TABLE}.sqlite"
    _require_score([*grids, *choices], score)
    found: list[Picture] = []
    for label, table in _tables(grids, score):
        found += pictures.heat_maps(table, label)
        found += _importance(table, label, note)
    series = _series(grids, choices, score)
    others = {f"paper: {path.stem}": paper_points(path) for path in papers}
    if series or others:
        found.append(pictures.pareto(series, others, ALLOCATED))
    if alone.exists():
        found.append(pictures.sensitivity(last_exam(read_records(alone))))
    if not found:
        raise DataError(f"{folder} holds no study", "`mmq study` or `mmq allocate` measures one")
    return found


def components_of(folder: Path) -> set[str]:
    """The components whose bits a study varies."""
    found = read_records(folder) if (folder / FILE).exists() else []
    return {name.removesuffix(SUFFIX) for one in found for name in one.about if name.endswith(SUFFIX)}


def _require_score(found: Sequence[Measured], score: str) -> None:
    """DataError for a score that no setting has, or of which less is better."""
    names = list(dict.fromkeys(name for one in found for name in one.scores))
    if names and score not in names:
        raise DataError(
            f"no setting has a score '{score}'.{did_you_mean(score, names)}", f"there are {', '.join(names)}"
        )
    require_gain(score)


def _importance(table: Table, label: str, note: Callable[[str], None]) -> list[Picture]:
    """Pictures of importance, or a note on why there are none."""
    try:
        need_forest()
        what = importance(table)
    except DataError as error:
        note(f"no picture of importance for {label}: {error.message}" + (f" ({error.hint})" if error.hint else ""))
        return []
    for text in what.notes:
        note(f"{label}: {text}")
    return [pictures.importance_bars(what, label), pictures.marginal_lines(what, label)]


def _tables(grids: Sequence[Measured], score: str) -> list[tuple[str, Table]]:
    """One table for each kind of quantizing, of settings that name whole components."""
    found = []
    for kind, way in dict.fromkeys((kind_of(one), _sequential(one)) for one in grids if not is_full(one)):
        rows = [
            one.row()
            for one in grids
            if is_whole(one) and (kind_of(one) == kind or (is_full(one) and _sequential(one) == way))
        ]
        try:
            found.append((kind, from_rows(rows, columns(rows), score, "the study")))
        except DataError:
            continue  # nothing varies
    return found


def _sequential(one: Measured) -> bool:
    return bool(one.about.get("sequential"))


def _series(grids: Sequence[Measured], choices: Sequence[Measured], score: str) -> dict[str, list[tuple[float, float]]]:
    """Name -> (bits a weight, share of the full model's score on the same exam)."""
    full = {
        one.exam: one.scores[score] for one in [*grids, *choices] if one.bits_per_weight >= 16 and score in one.scores
    }
    full |= {one.exam: one.scores[score] for one in choices if one.about.get("name") == "full" and score in one.scores}
    series: dict[str, list[tuple[float, float]]] = {}
    for one in [*grids, *choices]:
        if not full.get(one.exam) or score not in one.scores:
            continue
        name = str(one.about.get("name", ""))
        label = (
            f"grid, {kind_of(one)}" if not name else ALLOCATED if name.startswith("choice") else "hand-written recipes"
        )
        if name != "full" and one.bits_per_weight < 16:
            series.setdefault(label, []).append((one.bits_per_weight, one.scores[score] / full[one.exam]))
    return series


def paper_points(path: Path) -> list[tuple[float, float]]:
    """(bits a weight, share of the best full row) of a CSV file with a column `bpw`."""
    table = read_csv(path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        sizes = [row.get(SIZE) for row in csv.DictReader(file)]
    if any(not size for size in sizes):
        raise DataError(f"{path} has no column {SIZE}", f"add bits a weight as {SIZE}, or leave the file out")
    full = table.full_score()
    return [(float(size or 0), float(value) / full) for size, value in zip(sizes, table.scores, strict=True)]


def write_pictures(found: Sequence[Picture], folder: Path) -> list[Path]:
    """The PNG files."""
    make_folder(folder)
    for picture in found:
        with atomic(folder / picture.name) as temporary:
            temporary.write_bytes(picture.png)
    return [folder / picture.name for picture in found]


def write_page(found: Sequence[Picture], name: str, path: Path) -> Path:
    """One HTML page with the pictures inside; it holds no script and asks the network for nothing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template(TEMPLATE).render(name=name, pictures=[as_data(picture) for picture in found])
    write_text(path, page)
    return path


def as_data(picture: Picture) -> dict[str, str]:
    """A picture for a page: title, text and data URL."""
    return {"title": picture.title, "about": picture.about, "url": data_url(picture.png)}
