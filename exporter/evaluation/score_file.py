"""Score a file with answers from another tool, in the results format of COCO, VQAv2 or GQA."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.data import places, samples_from
from exporter.data.rows import is_unicode
from exporter.data.tasks import TASKS
from exporter.errors import DataError

IDS = ("image_id", "question_id", "questionId", "id")
ANSWERS = ("caption", "answer", "prediction")
SHOWN = 5


@dataclass(frozen=True)
class FileScores:
    """Scores of a results file. unanswered: ids of samples without answer. unknown: ids of answers without sample."""

    task: str
    figures: Mapping[str, float]
    method: Mapping[str, str]
    samples: int
    unanswered: tuple[str, ...]
    unknown: tuple[str, ...]


def read_answers(file: Path) -> dict[str, str]:
    """Sample id -> answer, from a list of objects with an id and a text, or from one object with ids as keys.

    DataError lists entries without id or text, and repeated ids.
    """
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is not a JSON file ({error})") from None
    pairs = [_pair(entry) for entry in content] if isinstance(content, list) else list(_object(content, file).items())
    wrong = [f"entry {i}" for i, pair in enumerate(pairs) if None in pair or not is_unicode("".join(map(str, pair)))]
    counts = Counter(str(identity) for identity, _ in pairs if identity is not None)
    repeated = [identity for identity, count in counts.items() if count > 1]
    if wrong or repeated:
        problems = ", ".join([*wrong[:SHOWN], *(f"id {identity} twice" for identity in repeated[:SHOWN])])
        raise DataError(
            f"{file} has {len(wrong)} invalid entries and {len(repeated)} repeated ids: {problems}",
            f"each entry needs an id under one of {', '.join(IDS)} and a text under one of {', '.join(ANSWERS)}",
        )
    return {str(identity): str(answer) for identity, answer in pairs}


def _pair(entry: Any) -> tuple[Any, str | None]:
    if not isinstance(entry, dict):
        return None, None
    identity = next((entry[key] for key in IDS if isinstance(entry.get(key), int | str)), None)
    return identity, next((entry[key] for key in ANSWERS if isinstance(entry.get(key), str)), None)


def _object(content: Any, file: Path) -> dict[str, str | None]:
    if not isinstance(content, dict):
        raise DataError(
            f"{file} must be a JSON list of answers, or a JSON object with ids as keys and answers as values"
        )
    return {identity: answer if isinstance(answer, str) else None for identity, answer in content.items()}


def score(file: Path, sources: Sequence[str], task: str, split: str, limit: int, seed: int) -> FileScores:
    """Score a file's answers to the samples of a split; a sample without an answer has the empty answer.

    DataError when the file answers none of the samples.
    """
    answers = read_answers(file)
    samples = samples_from(places(sources), task, split, limit, seed)
    ids = [sample.identity for sample in samples]
    texts = [answers.get(identity, "") for identity in ids]
    unanswered = tuple(identity for identity in ids if identity not in answers)
    unknown = tuple(sorted(answers.keys() - set(ids)))
    if len(unanswered) == len(ids):
        hint = f"an id in the file is {next(iter(answers), '(none)')}; an id of the samples is {ids[0]}"
        raise DataError(f"{file} answers none of the {len(ids)} samples", hint)
    return FileScores(task, TASKS[task].corpus(texts, samples), TASKS[task].method(), len(ids), unanswered, unknown)
