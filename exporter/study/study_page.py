"""A study as one HTML page: a sentence of verdict, the table of all settings, and the plots."""

from collections.abc import Sequence
from pathlib import Path

from exporter.amounts import size
from exporter.files.writing import write_text
from exporter.model.inference.openai_client import data_url
from exporter.study.setting_rows import SettingRow, front_rows
from exporter.study.study_plots import Plot
from exporter.study.verdict import percent, share, smallest_that_holds, verdict

TEMPLATE = "page.html.jinja"
FEW = 12  # with more settings, the page shows the front first, and all settings after the plots


def write_page(
    gallery: Sequence[Plot], rows: Sequence[SettingRow], name: str, path: Path, score: str = "score"
) -> Path:
    """Write one self-contained HTML page, without scripts and without network access.

    rows: all settings. name: of the study, for the title. score: name of the score that the rows have.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"size": size, "percent": percent, "share": share, "figure": figure}
    best, front = smallest_that_holds(rows), front_rows(rows)
    page = environment.get_template(TEMPLATE).render(
        name=name,
        score=score,
        verdict=verdict(rows),
        rows=rows,
        front=front,
        first=[row for row in rows if row in front or row == best or row.full],
        best=best,
        few=len(rows) <= FEW,
        has_intervals=any(row.interval for row in rows),
        plots=[as_data(plot) for plot in gallery],
    )
    write_text(path, page)
    return path


def figure(interval: tuple[float, float]) -> str:
    """An interval of scores: `0.912 to 0.988`."""
    return f"{interval[0]:z.3f} to {interval[1]:z.3f}"


def as_data(plot: Plot) -> dict[str, str]:
    """A plot for a page: title, description and data URL."""
    return {"title": plot.title, "about": plot.about, "url": data_url(plot.png)}
