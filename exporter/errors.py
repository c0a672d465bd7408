"""Every error that a user can cause, in one place; `cli.py` turns them into messages and exit codes."""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any


class MmqError(Exception):
    """A problem that the user can act on: `message` says what and where, `hint` what to do next."""

    exit_code = 1
    label = "Error"  # before the message

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(printable(message))
        self.message = printable(message)
        self.hint = None if hint is None else printable(hint)


class RecipeError(MmqError):
    """The recipe is wrong: unknown key, unknown name, impossible value."""


class PlanError(MmqError):
    """Recipe, checkpoint and device do not fit together."""


class CheckpointError(MmqError):
    """A source checkpoint is missing, truncated or damaged."""


class DataError(MmqError):
    """Calibration or evaluation data is missing, unreadable or overlaps."""


class CalibrationError(MmqError):
    """The numbers went wrong while calibrating or quantizing."""


class WorkdirError(MmqError):
    """A work folder belongs to another job or holds a damaged unit."""


class LockedError(MmqError):
    """Another process writes to the same folder."""


class ArtifactError(MmqError):
    """An artifact cannot be written, or does not hold what its plan says."""


class ServeError(MmqError):
    """The serving engine is missing, does not start, or does not answer."""


class CheckFailed(MmqError):
    """The serving engine answers differently from the reference."""

    exit_code = 3


class HubError(MmqError):
    """The model hub refused, failed or cannot be reached."""


class HubMissing(HubError):
    """There is no such repository or revision, or the token may not see it."""


class PublishError(MmqError):
    """An artifact is not fit to be published, or the repository is not a place for it."""


class MemoryShortage(MmqError):
    """A step ran out of memory; what was finished before it is kept."""

    exit_code = 4


class GateFailed(MmqError):
    """The artifact lost more of its task than the recipe allows, or the full-precision model does not do the task."""

    exit_code = 3


class GateNotResolved(MmqError):
    """Too few samples, or none, say whether the artifact lost more than the recipe allows."""

    exit_code = 5
    label = "Not resolved"


class Interrupted(MmqError):
    """The user stopped the job; the work folder can be resumed."""

    exit_code = 130


def printable(text: str) -> str:
    """`text` with control characters and lone surrogates escaped, and endless words cut: names come from files."""
    whole = text.encode("utf-8", "backslashreplace").decode()
    shown = "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in whole)
    return re.sub(r"\S{500,}", lambda word: f"{word[0][:200]}...{word[0][-50:]}", shown)


def one_line(text: str) -> str:
    """`text` without line breaks and control characters: what identifies a thing stands on one line everywhere."""
    return " ".join("".join(c if c.isprintable() else " " for c in printable(text)).split())


def did_you_mean(value: str, names: Iterable[str]) -> str:
    """` Did you mean 'name'?` for the nearest of `names`, empty when none is near; to append to a message."""
    close = difflib.get_close_matches(value, list(names), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def wording(problem: Mapping[str, Any], known: Collection[str], what: str = "key") -> str:
    """What one entry of a pydantic error says; of an unknown key, which is nearest and which are `known` there."""
    if problem["type"] == "extra_forbidden":
        return f"unknown {what}.{did_you_mean(str(problem['loc'][-1]), known)} ({', '.join(known)})"
    return str(problem["msg"]).removeprefix("Value error, ")
