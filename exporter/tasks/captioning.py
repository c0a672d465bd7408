"""Image captioning: CIDEr-D against all references, and exact matches."""

import re
from collections.abc import Sequence

from exporter.errors import DataError
from exporter.tasks.cider import cider
from exporter.tasks.sample import Sample

NAME = "captioning"
METRICS = ("cider", "exact")

_WORD = re.compile(r"\d+(?:[.,:]\d+)+|\w+(?:[-&'/]\w+)*|[&$%#]")
_CLITIC = re.compile(r"(.+)(n't|'(?:s|re|ve|ll|d|m))")


def tokens(caption: str) -> list[str]:
    """Words of a caption, in the spirit of the Penn Treebank tokenizer that COCO's evaluation uses.

    Lower case; punctuation is dropped; hyphenated words stay whole; `don't` is `do n't` and `dog's` is `dog 's`.
    Unlike the original, abbreviations lose their periods, `cannot` stays one word and brackets leave no token.
    """
    words = _WORD.findall(caption.lower().replace("\u2019", "'"))
    return [part for word in words for part in _parts(word)]


def _parts(word: str) -> tuple[str, ...]:
    split = _CLITIC.fullmatch(word)
    return (split[1], split[2]) if split else (word,)


def score(answers: Sequence[str], samples: Sequence[Sample]) -> dict[str, list[float]]:
    """`cider` (0 to 10) and `exact` (any reference, word for word) of each caption; see `exporter.tasks.Task`.

    CIDEr weighs words by how rare they are among the references of `samples`, so its value depends on the set.
    """
    bare = [sample.identity for sample in samples if not sample.references]
    if bare:
        raise DataError(f"{len(bare)} samples have no caption to compare with, first {bare[0]}")
    candidates = [tokens(answer) for answer in answers]
    references = [[tokens(text) for text in sample.references] for sample in samples]
    exact = [float(bool(c) and c in r) for c, r in zip(candidates, references, strict=True)]
    return {"cider": cider(candidates, references), "exact": exact}
