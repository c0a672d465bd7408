"""The page of `mmq data check --page`: counts, unusable rows, and the first samples of each split."""

from pathlib import Path
from typing import Any

from exporter.files.writing import make_folder, write_text
from exporter.pipeline.data_check import DataCheck, opened, unusable_rows
from exporter.publishing.report.pictures import thumbnail

TEMPLATE = "data_page.html.jinja"


def summary(check: DataCheck) -> str:
    """One sentence: the tasks that calibration and evaluation can use, and the number of unusable rows."""
    usable = [task for task, both in check.tasks.items() if both]
    text = (
        f"Calibration and evaluation can use: {', '.join(usable)}"
        if usable
        else "No task has both a train and a test split"
    )
    return f"{text}; {unusable_rows(len(check.problems))}."


def data_html(check: DataCheck) -> str:
    """The page as HTML with pictures inline, without scripts and without other files."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    cards: dict[str, list[dict[str, Any]]] = {}
    for part, sample in opened(check.splits):
        row = {"sample": sample, "picture": thumbnail(sample.image())}
        cards.setdefault(f"{part.task}, {part.split}", []).append(row)
    return environment.get_template(TEMPLATE).render(check=check, cards=cards, summary=summary(check))


def write_data_page(check: DataCheck, out: Path) -> Path:
    """Write the page; returns its path."""
    make_folder(out.parent)
    write_text(out, data_html(check))
    return out
