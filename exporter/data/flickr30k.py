"""Flickr30k with Karpathy's splits: `dataset_flickr30k.json` next to the folder `flickr30k-images`.

Each picture is one sample with its five captions. The split file is from arXiv 1412.2306.
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
    repeated,
    text,
    texts,
    to_samples,
)
from exporter.data.tasks.sample import Sample

FILES = ("dataset_flickr30k.json", "karpathy/dataset_flickr30k.json", "annotations/dataset_flickr30k.json")
FOLDERS = ("flickr30k-images", "flickr30k_images", "images")

_CONVENTION = CONVENTIONS["flickr30k"]


def samples(path: Path, task: str, split: str, limit: int, seed: int) -> list[Sample]:
    """At most `limit` pictures of a split with their captions; errors as `rows.to_samples`."""
    _CONVENTION.require(task, split)
    file = first_file(path, FILES, "split file", _CONVENTION.layout)
    folder = first_folder(path, FOLDERS, "pictures", _CONVENTION.layout)
    listed = entries(load_json(file), "images", file)
    result = Rows(path)
    result.problems += repeated((entry.get("filename") for entry in listed), "filename", file.name)
    result.problems += repeated((entry.get("imgid") for entry in listed), "imgid", file.name)
    subset = _CONVENTION.splits[split]
    for i, entry in enumerate(listed):
        where = f"{file.name}: images[{i}]"
        with result.at(where):
            check_id(entry, "imgid")
            if text(entry, "split") not in _CONVENTION.splits.values():
                raise BadRowError(f"split '{entry['split']}' is not one of {', '.join(_CONVENTION.splits.values())}")
            if entry["split"] == subset:
                picture = below(folder, text(entry, "filename"))
                shown = picture.relative_to(path).as_posix()
                result.rows.append(Row(where, shown, picture, picture.name, None, _captions(entry)))
    return to_samples(result, limit, seed, f"{file} has no picture of split {subset}")


def _captions(entry: dict[str, Any]) -> tuple[str, ...]:
    sentences = entry.get("sentences")
    if not isinstance(sentences, list) or not sentences or not all(isinstance(s, dict) for s in sentences):
        raise BadRowError("`sentences` must be a non-empty list of objects")
    return texts([sentence.get("raw") for sentence in sentences], "captions")
