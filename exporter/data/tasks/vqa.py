"""Visual question answering, scored as on VQAv2; for documents and charts also by ANLS and relaxed accuracy.

Normalization and consensus follow the evaluation page of the VQA challenge (Antol et al., arXiv 1505.00468;
visualqa.org/evaluation.html). Case, punctuation, articles, number words and missing apostrophes are ignored. The
accuracy against ten people's answers is min(1, matches / 3), averaged over leaving each person out.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from exporter.data.tasks.anls import REMEMBERED, anls
from exporter.data.tasks.relaxed import relaxed_accuracy
from exporter.data.tasks.sample import Sample
from exporter.errors import DataError

NAME = "vqa"
METRICS = ("anls", "relaxed_accuracy", "accuracy")
DEFAULT = ("accuracy",)
ALONE = METRICS
CORPUS = METRICS

PEOPLE = 10  # exactly ten references are votes; any other number is a list of accepted answers
AGREEING = 3  # matching votes for full accuracy
FREQUENT = 5  # most frequent answers tried as the constant answer of `chance`

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")  # 2.5 keeps its point
_DIGIT_COMMA = re.compile(r"\d,\d")
_ARTICLES = {"a", "an", "the"}
_COUNTS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(n) for n, word in enumerate(_COUNTS.split())}
# Contractions that people write without an apostrophe, as listed in the evaluator. "I'm" is left out: the evaluator's
# entry has a capital letter, but it compares lower case, so the entry never matches.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_APOSTROPHES = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS.split() for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # the evaluator maps this word in the wrong direction
_MOST_PERIODS = 32  # the evaluator passes a regex flag of this value as the count


@lru_cache(maxsize=REMEMBERED)
def normalize(answer: str) -> str:
    """Normalize an answer for comparison, e.g. `The two dogs.` -> `2 dogs`."""
    line = answer.replace("\n", " ").replace("\t", " ").strip()
    words = [_NUMBERS.get(word, word) for word in _strip_punctuation(line).lower().split()]
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def _strip_punctuation(text: str) -> str:
    """Remove marks beside a space, or all marks if a number contains a comma; other marks become a space."""
    number = bool(_DIGIT_COMMA.search(text))
    result = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if number or beside_space else " ")
    return _PERIOD.sub("", result, count=_MOST_PERIODS)


def accuracy(answer: str, references: Sequence[str]) -> float:
    """Accuracy of `answer`, 0 to 1.

    Ten references are ten people's votes, counted as in the challenge's evaluator: it normalizes the answer, but only
    strips punctuation from the votes, and only if they are not all equal. VQAv2's votes are already in lower case. Any
    other number of references is a list of accepted answers, normalized like the answer: one match gives 1.
    """
    normalized = normalize(answer)
    if not normalized:
        return 0.0
    if len(references) != PEOPLE:
        return float(any(normalize(reference) == normalized for reference in references))
    agreed = len(set(references)) == 1
    matches = [(vote if agreed else _strip_punctuation(vote)) == normalized for vote in references]
    return sum(min(1.0, (sum(matches) - own) / AGREEING) for own in matches) / PEOPLE


def score(answers: Sequence[str], samples: Sequence[Sample]) -> dict[str, list[float]]:
    """`accuracy`, `anls` and `relaxed_accuracy` of each answer; see `exporter.data.tasks.Task`."""
    bare = [sample.identity for sample in samples if not sample.references]
    if bare:
        raise DataError(f"{len(bare)} samples have no answer to compare with, first {bare[0]}")
    pairs = [(answer, sample.references) for answer, sample in zip(answers, samples, strict=True)]
    return {metric: [_SCORES[metric](*pair) for pair in pairs] for metric in METRICS}


def chance(answers: Sequence[str], samples: Sequence[Sample], metrics: Sequence[str]) -> dict[str, list[float]]:
    """Scores of the best constant answer, selected for each metric from the most frequent references of the samples."""
    counts = Counter(answer for sample in samples for answer in {normalize(text) for text in sample.references})
    frequent = [answer for answer, _ in counts.most_common(FREQUENT) if answer]

    def best(metric: str) -> list[float]:
        constant = [[_SCORES[metric](answer, sample.references) for sample in samples] for answer in frequent]
        return max(constant, key=sum, default=[0.0] * len(samples))

    return {metric: best(metric) for metric in metrics}


_SCORES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
    "accuracy": accuracy,
}


def corpus(answers: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
    """`accuracy` and the metrics of the samples over all samples, and by kind as `accuracy KIND`."""
    scores = score(answers, samples)
    named = {*DEFAULT, *(metric for sample in samples for metric in sample.metrics)}
    groups: dict[str, list[float]] = {}
    for metric in (metric for metric in METRICS if metric in named):
        groups[metric] = scores[metric]
        for value, sample in zip(scores[metric], samples, strict=True):
            if sample.kind:
                groups.setdefault(f"{metric} {sample.kind}", []).append(value)
    return {name: sum(values) / max(1, len(values)) for name, values in groups.items()}


def method() -> Mapping[str, str]:
    """Settings that scores depend on, besides answers and samples."""
    return {"normalization": "VQAEval"}
