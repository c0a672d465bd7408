"""Differences between two texts, word by word."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher


@dataclass(frozen=True)
class Span:
    """Words of both texts at one place, joined by spaces; equal texts where nothing differs."""

    first: str
    second: str

    @property
    def differs(self) -> bool:
        """Whether the words differ."""
        return self.first != self.second


def spans(first: str, second: str) -> list[Span]:
    """Both texts cut into spans of equal and of differing words, in order."""
    words = (first.split(), second.split())
    matcher = SequenceMatcher(None, *words, autojunk=False)
    return [Span(" ".join(words[0][a:b]), " ".join(words[1][c:d])) for _, a, b, c, d in matcher.get_opcodes()]


def marked(parts: Sequence[Span], second: bool, opening: str = "[", closing: str = "]") -> str:
    """The first or second text with its differing words between marks; empty marks where only the other has words."""
    texts = [
        f"{opening}{text}{closing}" if part.differs else text
        for part in parts
        for text in (part.second if second else part.first,)
    ]
    return " ".join(texts)
