"""`mmq report`: write an artifact's report as one HTML page."""

from pathlib import Path

import click

from exporter.commands.next_steps import command, named, print_steps
from exporter.commands.options import artifact_argument, data_option, json_option, print_result, reports_errors
from exporter.commands.steps_after import open_page, with_data
from exporter.errors import DataError


@click.command()
@artifact_argument
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="HTML file [ARTIFACT-report.html].")
@click.option(
    "--plots",
    type=click.Path(path_type=Path, file_okay=False),
    help="Also write the plots as PNG files to this folder.",
)
@click.option(
    "--study",
    "studied",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of a study of the same model, whose plots the page also shows.",
)
@data_option
@json_option
@reports_errors
def report(
    artifact: Path, out: Path | None, plots: Path | None, studied: Path | None, data: tuple[str, ...], as_json: bool
) -> None:
    """Write an artifact's report as one HTML page and as JSON.

    The page is self-contained. It shows size, scores with intervals, gates, quantization error per block, changed
    answers with their pictures, plan and provenance. mmq reads the pictures from the test data: pass --data as for `mmq
    evaluate`.

    \b
    Examples:
      mmq report artifacts/demo-llava-w4-vit8 --out report.html
      mmq report artifacts/mine --data ./images --plots plots
      mmq report artifacts/demo-llava-w4-vit8 --study studies/demo-llava
    """
    from exporter.data import places
    from exporter.model.families import FAMILIES
    from exporter.publishing.artifact_summary import folder_reader, read_summary
    from exporter.publishing.report import collect, pictures_of, write, write_plots
    from exporter.study.gallery import components_of, gather
    from exporter.study.study_page import as_data

    summary = read_summary(artifact.resolve().name, folder_reader(artifact))
    components = {component.name for component in FAMILIES[summary.manifest.family].components}
    foreign_components = components_of(studied) - components if studied else set()
    if foreign_components:
        raise DataError(
            f"{studied} is a study of another model: {artifact} has no {', '.join(sorted(foreign_components))}",
            "pass the folder of a study of the artifact's source model",
        )
    pictures, note = pictures_of(summary, places(data))
    content = collect(summary, pictures)
    study = [as_data(picture) for picture in gather(studied)] if studied else []
    files = [*write(content, out or artifact.resolve().with_name(f"{artifact.resolve().name}-report.html"), study)]
    if plots:
        files += write_plots(content, plots)
    result = {"files": [str(path) for path in files], "pictures": len(pictures), "note": note}
    print_result(
        result
        if as_json
        else "\n".join([f"wrote {path}" for path in files] + ([f"note: {named(note)}"] if note else []))
    )
    measure = [] if summary.report else [command("evaluate", artifact, *with_data(data))]
    print_steps(as_json, [*measure, open_page(files[0])])
