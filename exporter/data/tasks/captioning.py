"""Image captioning: CIDEr-D and BLEU-4 against all references, and exact matches."""

from collections.abc import Callable, Mapping, Sequence

from exporter.data.tasks import ptb
from exporter.data.tasks.bleu import bleu, corpus_bleu
from exporter.data.tasks.cider import cider
from exporter.data.tasks.sample import Sample
from exporter.errors import DataError

NAME = "captioning"
METRICS = ("cider", "bleu", "exact")
DEFAULT = METRICS
ALONE = ("bleu", "exact")
CORPUS = ("cider", "bleu1", "bleu2", "bleu3", "bleu4")
MOVES = 3  # other samples against which `chance` scores each caption


def method() -> Mapping[str, str]:
    """Settings that scores depend on, besides answers and samples."""
    return {"tokenizer": ptb.NAME}


def score(answers: Sequence[str], samples: Sequence[Sample]) -> dict[str, list[float]]:
    """`cider` (0 to 10), `bleu` and `exact` (0 to 1) of each caption; see `exporter.data.tasks.Task`.

    CIDEr weights n-grams by their rarity among the references of `samples`, so its value depends on the set. `exact`
    is 1 if the caption's words equal those of a reference.
    """
    candidates, references = _split(answers, samples)
    return {metric: _SCORES[metric](candidates, references) for metric in METRICS}


def chance(answers: Sequence[str], samples: Sequence[Sample], metrics: Sequence[str]) -> dict[str, list[float]]:
    """Scores of the model's captions against the references of other pictures, mean over at most `MOVES` samples.

    A model that uses its pictures scores higher against its own references.
    """
    candidates, references = _split(answers, samples)
    size = len(candidates)
    steps = sorted({size * move // (MOVES + 1) for move in range(1, MOVES + 1)} - {0}) or [0]
    result = {}
    for metric in metrics:
        moved = [_SCORES[metric](candidates[step:] + candidates[:step], references) for step in steps]
        result[metric] = [sum(scores) / len(steps) for scores in zip(*moved, strict=True)]
    return result


def _exact(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    return [float(bool(c) and c in r) for c, r in zip(candidates, references, strict=True)]


_SCORES: dict[str, Callable[[Sequence[Sequence[str]], Sequence[Sequence[Sequence[str]]]], list[float]]] = {
    "cider": cider,
    "bleu": bleu,
    "exact": _exact,
}


def corpus(answers: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
    """Corpus scores of the whole set, as papers report them. Except for CIDEr, they are not means over captions."""
    candidates, references = _split(answers, samples)
    mean = sum(cider(candidates, references)) / max(1, len(candidates))
    return {"cider": mean} | {f"bleu{n}": value for n, value in enumerate(corpus_bleu(candidates, references), start=1)}


def _split(answers: Sequence[str], samples: Sequence[Sample]) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Words of every answer, and of every reference of every sample. DataError for a sample without reference."""
    bare = [sample.identity for sample in samples if not sample.references]
    if bare:
        raise DataError(f"{len(bare)} samples have no caption to compare with, first {bare[0]}")
    if len(answers) != len(samples):
        raise ValueError(f"{len(answers)} answers for {len(samples)} samples")
    split = iter(ptb.words([*answers, *(text for sample in samples for text in sample.references)]))
    candidates = [next(split) for _ in answers]
    return candidates, [[next(split) for _ in sample.references] for sample in samples]
