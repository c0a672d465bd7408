"""Answers of models, stored on disk so that a stopped evaluation resumes and no question runs twice.

The key of an answer is everything that determines it: the model's identity (weights, generation, library versions), the
prompt and the picture. Each finished batch is one file, written atomically, so a kill loses at most one batch.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from exporter.data.tasks.sample import Sample
from exporter.errors import DataError
from exporter.events import Event, Listener, ignore, notice
from exporter.files.writing import make_folder, write_text

VERSION = 3  # increase it when the same inputs give other answers, or when the layout of the files changes
ABOUT = "about.json"

Answers = dict[str, list[str]]  # task -> one answer per sample


class Backend(Protocol):
    """A source of answers: transformers in this process, or a server."""

    def pieces(self, samples: Sequence[Sample]) -> Iterator[dict[int, str]]:
        """Yield finished pieces: index of a sample -> its answer without surrounding spaces."""


@dataclass(frozen=True)
class Answerer:
    """One model that answers samples.

    label: name of the model in progress events. identity: everything but prompt and picture that determines answers.
    prompt: complete prompt of a sample. opened: context of the back end, entered only when an answer is missing.
    require_unchanged: raises when the weights no longer match the identity; called before answers are stored.
    """

    label: str
    identity: Mapping[str, Any]
    prompt: Callable[[Sample], str]
    opened: Callable[[], AbstractContextManager[Backend]]
    require_unchanged: Callable[[], None] = lambda: None


class Store:
    """Answers below one folder: one subfolder per model, one file per finished batch. Safe for several writers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has_served(self) -> bool:
        """Whether there is any answer from a server."""
        files = self.folder.glob(f"*/{ABOUT}")
        return any('"backend": "openai"' in file.read_text(encoding="utf-8", errors="replace") for file in files)

    def read(self, identity: Mapping[str, Any], on_event: Listener = ignore) -> dict[str, str]:
        """Key -> answer of one model. Delete damaged files with a note; their batches run again."""
        answers: dict[str, str] = {}
        for path in sorted(self._place(identity).glob("*.json")):
            if path.name == ABOUT:
                continue
            batch = _batch(path)
            if batch is None:
                path.unlink(missing_ok=True)
                on_event(notice(f"{path} was damaged and is deleted: its samples run again"))
            else:
                answers |= batch
        return answers

    def add(self, identity: Mapping[str, Any], answers: Mapping[str, str]) -> None:
        """Store one finished batch atomically."""
        place = self._place(identity)
        if not (place / ABOUT).exists():
            make_folder(place)
            write_text(place / ABOUT, json.dumps(dict(identity), indent=1, sort_keys=True) + "\n")
        content = {"answers": dict(answers), "sha256": digest(dict(answers))}
        write_text(place / f"{digest(sorted(answers))[:24]}.json", json.dumps(content, sort_keys=True) + "\n")

    def _place(self, identity: Mapping[str, Any]) -> Path:
        return self.folder / digest(dict(identity) | {"version": VERSION})[:24]


def _batch(path: Path) -> dict[str, str] | None:
    """Read the answers in one file; None when the file is damaged. DataError when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    except OSError as error:  # no evidence of damage
        raise DataError(f"{path}: the stored answers cannot be read ({error})") from error
    try:
        content = json.loads(text)
        answers: dict[str, str] = content["answers"]
        valid = digest(answers) == content["sha256"] and all(isinstance(text, str) for text in answers.values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return answers if valid else None


def digest(content: Any) -> str:
    """sha256 of plain data, independent of key order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def collect_answers(
    model: Answerer,
    samples: Mapping[str, Sequence[Sample]],
    pictures: Mapping[str, Sequence[str]],
    store: Store | None,
    on_event: Listener,
) -> Answers:
    """Answers of one model to all samples, from `store` where it has them; store every new batch.

    pictures: content hash of every sample's picture. store: None stores nothing. DataError when an answer is missing.
    """
    flat = [sample for of_task in samples.values() for sample in of_task]
    hashes = [picture for of_task in pictures.values() for picture in of_task]
    keys = [digest([model.prompt(s), picture]) for s, picture in zip(flat, hashes, strict=True)]
    known = store.read(model.identity, on_event) if store else {}
    missing = list({key: i for i, key in enumerate(keys) if key not in known}.values())
    message = f"{model.label}: {', '.join(samples)}"
    on_event(Event("evaluate", len(flat) - len(missing), len(flat), message))
    if missing:
        with model.opened() as backend:
            for piece in backend.pieces([flat[i] for i in missing]):
                batch = {keys[missing[n]]: text for n, text in piece.items()}
                model.require_unchanged()
                if store:
                    store.add(model.identity, batch)
                known |= batch
                left = sum(keys[i] not in known for i in missing)
                on_event(Event("evaluate", len(flat) - left, len(flat), message))
    unanswered = [s.identity for s, key in zip(flat, keys, strict=True) if key not in known]
    if unanswered:
        raise DataError(
            f"the {model.label} model did not answer {len(unanswered)} of {len(flat)} samples, first {unanswered[0]}"
        )
    remaining = iter(keys)
    return {task: [known[next(remaining)] for _ in of_task] for task, of_task in samples.items()}
