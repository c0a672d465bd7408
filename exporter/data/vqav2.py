"""VQAv2 from the official files: questions, annotations with ten answers each, and COCO's pictures of 2014.

`v2_OpenEnded_mscoco_val2014_questions.json`, `v2_mscoco_val2014_annotations.json` and `val2014/`, as visualqa.org
and its tools lay them out. A sample's kind is the answer type.
"""

from pathlib import Path
from typing import Any

from exporter.data.coco import PLACES
from exporter.data.conventions import CONVENTIONS
from exporter.data.rows import (
    BadRowError,
    Row,
    Rows,
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
from exporter.tasks.sample import Sample

QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
ANNOTATIONS = "v2_mscoco_{}_annotations.json"
PEOPLE = 10

_CONVENTION = CONVENTIONS["vqav2"]


def samples(path: Path, task: str, split: str, limit: int, seed: int) -> list[Sample]:
    """At most `limit` questions of `train2014` or `val2014`; errors as `rows.to_samples`."""
    _CONVENTION.require(task, split)
    subset = _CONVENTION.splits[split]
    asked = _file(path, QUESTIONS.format(subset), "Questions/")
    answered = _file(path, ANNOTATIONS.format(subset), "Annotations/")
    folder = first_folder(path, [place.format(subset) for place in PLACES], "pictures", _CONVENTION.layout)
    found = Rows(path)
    questions = _by_id(asked, "questions", found)
    annotations = _by_id(answered, "annotations", found)
    for identity in annotations.keys() - questions.keys():
        found.problems.append(f"{answered.name}: question_id {identity} is not in {asked.name}")
    for identity, question in questions.items():
        with found.at(f"{asked.name}: question {identity}"):
            said, image = text(question, "question"), number(question, "image_id")
            if identity not in annotations:
                raise BadRowError(f"no answers in {answered.name}")
            where = f"{answered.name}: question {identity}"
            with found.at(where):
                kind, answers = _answer(annotations[identity], image)
                picture = folder / f"COCO_{subset}_{image:012d}.jpg"
                shown = picture.relative_to(path).as_posix()
                found.rows.append(Row(where, shown, picture, str(identity), said, answers, kind))
    return to_samples(found, limit, seed, f"{asked} has no question")


def _file(path: Path, name: str, place: str) -> Path:
    return first_file(path, (name, place + name, "annotations/" + name), "file of VQAv2", _CONVENTION.layout)


def _by_id(file: Path, key: str, found: Rows) -> dict[int, dict[str, Any]]:
    """Entries by question id; what is wrong goes to `found`."""
    listed = entries(load_json(file), key, file)
    found.problems += repeated((entry.get("question_id") for entry in listed), "question_id", file.name)
    by_id = {}
    for i, entry in enumerate(listed):
        with found.at(f"{file.name}: {key}[{i}]"):
            by_id[number(entry, "question_id")] = entry
    return by_id


def _answer(annotation: dict[str, Any], image: int) -> tuple[str, tuple[str, ...]]:
    """Answer type and ten answers, the most common one first: calibration feeds the first one to the model."""
    if annotation.get("image_id") != image:
        raise BadRowError(f"image_id {annotation.get('image_id')}, but the question is about {image}")
    listed = annotation.get("answers")
    if not isinstance(listed, list) or len(listed) != PEOPLE or not all(isinstance(a, dict) for a in listed):
        raise BadRowError(f"`answers` must be a list of {PEOPLE} objects")
    answers = texts([answer.get("answer") for answer in listed], "answers")
    most = annotation.get("multiple_choice_answer")
    return text(annotation, "answer_type"), tuple(sorted(answers, key=lambda answer: answer != most))
