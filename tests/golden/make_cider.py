"""Writes cider.json: what pycocoevalcap itself says about some sentences.

Run by hand where pycocoevalcap and Java are installed: `python tests/golden/make_cider.py`.
"""

import json
import random
from importlib.metadata import version
from pathlib import Path

from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

WORDS = "a red large circle is left of the small blue square and two green rings near top center"
CRAFTED = (  # candidate, references
    ("a red circle", ["a red circle"]),
    ("", ["a red square", "a square"]),
    ("blue", ["blue"]),
    ("a a a a a a", ["a small ring a", "a b c"]),
    ("the dog ran far away from here today", ["red circle", "the dog ran far away from here today"]),
    ("two cats sleep on a sofa", ["two cats sleep on a sofa", "cats asleep"]),
)
CAPTIONS = (
    "A man's dog doesn't bark.",
    "Two black-and-white cats, sleeping on a sofa!",
    'The people\'s T-shirts say "STOP" in red.',
    "A sign that reads 10:30 AM; it's 3,000 feet high.",
    "There are 2.5 pizzas - one is eaten...",
    "We'll see; they're here, I'm not & you've gone",
    "a small red circle is left of a large blue square .",
    "An image of a train -- and its tracks?",
    "a plate of food: rice, beans/peas",
    "the man can't won't shouldn't",
    "a street sign that says 'main st'",
    "a $5 bill & 50% off on aisle #1",
    "a half-eaten sandwich on a white plate,next to a cup",
    "fire hydrant\u2019s cap isn\u2019t on",
)


def sentence(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS.split()) for _ in range(rng.randint(low, high)))


def changed(rng: random.Random, text: str) -> str:
    words = text.split()
    for _ in range(rng.randint(0, 3)):
        words[rng.randrange(len(words))] = rng.choice(WORDS.split())
    if rng.random() < 0.3:
        words = words[: rng.randint(0, len(words))]
    return " ".join(words * 2 if rng.random() < 0.2 else words)


def random_set(rng: random.Random, images: int, low: int, high: int) -> list[tuple[str, list[str]]]:
    groups = [[sentence(rng, low, high) for _ in range(rng.randint(1, 5))] for _ in range(images)]
    return [
        (changed(rng, rng.choice(group)) if rng.random() < 0.8 else sentence(rng, 0, high), group) for group in groups
    ]


def scored(pairs: list[tuple[str, list[str]]]) -> dict[str, object]:
    references = {i: group for i, (_, group) in enumerate(pairs)}
    mean, scores = Cider().compute_score(references, {i: [candidate] for i, (candidate, _) in enumerate(pairs)})
    return {"pairs": pairs, "scores": [float(score) for score in scores], "mean": float(mean)}


def main() -> None:
    rng = random.Random(7)
    sets = {"crafted": CRAFTED, "one image": CRAFTED[:1]}
    sets |= {"short": random_set(rng, 12, 1, 12), "long": random_set(rng, 40, 4, 20)}
    split = PTBTokenizer().tokenize({i: [{"caption": caption}] for i, caption in enumerate(CAPTIONS)})
    content = {
        "source": f"pycocoevalcap {version('pycocoevalcap')}: Cider on sentences split at spaces, and PTBTokenizer",
        "sets": {name: scored(list(pairs)) for name, pairs in sets.items()},
        "tokens": {caption: split[i][0].split() for i, caption in enumerate(CAPTIONS)},
    }
    Path(__file__).with_name("cider.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
