"""Scores against published implementations and against cases worked by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from exporter.data.tasks import TASKS
from exporter.data.tasks.cider import cider
from exporter.data.tasks.ptb import tokens
from exporter.data.tasks.sample import Sample
from exporter.data.tasks.vqa import accuracy, normalize
from exporter.errors import DataError

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "cider.json").read_text(encoding="utf-8"))


def sample(*references: str, identity: str = "x") -> Sample:
    return Sample(identity, lambda: Image.new("RGB", (2, 2)), None, references)


@pytest.mark.parametrize("name", GOLDEN["sets"])
def test_cider_is_that_of_pycocoevalcap(name: str) -> None:
    golden = GOLDEN["sets"][name]
    candidates = [candidate.split() for candidate, _ in golden["pairs"]]
    references = [[text.split() for text in group] for _, group in golden["pairs"]]
    scores = cider(candidates, references)
    assert scores == pytest.approx(golden["scores"], abs=1e-9)
    assert sum(scores) / len(scores) == pytest.approx(golden["mean"], abs=1e-9)


@pytest.mark.parametrize(("caption", "expected"), GOLDEN["tokens"].items())
def test_words_are_those_of_the_penn_treebank_tokenizer(caption: str, expected: list[str]) -> None:
    assert tokens(caption) == expected


def test_captions_of_a_set_are_scored_together() -> None:
    samples = [sample("A red circle."), sample("two blue rings", "blue rings"), sample("a cat")]
    scores = TASKS["captioning"].score(["a red circle", "Blue rings!", "a dog"], samples)
    assert scores["exact"] == [1.0, 1.0, 0.0]
    assert scores["cider"][0] == pytest.approx(7.5)  # equal, but three words have no 4-gram
    assert 0 < scores["cider"][1] < scores["cider"][0]
    assert TASKS["captioning"].score(["", "?"], [sample("!"), sample("?")])["exact"] == [0.0, 0.0]  # no words at all
    alone = TASKS["captioning"].score(["a red circle"], samples[:1])
    assert alone["cider"] == [0.0]  # every word is in every document


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The two dogs.", "2 dogs"),
        ("  Yes ", "yes"),
        ("none", "0"),
        ("A", ""),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("its were", "its were"),  # words of their own
        ("black-and-white", "black and white"),  # between letters: two words
        ("black, white", "black white"),  # beside a space: gone
        ("1,000 - 2,000", "1000 2000"),
        ("a t-shirt 1,000", "tshirt 1000"),  # once a number has a comma, every mark just goes
        ("2.5 mi.", "2.5 mi"),
        ("ST. LOUIS", "st louis"),
        ("new\nyork\tcity", "new york city"),
        ("what?!", "what"),
    ],
)
def test_normalization(answer: str, expected: str) -> None:
    assert normalize(answer) == expected


@pytest.mark.parametrize(
    ("right", "expected"),
    # A vote of `right` among ten: leaving out one of them, right - 1 agree; leaving out another, right agree.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)],
)
def test_ten_references_are_a_vote(right: int, expected: float) -> None:
    votes = ["red"] * right + [f"other {i}" for i in range(10 - right)]
    assert accuracy("red.", votes) == pytest.approx(expected)


def test_other_numbers_of_references_are_alternatives() -> None:
    assert accuracy("Couch", ["sofa", "the couch"]) == 1.0
    assert accuracy("chair", ["sofa", "the couch"]) == 0.0
    assert accuracy("two", ["2"]) == 1.0


def test_an_answer_without_content_is_wrong_even_beside_an_empty_reference() -> None:
    assert accuracy("the", ["a"]) == 0.0


@pytest.mark.parametrize("name", TASKS)
def test_perfect_answers_score_full_and_empty_answers_score_nothing(name: str) -> None:
    task = TASKS[name]
    samples = [sample(f"one two three four five number{i}") for i in range(6)]
    perfect = task.score(["1 | 1" if name == "retrieval" else s.references[0] for s in samples], samples)
    empty = task.score([""] * 6, samples)
    assert name == task.NAME
    assert tuple(perfect) == task.METRICS
    assert perfect[task.METRICS[0]] == pytest.approx([10.0 if name == "captioning" else 1.0] * 6)
    assert all(scores == [0.0] * 6 for scores in empty.values())


@pytest.mark.parametrize("name", TASKS)
def test_wrong_input_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"1 samples have no .* first b"):
        TASKS[name].score(["x", "y"], [sample("x", identity="a"), sample(identity="b")])
    with pytest.raises(ValueError, match=r"shorter|longer|1 answers for 2 samples"):
        TASKS[name].score(["x"], [sample("x"), sample("y")])
