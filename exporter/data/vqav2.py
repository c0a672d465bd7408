"""VQAv2 from the official files: questions, annotations with ten answers each, and COCO's pictures of 2014.

Files: `v2_OpenEnded_mscoco_val2014_questions.json`, `v2_mscoco_val2014_annotations.json` and `val2014/`, in the layout
of visualqa.org and its tools. A sample's kind is the answer type.
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
from exporter.data.tasks.sample import Sample

QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
ANNOTATIONS = "v2_mscoco_{}_annotations.json"
PEOPLE = 10

_CONVENTION = CONVENTIONS["vqav2"]


def samples(path: Path, task: str, split: str, limit: int, seed: int) -> list[Sample]:
    """At most `limit` questions of `train2014` or `val2014`; errors as `rows.to_samples`."""
    _CONVENTION.require(task, split)
    subset = _CONVENTION.splits[split]
    question_file = _file(path, QUESTIONS.format(subset), "Questions/")
    answer_file = _file(path, ANNOTATIONS.format(subset), "Annotations/")
    folder = first_folder(path, [place.format(subset) for place in PLACES], "pictures", _CONVENTION.layout)
    result = Rows(path)
    questions = _by_id(question_file, "questions", result)
    annotations = _by_id(answer_file, "annotations", result)
    for identity in annotations.keys() - questions.keys():
        result.problems.append(f"{answer_file.name}: question_id {identity} is not in {question_file.name}")
    for identity, question in questions.items():
        with result.at(f"{question_file.name}: question {identity}"):
            question_text, image = text(question, "question"), number(question, "image_id")
            if identity not in annotations:
                raise BadRowError(f"no answers in {answer_file.name}")
            where = f"{answer_file.name}: question {identity}"
            with result.at(where):
                kind, answers = _answer(annotations[identity], image)
                picture = folder / f"COCO_{subset}_{image:012d}.jpg"
                shown = picture.relative_to(path).as_posix()
                result.rows.append(Row(where, shown, picture, str(identity), question_text, answers, kind))
    return to_samples(result, limit, seed, f"{question_file} has no question")


def _file(path: Path, name: str, place: str) -> Path:
    return first_file(path, (name, place + name, "annotations/" + name), "file of VQAv2", _CONVENTION.layout)


def _by_id(file: Path, key: str, result: Rows) -> dict[int, dict[str, Any]]:
    """Entries by question id; appends problems to `result`."""
    listed = entries(load_json(file), key, file)
    result.problems += repeated((entry.get("question_id") for entry in listed), "question_id", file.name)
    by_id = {}
    for i, entry in enumerate(listed):
        with result.at(f"{file.name}: {key}[{i}]"):
            by_id[number(entry, "question_id")] = entry
    return by_id


def _answer(annotation: dict[str, Any], image: int) -> tuple[str, tuple[str, ...]]:
    """Answer type and ten answers, the most common first, because calibration uses the first one as the reply."""
    if annotation.get("image_id") != image:
        raise BadRowError(f"image_id is {annotation.get('image_id')}, but the question has image_id {image}")
    listed = annotation.get("answers")
    if not isinstance(listed, list) or len(listed) != PEOPLE or not all(isinstance(a, dict) for a in listed):
        raise BadRowError(f"`answers` must be a list of {PEOPLE} objects")
    answers = texts([answer.get("answer") for answer in listed], "answers")
    most = annotation.get("multiple_choice_answer")
    return text(annotation, "answer_type"), tuple(sorted(answers, key=lambda answer: answer != most))
