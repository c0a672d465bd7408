"""COCO captions from the official files: `annotations/captions_val2017.json` and the pictures in `val2017/`.

If a folder has the releases of 2017 and 2014, 2017 is used. Each picture is one sample with all its captions. Format:
cocodataset.org/#format-data.
"""

from pathlib import Path
from typing import Any

from exporter.data.conventions import CONVENTIONS
from exporter.data.rows import (
    BadRowError,
    Row,
    Rows,
    below,
    check_id,
    entries,
    first_file,
    first_folder,
    load_json,
    number,
    repeated,
    text,
    texts,
    to_samples,
)
from exporter.data.tasks.sample import Sample

YEARS = ("2017", "2014")
PLACES = ("{}", "images/{}", "Images/mscoco/{}")  # possible folders of the pictures, also for VQAv2

_CONVENTION = CONVENTIONS["coco"]


def samples(path: Path, task: str, split: str, limit: int, seed: int) -> list[Sample]:
    """At most `limit` pictures of `train2017` or `val2017` with their captions; errors as `rows.to_samples`."""
    _CONVENTION.require(task, split)
    subset = _CONVENTION.splits[split].removesuffix("2017")
    names = [f"{place}captions_{subset}{year}.json" for year in YEARS for place in ("annotations/", "")]
    file = first_file(path, names, "captions", _CONVENTION.layout)
    subset = file.stem.removeprefix("captions_")
    folder = first_folder(path, [place.format(subset) for place in PLACES], "pictures", _CONVENTION.layout)
    result = Rows(path)
    images, captions = _read(file, result)
    for identity, name in images.items():
        where = f"{file.name}: image {identity}"
        with result.at(where):
            if identity not in captions:
                raise BadRowError("no caption")
            picture = below(folder, name)
            shown = picture.relative_to(path).as_posix()
            result.rows.append(Row(where, shown, picture, str(identity), None, texts(captions[identity], "captions")))
    return to_samples(result, limit, seed, f"{file} has no picture")


def _read(file: Path, result: Rows) -> tuple[dict[int, str], dict[int, list[Any]]]:
    """File names and captions by image id; appends problems to `result`."""
    content = load_json(file)
    listed, annotated = entries(content, "images", file), entries(content, "annotations", file)
    result.problems += repeated((entry.get("id") for entry in listed), "image id", file.name)
    result.problems += repeated((entry.get("id") for entry in annotated), "annotation id", file.name)
    images: dict[int, str] = {}
    captions: dict[int, list[Any]] = {}
    for i, entry in enumerate(listed):
        with result.at(f"{file.name}: images[{i}]"):
            images[number(entry, "id")] = text(entry, "file_name")
    for i, entry in enumerate(annotated):
        with result.at(f"{file.name}: annotations[{i}]"):
            check_id(entry, "id")
            identity = number(entry, "image_id")
            if identity not in images:
                raise BadRowError(f"image_id {identity} is not in the list `images`")
            captions.setdefault(identity, []).append(entry.get("caption"))
    return images, captions
