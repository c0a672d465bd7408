"""`mmq report`: an artifact's report as one HTML page."""

from pathlib import Path

import click

from exporter.commands.options import artifact_argument, data_option, json_option, reports_errors, say
from exporter.data import places
from exporter.errors import DataError


@click.command()
@artifact_argument
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="HTML file [ARTIFACT-report.html].")
@click.option("--plots", type=click.Path(path_type=Path, file_okay=False), help="Folder for the plots as PNG files.")
@click.option(
    "--study",
    "studied",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of a study of the same model: its pictures come into the page.",
)
@data_option
@json_option
@reports_errors
def report(
    artifact: Path, out: Path | None, plots: Path | None, studied: Path | None, data: tuple[str, ...], as_json: bool
) -> None:
    """Write an artifact's report: one HTML page that needs no network, and its content as JSON beside it.

    Size, scores with intervals, gates, quantization error by block, changed answers with their pictures, plan and
    provenance. Pictures are read again from the data that was evaluated on: name it by --data, as for `evaluate`.

    \b
    Examples:
      mmq report artifacts/demo-llava-w4-vit8 --out report.html
      mmq report artifacts/mine --data ./images --plots plots
      mmq report artifacts/demo-llava-w4-vit8 --study studies/demo-llava
    """
    from exporter.model.families import FAMILIES
    from exporter.publishing.artifact_summary import folder_reader, read_summary
    from exporter.report import collect, pictures_of, write, write_plots
    from exporter.study.gallery import as_data, components_of, gather

    summary = read_summary(artifact.resolve().name, folder_reader(artifact))
    known = {component.name for component in FAMILIES[summary.manifest.family].components}
    foreign = components_of(studied) - known if studied else set()
    if foreign:
        raise DataError(f"{studied} studies another model: {artifact} has no {', '.join(sorted(foreign))}")
    pictures, note = pictures_of(summary, places(data))
    content = collect(summary, pictures)
    study = [as_data(picture) for picture in gather(studied)] if studied else []
    files = [*write(content, out or artifact.resolve().with_name(f"{artifact.resolve().name}-report.html"), study)]
    if plots:
        files += write_plots(content, plots)
    said = {"files": [str(path) for path in files], "pictures": len(pictures), "note": note}
    say(said if as_json else "\n".join([f"wrote {path}" for path in files] + ([f"note: {note}"] if note else [])))
