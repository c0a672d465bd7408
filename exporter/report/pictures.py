"""Small pictures of the samples that a report shows, as data URLs."""

from collections.abc import Mapping, Sequence
from io import BytesIO

from PIL.Image import Image

from exporter import data
from exporter.errors import DataError
from exporter.evaluation.report_file import AnswerPair
from exporter.inference.openai_client import data_url
from exporter.publishing.artifact_summary import Summary
from exporter.report.content import CHANGED_SHOWN
from exporter.tasks.sample import Sample

LONGEST = 288  # pixels of the longer side: sharp at 144 CSS pixels on a dense screen
SMALL = 96  # up to here a picture is kept pixel by pixel


def pictures_of(summary: Summary, sources: Sequence[data.SourceSpec]) -> tuple[dict[tuple[str, str], str], str]:
    """(task, sample id) -> small picture of what the report lists, and what the user should know, or nothing.

    sources: the data that was evaluated on; without any, the recipe's own when it can still be read. Raises DataError
    when named sources cannot be read.
    """
    if summary.report is None:
        return {}, "the artifact was never evaluated; `mmq evaluate` measures it"
    rows = [*summary.report.changed[:CHANGED_SHOWN], *summary.report.examples]
    count, seed = summary.report.evaluation.samples, summary.report.evaluation.seed
    if not rows or count is None or seed is None:
        return {}, ""
    chosen = sources or data.places(summary.recipe.evaluation.data or summary.recipe.calibration.data)
    tasks = dict.fromkeys(row.task for row in rows)
    try:
        samples = {task: data.samples_from(chosen, task, "test", count, seed) for task in tasks}
    except DataError as error:
        if sources:
            raise
        return {}, f"no pictures: {error.message}; name the data by --data"
    found = find_pictures(rows, samples)
    lost = len({(row.task, row.id) for row in rows} - found.keys())
    return found, f"{lost} of the listed samples are not in the data that was read: other data?" if lost else ""


def thumbnail(picture: Image) -> str:
    """A data URL: PNG for tiny pictures, else JPEG of at most `LONGEST` pixels a side (without EXIF data)."""
    image, buffer = picture.convert("RGB"), BytesIO()
    if max(image.size) <= SMALL:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.thumbnail((LONGEST, LONGEST))
        image.save(buffer, "JPEG", quality=82, optimize=True)
    return data_url(buffer.getvalue())


def find_pictures(rows: Sequence[AnswerPair], samples: Mapping[str, Sequence[Sample]]) -> dict[tuple[str, str], str]:
    """(task, id) -> picture of every row whose sample is among `samples`: the same question, references and pixels.

    A report of an older mmq does not say which pixels.
    """
    known = {(task, sample.identity): sample for task, found in samples.items() for sample in found}
    pictures = {}
    for row in rows:
        key = (row.task, row.id)
        sample = known.get(key)
        if sample is None or key in pictures:
            continue
        image = sample.image()
        shown = (sample.question, tuple(sample.references), data.image_key(image))
        if shown == (row.question, row.references, row.image or shown[2]):
            pictures[key] = thumbnail(image)
    return pictures
