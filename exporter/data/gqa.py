"""GQA from the official files: `questions1.2/testdev_balanced_questions.json` and the pictures in `images/`.

The file is one object of questions by id (cs.stanford.edu/people/dorarad/gqa). A sample's kind is the structural type.
The reader drops unneeded fields of each question while parsing, because the scene programs take ten times the memory.
"""

from pathlib import Path
from typing import Any

from exporter.data.conventions import CONVENTIONS
from exporter.data.rows import (
    BadRowError,
    Row,
    Rows,
    below,
    first_file,
    first_folder,
    load_json,
    repeated,
    text,
    to_samples,
)
from exporter.data.tasks.sample import Sample
from exporter.errors import DataError

PLACES = ("questions1.2/", "questions/", "")
KEPT = ("imageId", "question", "answer", "types")

_CONVENTION = CONVENTIONS["gqa"]


def samples(path: Path, task: str, split: str, limit: int, seed: int) -> list[Sample]:
    """At most `limit` questions of a balanced split; errors as `rows.to_samples`."""
    _CONVENTION.require(task, split)
    name = f"{_CONVENTION.splits[split]}_questions.json"
    file = first_file(path, [place + name for place in PLACES], "questions", _CONVENTION.layout)
    folder = first_folder(path, ("images", "allImages/images"), "pictures", _CONVENTION.layout)
    result = Rows(path)
    content = load_json(file, lambda pairs: _slim(pairs, file.name, result))
    if not isinstance(content, dict):
        raise DataError(f"{file} is not an object of questions by id", "use the official file of this data set")
    for identity, entry in content.items():
        where = f"{file.name}: question {identity}"
        with result.at(where):
            result.rows.append(_row(path, folder, where, identity, entry))
    return to_samples(result, limit, seed, f"{file} has no question")


def _slim(pairs: list[tuple[str, Any]], name: str, result: Rows) -> dict[str, Any]:
    """Hook of the JSON parser: keep the needed fields of a question; append duplicate keys to the problems."""
    entry = dict(pairs)
    if len(entry) < len(pairs):
        result.problems += repeated((key for key, _ in pairs), "key", name)
    return {key: entry[key] for key in KEPT if key in entry} if "imageId" in entry else entry


def _row(path: Path, folder: Path, where: str, identity: str, entry: Any) -> Row:
    if not isinstance(entry, dict):
        raise BadRowError("not an object")
    types = entry.get("types")
    if not isinstance(types, dict):
        raise BadRowError("`types` must be an object")
    picture = below(folder, f"{text(entry, 'imageId')}.jpg")
    shown = picture.relative_to(path).as_posix()
    return Row(
        where, shown, picture, identity, text(entry, "question"), (text(entry, "answer"),), text(types, "structural")
    )
