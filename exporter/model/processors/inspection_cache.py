"""Replies of the helper process, stored on disk: a second plan of a model folder does not wait for transformers.

A stored reply is valid for the same bytes of all files of config and processor, the same question, the same versions of
the libraries and the same code of the helper. Each file carries a checksum; mmq ignores a damaged file.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from exporter.distribution import installed_version
from exporter.model.processors.files import processor_files

PACKAGES = (
    *("mmq", "transformers", "tokenizers", "huggingface_hub", "numpy", "pillow", "jinja2", "sentencepiece"),
    *("torch", "torchvision"),
)
CODE = ("inspector_process.py", "tokenizer_check.py", "chat_template.py", "inspection_cache.py")
MAX_FILES = 256  # beyond, the oldest files are deleted

InspectionReply = dict[str, Any]


def place() -> Path:
    """The folder of the replies; `MMQ_CACHE` names another than `~/.cache/mmq`."""
    return Path(os.environ.get("MMQ_CACHE") or "~/.cache/mmq").expanduser() / "processors"


def recall(folder: Path, question: str) -> InspectionReply | None:
    """The stored reply to a question about a model folder in its present state; None when there is none."""
    return _read(_file(folder)).get(question)


def has_reply(folder: Path) -> bool:
    """Whether a reply is stored for a model folder in its present state."""
    return bool(_read(_file(folder)))


def keep(folder: Path, question: str, reply: InspectionReply) -> None:
    """Store a reply. A disk error is ignored: the next plan computes the reply again."""
    path = _file(folder)
    replies = {**_read(path), question: reply}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _drop_oldest(path.parent.glob("*.json"))
        temporary.write_text(json.dumps({"replies": replies, "sha256": _digest(replies)}), encoding="utf-8")
        temporary.replace(path)


def _drop_oldest(paths: Iterable[Path]) -> None:
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)[MAX_FILES - 1 :]:
        path.unlink(missing_ok=True)


def _file(folder: Path) -> Path:
    return place() / f"{_digest([processor_files(folder, 'config.json'), _versions()])}.json"


def _read(path: Path) -> Mapping[str, InspectionReply]:
    """Replies by question; empty when the file is absent or damaged."""
    try:
        content = json.loads(path.read_bytes())
        replies: Mapping[str, InspectionReply] = content["replies"]
        return replies if content["sha256"] == _digest(replies) else {}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@cache
def _versions() -> list[Any]:
    """Everything outside the folder that decides a reply."""
    code = [hashlib.sha256(Path(__file__).with_name(name).read_bytes()).hexdigest() for name in CODE]
    return [sys.version, code, {package: installed_version(package) for package in PACKAGES}]
