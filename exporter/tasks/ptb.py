"""Words of captions, as COCO's evaluation splits them: the Penn Treebank tokenizer, lower case, no punctuation.

With Java and pycocoevalcap the original (Stanford CoreNLP 3.4.1) does it, else the rules below. `docs/evaluation.md`
says how often they differ.
"""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from exporter.tasks.java import archive, failed

ARCHIVE = "tokenizer/stanford-corenlp-3.4.1.jar"
_BRACKETS = ("-LRB-", "-RRB-", "-LCB-", "-RCB-")
DROPPED = frozenset((*_BRACKETS, "''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
JAVA, PYTHON = "Penn Treebank (Java)", "Penn Treebank (Python)"

_SHORT = "mr|mrs|ms|dr|st|mt|jr|sr|vs|etc|inc|ltd|corp"  # abbreviations that keep their period
_WORD = re.compile(
    "|".join(
        (
            r"(?:\b[a-z]\.){2,}",  # u.s.
            rf"\b(?:{_SHORT})\.",
            r"\d+(?:[.,:]\d+)+",  # 10:30
            r"\w+(?:[-&'/]\w+)*",  # t-shirt
            r"[!?]{2,}",
            r"[&$%#<>=+*@^~|/\\()\[\]{}]",
        )
    )
)
_SIGNS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_PARTED = {"cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"), "wanna": ("wan", "na")}
_CLITIC = re.compile(r"(.+)(n't|'(?:s|re|ve|ll|d|m))")


def name() -> str:
    """Which tokenizer `words` uses on this machine."""
    return JAVA if archive(ARCHIVE) else PYTHON


def words(captions: Sequence[str]) -> list[list[str]]:
    """The words of every caption, by the original when it is there. DataError when Java fails."""
    original = archive(ARCHIVE)
    return _by_java(captions, original) if original and captions else [tokens(caption) for caption in captions]


def tokens(caption: str) -> list[str]:
    """The words of a caption, in Python.

    Lower case; punctuation is dropped; hyphenated words stay whole; `don't` is `do n't` and `dog's` is `dog 's`.
    Brackets become `-lrb-` and the like, which COCO's evaluation means to drop but does not. Unlike the original,
    rare abbreviations lose their periods, and names of files and addresses of the web fall apart.
    """
    found = _WORD.findall(caption.lower().replace("\u2019", "'"))
    return [part for word in found for part in _parts(word)]


def _parts(word: str) -> tuple[str, ...]:
    if word in _SIGNS or word in _PARTED:
        return _PARTED.get(word) or (_SIGNS[word],)
    split = _CLITIC.fullmatch(word)
    return (split[1], split[2]) if split else (word,)


def _by_java(captions: Sequence[str], original: Path) -> list[list[str]]:
    """One run of the original over a file with a caption a line."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "captions.txt"
        file.write_text("".join(" ".join(caption.split()) + "\n" for caption in captions), encoding="utf-8")
        main = "edu.stanford.nlp.process.PTBTokenizer"
        command = ["java", "-cp", str(original), main, "-preserveLines", "-lowerCase", str(file)]
        done = subprocess.run(command, capture_output=True, check=False)
    lines = done.stdout.decode("utf-8", "replace").removesuffix("\n").split("\n")
    if done.returncode or len(lines) != len(captions):
        why = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["no message"]
        raise failed("the tokenizer", f"exit code {done.returncode}, {len(lines)} of {len(captions)} lines, {why[0]}")
    return [[word for word in line.split() if word not in DROPPED] for line in lines]
