"""Conversations in LLaVA's JSON: `id`, `image` and `conversations` with turns `from` human or gpt, and `value`.

`llava:FILE.json`, or `llava:DIR` with one JSON file in DIR; `image` is relative to the file's folder. Each question
with its answer is one sample of the task `vqa`, `<image>` markers removed. Entries without a picture are left out.
Half of the pictures are train and half are test, because the layout has no splits.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exporter.data.folder import half
from exporter.data.rows import BadRowError, Row, Rows, below, load_json, repeated, text, to_samples
from exporter.data.tasks.sample import Sample
from exporter.errors import DataError

TASK = "vqa"
MARKER = "<image>"
SPEAKERS = ("human", "gpt")


def samples(path: Path, task: str, split: str, limit: int, seed: int) -> list[Sample]:
    """At most `limit` questions, selected by `seed`; errors as `rows.to_samples`."""
    if task != TASK:
        raise DataError(f"conversations have samples of the task {TASK}, not of {task}", "add a source of that task")
    file = _file(path)
    entries = load_json(file)
    if not isinstance(entries, list):
        raise DataError(f"{file} is not a list of conversations", "use a file in LLaVA's layout")
    result = Rows(file.parent)
    result.problems += repeated((e.get("id") for e in entries if isinstance(e, dict)), "id", file.name)
    for number, entry in enumerate(entries, start=1):
        where = f"{file.name}: entry {number}"
        with result.at(where):
            result.rows += _rows(file, where, number, entry)
    if not result.problems:
        result.rows = half(result.rows, split)
    return to_samples(result, limit, seed, f"{file} has no question about a picture for split {split}")


def _file(path: Path) -> Path:
    files = [path] if path.is_file() else sorted(path.glob("*.json")) if path.is_dir() else []
    if len(files) != 1:
        problem = f"it has {len(files)} JSON files" if path.is_dir() else "it does not exist"
        raise DataError(f"{path} is no file of conversations ({problem})", "pass llava:FILE.json")
    return files[0]


def _rows(file: Path, where: str, number: int, entry: Any) -> list[Row]:
    if not isinstance(entry, dict):
        raise BadRowError("not a JSON object")
    if entry.get("image") is None:
        return []
    name = text(entry, "image")
    identity, picture = str(entry.get("id", number)), below(file.parent, name)
    pairs = list(_pairs(entry.get("conversations")))
    names = [identity if len(pairs) == 1 else f"{identity}#{turn}" for turn in range(1, len(pairs) + 1)]
    return [
        Row(where, name, picture, sample, question, (answer,))
        for sample, (question, answer) in zip(names, pairs, strict=True)
        if question
    ]


def _pairs(turns: Any) -> Iterator[tuple[str, str]]:
    """Question and answer of every exchange; the question is empty where the turn is only a marker."""
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise BadRowError("`conversations` must be a list of objects")
    speakers = [turn.get("from") for turn in turns]
    if speakers != list(SPEAKERS) * (len(turns) // 2):
        raise BadRowError(f"turns must alternate between {' and '.join(SPEAKERS)}")
    for question_turn, answer_turn in zip(turns[::2], turns[1::2], strict=True):
        yield text(question_turn, "value").replace(MARKER, " ").strip(), text(answer_turn, "value").strip()
