"""Penn Treebank tokenizer for captions, as in COCO's evaluation: lower case, no punctuation.

COCO's evaluation runs Stanford CoreNLP 3.4.1, a Java program; this file implements its rules for captions in Python.
`docs/explanation/evaluation.md` reports how often the two differ.
"""

import re
from collections.abc import Sequence

NAME = "Penn Treebank (Python)"

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


def words(captions: Sequence[str]) -> list[list[str]]:
    """The words of every caption."""
    return [tokens(caption) for caption in captions]


def tokens(caption: str) -> list[str]:
    """The words of a caption.

    Lower case; punctuation is dropped; hyphenated words stay whole; `don't` becomes `do n't` and `dog's` `dog 's`.
    Brackets become `-lrb-` etc., which COCO's evaluation intends to drop but does not. Unlike CoreNLP, rare
    abbreviations lose their periods, and file names and URLs are split.
    """
    matches = _WORD.findall(caption.lower().replace("\u2019", "'"))
    return [part for word in matches for part in _parts(word)]


def _parts(word: str) -> tuple[str, ...]:
    if word in _SIGNS or word in _PARTED:
        return _PARTED.get(word) or (_SIGNS[word],)
    split = _CLITIC.fullmatch(word)
    return (split[1], split[2]) if split else (word,)
