"""DocVQA (single pages) from the official files: `val_v1.0_withQT.json` and the pages in `documents/`.

The file's list `data` has objects with `questionId`, `question`, `image`, `answers` and `question_types`
(rrc.cvc.uab.es, Mathew et al., arXiv 2007.00398). A sample's kind is its question types.
"""

from pathlib import Path
from typing import Any

from exporter.data.conventions import CONVENTIONS
from exporter.data.rows import (
    BadRowError,
    Row,
    Rows,
    below,
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

NAMES = ("{}_v1.0_withQT.json", "{}_v1.0.json")  # with question types, and the older file without them
PLACES = ("", "spdocvqa_qas/", "{}/", "qas/")
FOLDERS = ("documents", "spdocvqa_images", "{}/documents", "images")

_CONVENTION = CONVENTIONS["docvqa"]


def samples(path: Path, task: str, split: str, limit: int, seed: int) -> list[Sample]:
    """At most `limit` questions of `train` or `val`, whose answers are public; errors as `rows.to_samples`."""
    _CONVENTION.require(task, split)
    subset = _CONVENTION.splits[split]
    names = [(place + name).format(*[subset] * (place + name).count("{}")) for name in NAMES for place in PLACES]
    file = first_file(path, names, "questions", _CONVENTION.layout)
    folder = first_folder(path, [name.format(subset) for name in FOLDERS], "pages", _CONVENTION.layout)
    result = Rows(path)
    listed = entries(load_json(file), "data", file)
    result.problems += repeated((entry.get("questionId") for entry in listed), "questionId", file.name)
    for i, entry in enumerate(listed):
        where = f"{file.name}: data[{i}]"
        with result.at(where):
            result.rows.append(_row(path, folder, where, entry))
    return to_samples(result, limit, seed, f"{file} has no question")


def _row(path: Path, folder: Path, where: str, entry: dict[str, Any]) -> Row:
    page = below(folder, Path(text(entry, "image")).name)  # the file has `documents/NAME`, wherever the pages are
    answers, kinds = entry.get("answers"), entry.get("question_types") or []
    if not isinstance(answers, list):
        raise BadRowError("`answers` must be a list (those of the test split are not public)")
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise BadRowError("`question_types` must be a list of strings")
    identity, question = str(number(entry, "questionId")), text(entry, "question")
    shown = page.relative_to(path).as_posix()
    references, metrics = texts(answers, "answers"), _CONVENTION.measured
    return Row(where, shown, page, identity, question, references, ", ".join(kinds), metrics)
