"""Error classes for all problems that a user can cause, with their exit codes, and helpers for messages."""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

EXIT_CODES: dict[int, tuple[str, str, str]] = {  # code -> short name, meaning, what to do
    0: ("success", "success", ""),
    1: (
        "error",
        "an error in a recipe, data, checkpoint, file or server",
        "read the message and its hint; with `--json` the object has `error`, `hint`, `kind` and `exit`",
    ),
    2: (
        "wrong usage",
        "wrong usage of the command line, or a data source that does not exist",
        "`mmq COMMAND --help`; `mmq datasets` describes the sources",
    ),
    3: (
        "a gate or the check failed",
        "a gate failed (the whole interval of the loss is beyond its limit), `mmq check` failed, or the allocation of "
        "`mmq allocate` loses more than allowed",
        "the artifact is written and its report states the loss; `mmq publish` refuses it",
    ),
    4: (
        "out of memory",
        "out of memory",
        "the message names the step and the option that reduces its memory; finished work is kept",
    ),
    5: (
        "a gate is not decided",
        "no gate failed, but one is not decided: not resolved (the interval contains the limit), not measured, or not "
        "comparable (the full-precision model scores 0 or at chance level)",
        "the artifact is written; the message names the `--eval-samples` that would decide it, or asks for other data",
    ),
    130: (
        "interrupted",
        "interrupted (Ctrl-C, SIGTERM)",
        "run the same command again: it continues from finished work",
    ),
}


class MmqError(Exception):
    """A problem that the user can fix. message: what is wrong, and where. hint: what to do next."""

    exit_code = 1
    label = "Error"  # printed before the message

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(printable(message))
        self.message = printable(message)
        self.hint = None if hint is None else printable(hint)


class RecipeError(MmqError):
    """The recipe has an unknown key, an unknown name or an invalid value."""


class PlanError(MmqError):
    """The recipe does not fit the checkpoint or the device."""


class CheckpointError(MmqError):
    """A source checkpoint is missing, truncated or damaged."""


class DataError(MmqError):
    """Calibration or evaluation data is missing or unreadable, or the two overlap.

    problems: one text for each unusable row, with file and line; empty for other errors.
    """

    problems: tuple[str, ...] = ()


class SourceError(DataError):
    """A data source has an unknown name, does not exist or is empty."""

    exit_code = 2


class CalibrationError(MmqError):
    """Calibration or quantization produced invalid numbers, such as NaN."""


class WorkdirError(MmqError):
    """A work folder belongs to another job or contains a damaged unit."""


class LockedError(MmqError):
    """Another process writes to the same folder."""


class ArtifactError(MmqError):
    """An artifact cannot be written or read, or differs from its plan."""


class ServeError(MmqError):
    """vLLM is missing, cannot serve the artifact, does not start, or does not answer."""


class CheckFailed(MmqError):
    """vLLM's answers differ from those of the reference."""

    exit_code = 3


class HubError(MmqError):
    """The model hub refuses a request, fails, or is unreachable."""


class HubMissing(HubError):
    """The repository or revision does not exist, or the token has no access to it."""


class HubUnreachable(HubError):
    """There is no connection to the model hub, or HF_HUB_OFFLINE forbids one."""


class PublishError(MmqError):
    """The artifact or the target repository does not meet the conditions for publishing."""


class MemoryShortage(MmqError):
    """A step ran out of memory; results of earlier steps are kept."""

    exit_code = 4


class GateFailed(MmqError):
    """The artifact's loss exceeds a gate of the recipe."""

    exit_code = 3


class GateNotResolved(MmqError):
    """No gate failed, but one is not decided.

    The samples are too few or of other tasks, or the full-precision model scores 0 or at chance level.
    """

    exit_code = 5
    label = "Not decided"


class Interrupted(MmqError):
    """The user stopped the job; the work folder can be resumed."""

    exit_code = 130
    label = "Interrupted"


def printable(text: str) -> str:
    """`text` with control characters and lone surrogates escaped, and words of 500 or more characters shortened.

    Messages contain names from files, which can hold any bytes.
    """
    encodable = text.encode("utf-8", "backslashreplace").decode()
    escaped = "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in encodable)
    return re.sub(r"\S{500,}", lambda word: f"{word[0][:200]}...{word[0][-50:]}", escaped)


def one_line(text: str) -> str:
    """`text` on one line: line breaks and control characters become spaces, and runs of spaces one space."""
    return " ".join("".join(c if c.isprintable() else " " for c in printable(text)).split())


def did_you_mean(value: str, names: Iterable[str]) -> str:
    """` Did you mean 'name'?` with the closest of `names`, to append to a message; empty if none is close."""
    close = difflib.get_close_matches(value, list(names), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def validation_message(problem: Mapping[str, Any], known_names: Collection[str], noun: str = "key") -> str:
    """Message for one entry of a pydantic error; for an unknown key it lists `known_names` and the closest one.

    noun: the kind of the unknown name, such as `key`.
    """
    if problem["type"] == "extra_forbidden":
        return f"unknown {noun}.{did_you_mean(str(problem['loc'][-1]), known_names)} ({', '.join(known_names)})"
    return str(problem["msg"]).removeprefix("Value error, ")
