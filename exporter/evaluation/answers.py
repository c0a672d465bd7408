"""Answers kept on disk, so that a stopped evaluation goes on and the same question is never asked twice.

An answer is looked up by everything that decides it: the model's identity (weights, generation, library versions),
the prompt and the picture. Finished batches are files of their own, written atomically, so a kill loses one batch.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from exporter.errors import DataError
from exporter.events import Event, Listener, ignore
from exporter.files.writing import make_folder, write_text
from exporter.tasks.sample import Sample

VERSION = 2  # raised when the same inputs give other answers, or the files another layout
ABOUT = "about.json"

Answers = dict[str, list[str]]  # task -> one answer a sample


class Backend(Protocol):
    """Whatever answers: transformers in this process, or a server."""

    def pieces(self, samples: Sequence[Sample]) -> Iterator[dict[int, str]]:
        """Number of a sample -> its answer without surrounding spaces, in pieces, as they are finished."""


@dataclass(frozen=True)
class Answerer:
    """One model to be asked.

    label: what progress calls it. identity: everything but prompt and picture that decides its answers.
    prompt: what a sample is asked, whole. opened: the back end, loaded only when an answer is missing.
    require_unchanged: raises when the weights are no longer those of the identity; called before answers are kept.
    """

    label: str
    identity: Mapping[str, Any]
    prompt: Callable[[Sample], str]
    opened: Callable[[], AbstractContextManager[Backend]]
    require_unchanged: Callable[[], None] = lambda: None


class Store:
    """Answers below one folder, a folder a model and a file a finished batch. Safe for several writers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, identity: Mapping[str, Any], on_event: Listener = ignore) -> dict[str, str]:
        """Key -> answer of one model. A damaged file is deleted with a note: its batch is asked again."""
        answers: dict[str, str] = {}
        for path in sorted(self._place(identity).glob("*.json")):
            if path.name == ABOUT:
                continue
            batch = _batch(path)
            if batch is None:
                path.unlink(missing_ok=True)
                on_event(Event("note", 0, 0, f"{path} is damaged: its answers are asked for again"))
            else:
                answers |= batch
        return answers

    def add(self, identity: Mapping[str, Any], answers: Mapping[str, str]) -> None:
        """Keep one finished batch; either all of it is on disk or nothing."""
        place = self._place(identity)
        if not (place / ABOUT).exists():
            make_folder(place)
            write_text(place / ABOUT, json.dumps(dict(identity), indent=1, sort_keys=True) + "\n")
        content = {"answers": dict(answers), "sha256": digest(dict(answers))}
        write_text(place / f"{digest(sorted(answers))[:24]}.json", json.dumps(content, sort_keys=True) + "\n")

    def _place(self, identity: Mapping[str, Any]) -> Path:
        return self.folder / digest(dict(identity) | {"version": VERSION})[:24]


def _batch(path: Path) -> dict[str, str] | None:
    """The answers in one file; None when it does not hold what was written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        answers: dict[str, str] = content["answers"]
        good = digest(answers) == content["sha256"] and all(isinstance(text, str) for text in answers.values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return answers if good else None


def digest(content: Any) -> str:
    """sha256 of plain data, independent of key order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def ask(
    model: Answerer,
    samples: Mapping[str, Sequence[Sample]],
    pictures: Mapping[str, Sequence[str]],
    store: Store | None,
    on_event: Listener,
) -> Answers:
    """One answer a sample of every task; every finished batch is kept in `store`.

    pictures: the content hash of every sample's picture. store None keeps nothing.
    """
    flat = [sample for found in samples.values() for sample in found]
    hashes = [picture for found in pictures.values() for picture in found]
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
    lost = [s.identity for s, key in zip(flat, keys, strict=True) if key not in known]
    if lost:
        raise DataError(f"{model.label} gave no answer to {len(lost)} of {len(flat)} samples, first {lost[0]}")
    given = iter(keys)
    return {task: [known[next(given)] for _ in found] for task, found in samples.items()}
