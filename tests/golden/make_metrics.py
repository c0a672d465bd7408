"""Writes metrics.json: what pycocoevalcap and the evaluator of the VQA challenge themselves say.

Run by hand with Java, pycocoevalcap and the file `vqa_eval.py` of salesforce-lavis 1.0.2 (the evaluator of
visualqa.org, unchanged but for its formatting): `python tests/golden/make_metrics.py PATH/vqa_eval.py`.
"""

import contextlib
import importlib.util
import io
import json
import random
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

HERE = Path(__file__).parent
ANSWERS = (  # what a model says
    "yes", "Yes.", " yes\n", "the yes", "A", "none", "two", "Two", "2", "ten dogs", "the two dogs",
    "dont know", "isn't", "ISNT", "couldnt've", "couldn'tve", "couldntve", "im", "I'm", "Im", "shes", "she's",
    "somebody'd", "lets", "wed've", "y'alldve", "yall'd've", "black-and-white", "black and white",
    "black, white", "black,white", "1,000", "1,000 - 2,000", "a t-shirt 1,000", "2.5", "2.5 mi.", "ST. LOUIS",
    "st louis", "st.louis", "new\nyork\tcity", "what?!", "o'clock", "oclock", "10:30", "10:30 am",
    "left/right", "(red)", "[red]", "red & blue", "$5", "50%", "it's", "", "?", ".", "the", "a an the", "...",
    "x" + "." * 40, "é. ü", "10,000.50", "3 . 5", "no \\ yes", "a_b", "a - b", "- b", "x@y", '"stop"',
    "'stop'", "stop;go", "zero", "nine nine", "hes", "theyre", "wheres", "ow's'at",
)  # fmt: skip
PAIRS = (  # candidate, references; split at spaces as they are
    ("a red circle", ["a red circle"]),
    ("a red circle", ["a red circle left of a blue ring", "the circle is red"]),
    ("", ["a red square", "a square"]),
    ("blue", ["blue"]),
    ("a a a a a a", ["a small ring a", "a b c"]),
    ("the dog ran far away from here today", ["red circle", "the dog ran far away from here today"]),
    ("two cats sleep on a sofa", ["two cats sleeping on the couch", "cats asleep on a sofa"]),
    ("men are riding horses", ["a man rides a horse", "people on horseback"]),
    ("a large automobile parked on the street", ["a big car is parked by the road", "car on a street"]),
    ("sofa a on sleep cats two", ["two cats sleep on a sofa"]),
    ("it does n't bark", ["the dog 's barks", "it is n't barking"]),
    ("café in 10:30", ["the café at 10:30", "a coffee shop"]),
)


CAPTIONS = (  # for the tokenizer; a rule of English each
    "Mr. Smith and Mrs. Jones.", "a sign on Main St. in town", "a sign that says Main St.", "dogs vs. cats",
    "a U.S. flag", "in the U.S.", "10 a.m. train", "apples, pears, etc.", "best. dog ever", "Mt. Hood (Oregon)",
    "a man (smiling) [left] {x}", "I cannot go", "gonna wanna gotta", "5 + 3 = 8", "a < b", "c/o x", "and/or",
    "#1 @ home", "it's 3 o'clock", "rock 'n' roll", "y'all", "don't", "dogs' tails", "the '90s", "50%", "$3.50",
    "100,000", "no. 5", "J. K. Rowling", "a T.V. set", "TV.", "wi-fi", "x-ray", "...what", "wow!!!", "what?!",
    "1/2 cup", "3:00pm", "4x4", "rest.", "lets him", "Co. name", "a-b-c", "he'd've", "A DOG\nand a cat",
)  # fmt: skip


def evaluator(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("vqa_eval", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.VQAEval


def accuracy(evaluate: Any, answer: str, votes: list[str]) -> float:
    truth = {
        "answers": [{"answer": v, "answer_id": i} for i, v in enumerate(votes)],
        "question_type": "q",
        "answer_type": "a",
    }
    vqa = SimpleNamespace(qa={1: truth}, getQuesIds=lambda: [1])
    judge = evaluate(vqa, SimpleNamespace(qa={1: {"answer": answer}}), n=10)
    with contextlib.redirect_stdout(io.StringIO()):
        judge.evaluate()
    return float(judge.accuracy["overall"]) / 100


def vqa(path: str) -> dict[str, Any]:
    evaluate = evaluator(path)
    judge = evaluate(SimpleNamespace(getQuesIds=list), None)
    words = [*ANSWERS, *judge.contractions, *judge.contractions.values()]
    normalized = {
        answer: judge.processDigitArticle(
            judge.processPunctuation(answer.replace("\n", " ").replace("\t", " ").strip())
        )
        for answer in words
    }
    rng = random.Random(3)
    cases = []
    for _ in range(400):
        answer = rng.choice(words)
        near = [
            answer,
            normalized[answer],
            normalized[answer] or "x",
            judge.processPunctuation(answer),
            rng.choice(words),
        ]
        votes = [rng.choice(near) for _ in range(10)] if rng.random() < 0.8 else [rng.choice(near)] * 10
        cases.append([answer, votes, accuracy(evaluate, answer, votes)])
    return {"normalized": normalized, "cases": cases}


def captions() -> dict[str, Any]:
    texts = {name: entry["pairs"] for name, entry in json.loads((HERE / "cider.json").read_text())["sets"].items()}
    sets = {}
    for name, pairs in {**texts, "words": PAIRS}.items():
        references = {i: list(group) for i, (_, group) in enumerate(pairs)}
        candidates = {i: [candidate] for i, (candidate, _) in enumerate(pairs)}
        bleus, each = Bleu().compute_score(references, candidates, verbose=0)
        sets[name] = {"pairs": pairs, "bleus": bleus, "bleu4": each[3]}
    return sets


def main() -> None:
    sources = f"pycocoevalcap {version('pycocoevalcap')} (Bleu, PTBTokenizer), VQAEval of salesforce-lavis 1.0.2"
    split = PTBTokenizer().tokenize({i: [{"caption": caption}] for i, caption in enumerate(CAPTIONS)})
    words = {caption: split[i][0].split() for i, caption in enumerate(CAPTIONS)}
    content = {"source": sources, "words": words, "captions": captions(), "vqa": vqa(sys.argv[1])}
    (HERE / "metrics.json").write_text(json.dumps(content, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
