"""The report of an artifact as one HTML page without external files, as JSON, and as PNG plots.

Enters: the small files of an artifact: manifest, report, config.json.
Leaves: a page, or a folder of plots.
May import: publishing, pipeline, evaluation, artifact, model, data, files.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.files.writing import make_folder, write_text
from exporter.publishing.report import charts
from exporter.publishing.report.content import collect
from exporter.publishing.report.pictures import find_pictures, pictures_of, thumbnail
from exporter.publishing.report.plots import write_plots

TEMPLATE = "page.html.jinja"

Content = Mapping[str, Any]  # result of `content.collect`


def html(content: Content, study: Sequence[Mapping[str, str]] = ()) -> str:
    """The page as HTML with inline styles, charts and pictures, without scripts and without network access.

    study: plots of a study of the same model, each with `title`, `about`, and `url`, a data URL.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from exporter.amounts import size

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": size, "score": "{:z.4f}".format, "percent": percent}
    environment.filters |= {"signed": "{:+z.4f}".format, "points": "{:+z.1f}".format}
    axis = charts.reach(content["scores"])
    drawings = {
        "sizes": charts.sizes(content["bytes"]["before"], content["bytes"]["after"], content["bytes"]["components"]),
        "changes": [charts.change(row, axis) for row in content["scores"]],
        "ticks": charts.ticks(axis),
        "blocks": {name: charts.blocks(rows) for name, rows in content["blocks"].items()},
        "axes": {name: charts.block_axes(rows) for name, rows in content["blocks"].items()},
    }
    return environment.get_template(TEMPLATE).render(c=content, charts=drawings, study=study)


def percent(share: float | None) -> str:
    """A share as a signed percentage with one decimal; empty for None."""
    return "" if share is None else f"{share:+z.1%}"


def write(content: Content, out: Path, study: Sequence[Mapping[str, str]] = ()) -> tuple[Path, Path]:
    """Write the page to `out`, and its content without pictures to a JSON file beside it. Returns both paths.

    study: as for `html`.
    """
    json_path = out.with_suffix(".json")
    make_folder(out.parent)
    write_text(out, html(content, study))
    plain = {
        **content,
        "changed": _without_pictures(content["changed"]),
        "examples": _without_pictures(content["examples"]),
    }
    write_text(json_path, json.dumps(plain, indent=1) + "\n")
    return out, json_path


def _without_pictures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "picture"} for row in rows]


__all__ = ["Content", "collect", "find_pictures", "html", "percent", "pictures_of", "thumbnail", "write", "write_plots"]
