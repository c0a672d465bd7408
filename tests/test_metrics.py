"""Metrics against what the reference programs themselves said, and against twins that a reader can believe."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from exporter.data.tasks import TASKS, captioning, ptb, vqa
from exporter.data.tasks.bleu import bleu, corpus_bleu
from exporter.data.tasks.cider import cider
from exporter.data.tasks.retrieval import RANKS, prepare, recalls
from exporter.data.tasks.sample import Sample

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "metrics.json").read_text(encoding="utf-8"))
WORDS = ["a", "red", "large", "circle", "is", "left", "of", "the", "small", "blue", "square"]

captions = st.lists(st.sampled_from(WORDS), max_size=12)
groups = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12), min_size=1, max_size=4)


# What the tokenizer in Python is known to do otherwise; docs/explanation/evaluation.md lists it.
OTHERWISE = {"rock 'n' roll", "y'all", "the '90s", "no. 5", "J. K. Rowling", "Co. name", "he'd've"}


@pytest.mark.parametrize("caption", GOLDEN["words"])
def test_words_are_those_of_the_original_but_for_known_exceptions(caption: str) -> None:
    assert (ptb.tokens(caption) == GOLDEN["words"][caption]) == (caption not in OTHERWISE)


def split(name: str) -> tuple[list[list[str]], list[list[list[str]]]]:
    pairs = GOLDEN["captions"][name]["pairs"]
    return [c.split() for c, _ in pairs], [[text.split() for text in group] for _, group in pairs]


@pytest.mark.parametrize("name", GOLDEN["captions"])
def test_bleu_is_that_of_pycocoevalcap(name: str) -> None:
    candidates, references = split(name)
    golden = GOLDEN["captions"][name]
    assert bleu(candidates, references) == pytest.approx(golden["bleu4"], rel=1e-12, abs=1e-15)
    assert corpus_bleu(candidates, references) == pytest.approx(golden["bleus"], rel=1e-12, abs=1e-15)


def test_a_set_without_captions_scores_nothing() -> None:
    assert corpus_bleu([], []) == (0.0, 0.0, 0.0, 0.0)
    assert bleu([], []) == cider([], []) == []


@given(candidate=captions, references=groups)
def test_bleu_of_one_caption_is_that_of_a_set_of_one(candidate: list[str], references: list[list[str]]) -> None:
    score = bleu([candidate], [references])[0]
    assert score == corpus_bleu([candidate], [references])[3]
    assert 0 <= score <= 1
    assert bleu([candidate], [[*references, candidate]])[0] >= score * (1 - 1e-9) or len(candidate) == 0
    assert score == bleu([candidate], [references[::-1]])[0]


@given(references=st.lists(st.lists(st.sampled_from(WORDS), min_size=4, max_size=9), min_size=2, max_size=5))
def test_a_caption_is_worth_most_among_its_own_references(references: list[list[str]]) -> None:
    assert bleu(references, [[r] for r in references]) == pytest.approx([1.0] * len(references), abs=1e-6)
    scores = cider(references, [[r] for r in references])
    for wrong in cider(references[1:] + references[:1], [[r] for r in references]):
        assert 0 <= wrong <= 10 + 1e-9
    assert all(0 <= score <= 10 + 1e-9 for score in scores)


@pytest.mark.parametrize(("answer", "expected"), GOLDEN["vqa"]["normalized"].items())
def test_answers_are_normalized_as_by_the_evaluator(answer: str, expected: str) -> None:
    assert vqa.normalize(answer) == expected


def test_accuracy_is_that_of_the_evaluator() -> None:
    cases = GOLDEN["vqa"]["cases"]
    assert len(cases) == 400
    with_words = [case for case in cases if vqa.normalize(case[0])]
    assert [vqa.accuracy(a, votes) for a, votes, _ in with_words] == pytest.approx(
        [score for *_, score in with_words], abs=1e-9
    )
    assert len({score for *_, score in with_words}) > 4
    # An answer without content is ours to call wrong: the evaluator lets it match an empty vote.
    assert {vqa.accuracy(a, votes) for a, votes, _ in cases if not vqa.normalize(a)} == {0.0}


@given(st.text(alphabet="abt .,'!?-/1230\n", max_size=20))
def test_punctuation_alone_never_makes_two_answers_of_one(text: str) -> None:
    once = vqa.normalize(text)
    assert once == " ".join(once.split())
    assert not {"a", "an", "the"} & set(once.split())
    assert vqa.accuracy(text, [text]) == float(bool(once))


@given(st.integers(0, 10), st.permutations(range(10)))
def test_votes_have_no_order(right: int, order: list[int]) -> None:
    votes = ["yes"] * right + [f"no {i}" for i in range(10 - right)]
    assert vqa.accuracy("yes", [votes[i] for i in order]) == pytest.approx(min(1.0, right * 0.3) if right < 4 else 1.0)


def sample(*references: str, kind: str = "") -> Sample:
    return Sample("x", lambda: Image.new("RGB", (2, 2)), None, references, kind)


def test_figures_of_a_set_by_kind() -> None:
    samples = [sample("yes", kind="verify"), sample("no", kind="verify"), sample("dog", kind="query")]
    figures = TASKS["vqa"].corpus(["yes", "yes", "dog"], samples)
    assert figures == {"accuracy": pytest.approx(2 / 3), "accuracy verify": 0.5, "accuracy query": 1.0}


def test_figures_of_a_set_of_captions() -> None:
    samples = [sample("a red circle on the left"), sample("two blue rings", "blue rings in the center")]
    answers = ["a red circle on the right", "two blue rings"]
    figures = TASKS["captioning"].corpus(answers, samples)
    scores = TASKS["captioning"].score(answers, samples)
    assert figures["cider"] == pytest.approx(sum(scores["cider"]) / 2)
    words = [[a.split() for a in answers], [[r.split() for r in s.references] for s in samples]]
    assert tuple(figures[f"bleu{n}"] for n in (1, 2, 3, 4)) == pytest.approx(corpus_bleu(*words))
    assert tuple(scores) == captioning.METRICS == ("cider", "bleu", "exact")
    assert captioning.method() == {"tokenizer": "Penn Treebank (Python)"}


# Retrieval.


def slow_ranks(similarity: list[list[float]], owners: list[int]) -> tuple[list[int], list[int]]:
    """How many wrong texts stand before each picture's best own one, and wrong pictures before each text's own."""
    by_picture = []
    for picture, row in enumerate(similarity):
        best = max(value for value, owner in zip(row, owners, strict=True) if owner == picture)
        by_picture.append(sum(value >= best for value, owner in zip(row, owners, strict=True) if owner != picture))
    by_text = []
    for text, owner in enumerate(owners):
        column = [row[text] for row in similarity]
        by_text.append(sum(value >= column[owner] for picture, value in enumerate(column) if picture != owner))
    return by_picture, by_text


@settings(max_examples=60)
@given(data=st.data())
def test_recall_with_ties_against_counting(data: st.DataObject) -> None:
    pictures = data.draw(st.integers(1, 14))
    extra = data.draw(st.lists(st.integers(0, pictures - 1), max_size=14))
    owners = data.draw(st.permutations([*range(pictures), *extra]))
    values = st.integers(-3, 3).map(float)  # few values, many ties
    matrix = [[data.draw(values) for _ in owners] for _ in range(pictures)]
    actual = recalls(torch.tensor(matrix), owners)
    by_picture, by_text = slow_ranks(matrix, owners)
    for k in RANKS:
        assert actual[f"text_r{k}"] == [float(rank < k) for rank in by_picture]
        assert actual[f"image_r{k}"] == [float(rank < k) for rank in by_text]


def test_recall_without_ties_is_that_of_sorting() -> None:
    generator = torch.Generator().manual_seed(5)
    similarity, owners = torch.randn(40, 200, generator=generator), [i // 5 for i in range(200)]
    similarity += 1.5 * (torch.tensor(owners)[None] == torch.arange(40)[:, None])
    actual = recalls(similarity, owners)
    for k in RANKS:
        first = similarity.argsort(dim=1, descending=True)[:, :k]
        assert actual[f"text_r{k}"] == [float(any(owners[t] == i for t in row)) for i, row in enumerate(first.tolist())]
        first = similarity.argsort(dim=0, descending=True)[:k].T
        assert actual[f"image_r{k}"] == [float(owners[t] in row) for t, row in enumerate(first.tolist())]
    means = [sum(actual[f"text_r{k}"]) / 40 for k in RANKS]
    assert 0 < means[0] < means[1] < means[2] <= 1


def test_scores_that_are_all_the_same_recall_nothing() -> None:
    actual = recalls(torch.ones(20, 100), [i // 5 for i in range(100)])
    assert all(sum(values) == 0 for values in actual.values())
    lowest = torch.full((2, 2), -math.inf)
    assert recalls(lowest.fill_diagonal_(0), [0, 1])["text_r1"] == [1.0, 1.0]


@pytest.mark.parametrize("owners", [[0, 1], [0, 0, 0], [0, 1, 2], [0, 1, -1]])
def test_a_matrix_that_does_not_fit_is_refused(owners: list[int]) -> None:
    with pytest.raises(ValueError, match="each with at least one text"):
        recalls(torch.zeros(2, 3), owners)
    with pytest.raises(ValueError, match="contain NaN"):
        recalls(torch.tensor([[math.nan]]), [0])


def test_captions_are_prepared_for_retrieval() -> None:
    assert prepare('  A man (smiling) says: "Hi!"  ') == "a man smiling says hi"
    assert prepare("it's a well-known dog, isn't it?") == "it's a well-known dog, isn't it?"
    assert len(prepare("word " * 80).split()) == 50
