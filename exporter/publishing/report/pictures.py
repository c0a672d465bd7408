"""Thumbnails of the samples on the report page, as data URLs."""

from collections.abc import Mapping, Sequence
from io import BytesIO

from PIL.Image import Image

from exporter import data
from exporter.data.tasks.sample import Sample
from exporter.errors import DataError
from exporter.evaluation.report_file import AnswerPair
from exporter.model.inference.openai_client import data_url
from exporter.publishing.artifact_summary import Summary
from exporter.publishing.report.content import CHANGED_SHOWN

LONGEST = 288  # pixels of the longer side: 144 CSS pixels on a screen with 2 pixels per CSS pixel
SMALL = 96  # pictures up to this size in pixels are stored without loss


def pictures_of(summary: Summary, sources: Sequence[data.SourceSpec]) -> tuple[dict[tuple[str, str], str], str]:
    """Thumbnails of the samples in the report, by (task, sample id), and a note for the user, empty if none.

    sources: the test data; if empty, the recipe's data, as far as it is readable. Raises DataError if `sources` are not
    readable.
    """
    if summary.report is None:
        return {}, "the artifact has no evaluation; run `mmq evaluate`"
    rows = [*summary.report.changed[:CHANGED_SHOWN], *summary.report.examples]
    count, seed = summary.report.evaluation.samples, summary.report.evaluation.seed
    if not rows or count is None or seed is None:
        return {}, ""
    data_sources = sources or data.places(summary.recipe.evaluation.data or summary.recipe.calibration.data)
    tasks = dict.fromkeys(row.task for row in rows)
    try:
        samples = {task: data.samples_from(data_sources, task, "test", count, seed) for task in tasks}
    except DataError as error:
        if sources:
            raise
        return {}, f"no pictures: {error.message}; pass the test data with --data"
    pictures = find_pictures(rows, samples)
    missing = len({(row.task, row.id) for row in rows} - pictures.keys())
    return (
        pictures,
        f"{missing} of the listed samples are not in this data; pass the test data with --data" if missing else "",
    )


def thumbnail(picture: Image) -> str:
    """Data URL of a picture: PNG up to SMALL pixels per side, else JPEG of at most LONGEST, without EXIF data."""
    image, buffer = picture.convert("RGB"), BytesIO()
    if max(image.size) <= SMALL:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.thumbnail((LONGEST, LONGEST))
        image.save(buffer, "JPEG", quality=82, optimize=True)
    return data_url(buffer.getvalue())


def find_pictures(rows: Sequence[AnswerPair], samples: Mapping[str, Sequence[Sample]]) -> dict[tuple[str, str], str]:
    """(task, id) -> thumbnail of each row that matches a sample in id, question, references and pixels.

    Reports of older versions of mmq have no hash of the pixels; then the pixels are not compared.
    """
    samples_by_key = {
        (task, sample.identity): sample for task, task_samples in samples.items() for sample in task_samples
    }
    pictures = {}
    for row in rows:
        key = (row.task, row.id)
        sample = samples_by_key.get(key)
        if sample is None or key in pictures:
            continue
        image = sample.image()
        content = (sample.question, tuple(sample.references), data.image_key(image))
        if content == (row.question, row.references, row.image or content[2]):
            pictures[key] = thumbnail(image)
    return pictures
