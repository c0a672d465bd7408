"""METEOR 1.5 (Denkowski and Lavie, 2014): words matched exactly, by stem, by synonym and by paraphrase.

Its matches come from WordNet and from a table of paraphrases that only the original carries, so the original is what
runs: the Java archive inside pycocoevalcap (an extra), with COCO's arguments. The value of a set is not the mean of its
captions' values.
"""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from exporter.errors import DataError
from exporter.tasks.java import HINT, archive, failed

ARCHIVE = "meteor/meteor-1.5.jar"
MEMORY = "2G"

Words = Sequence[str]


def available() -> bool:
    """Whether Java and the archive are there."""
    return archive(ARCHIVE) is not None


def meteor(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> tuple[list[float], float]:
    """The score of each caption, and that of the set, 0 to 1. references: at least one a candidate.

    A caption without words scores 0. DataError when Java or pycocoevalcap is missing or fails.
    """
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidates, {len(references)} groups of references")
    if not candidates:
        return [], 0.0
    with _running() as (ask, answers):
        statistics = []
        for words, group in zip(candidates, references, strict=True):
            texts = [_clean(reference) for reference in group] + [_clean(words)]
            _say(ask, " ||| ".join(["SCORE", *texts]))
            statistics.append(_line(answers))
        _say(ask, " ||| ".join(["EVAL", *statistics]))
        scores = [_number(answers) for _ in candidates]
        return [s if words else 0.0 for s, words in zip(scores, candidates, strict=True)], _number(answers)


@contextmanager
def _running() -> Iterator[tuple[IO[str], IO[str]]]:
    """The program, waiting for lines; ended when the block ends."""
    jar = archive(ARCHIVE)
    if jar is None:
        raise DataError("METEOR needs Java and the package pycocoevalcap", HINT)
    command = ["java", "-jar", f"-Xmx{MEMORY}", jar.name, "-", "-", "-stdio", "-l", "en", "-norm"]
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    try:
        with subprocess.Popen(
            command, cwd=jar.parent, encoding="utf-8", stdin=pipe, stdout=pipe, stderr=nowhere
        ) as program:
            assert program.stdin is not None
            assert program.stdout is not None
            try:
                yield program.stdin, program.stdout
            finally:
                program.kill()
    except BrokenPipeError:  # writing to it, or closing what was never read
        raise failed("METEOR", "it ended early") from None


def _clean(words: Words) -> str:
    """`|||` parts the fields of a line, so no word may hold it."""
    return " ".join(words).replace("|||", "")


def _say(ask: IO[str], line: str) -> None:
    ask.write(line + "\n")
    ask.flush()


def _line(answers: IO[str]) -> str:
    line = answers.readline().strip()
    if not line:
        raise failed("METEOR", "it ended early")
    return line


def _number(answers: IO[str]) -> float:
    line = _line(answers)
    try:
        return float(line)
    except ValueError:
        raise failed("METEOR", f"it said '{line[:80]}' instead of a score") from None
