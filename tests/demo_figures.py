"""What the shipped demo models score, measured once and kept in tests/golden/demo_figures.json.

    python -m tests.demo_figures    measures again (20 seconds) and writes the file

The figures of a model belong to the digest of its folder: tests fail when the weights change and the figures do not.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from exporter.data.demo.language import QUESTIONS
from exporter.model.embedded import MODELS
from tools.demo_training import score_retrieval
from tools.demo_training.blip2_packing import BLIP2
from tools.demo_training.packing import LLAVA, PromptLayout
from tools.demo_training.score import by_kind, easy_exam, scene_exam, summary

FILE = Path(__file__).parent / "golden" / "demo_figures.json"
CPU = torch.device("cpu")

Figures = dict[str, float]


def digest(name: str) -> str:
    """sha256 of the model's weights, configuration and tokenizer."""
    hasher = hashlib.sha256()
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        hasher.update((MODELS[name] / file).read_bytes())
    return hasher.hexdigest()


def figures(name: str) -> dict[str, Figures]:
    """Exam -> its recorded figures; fails when they were measured on another model than the shipped one."""
    recorded = json.loads(FILE.read_text())[name]
    assert recorded["digest"] == digest(name), f"{name} has changed: run `python -m tests.demo_figures`"
    return dict(recorded["figures"])


def load(name: str) -> Any:
    """The model in float32."""
    import transformers

    kind = json.loads((MODELS[name] / "config.json").read_text())["architectures"][0]
    return getattr(transformers, kind).from_pretrained(MODELS[name], dtype=torch.float32).eval()


def answers(model: Any, layout: PromptLayout, scenes: int = 150) -> Figures:
    """Shares of exact answers: the headlines, and the worst of the kinds of questions about scenes."""
    kinds = by_kind(model, [scene_exam("test", 0, scenes, CPU, layout), easy_exam(CPU, layout)])
    return summary(kinds) | {"worst kind": min(kinds[kind] for kind in QUESTIONS)}


def blind_answers(model: Any) -> Figures:
    """The same kinds of questions about pictures that show nothing."""
    exam = scene_exam("test", 0, 100, CPU, BLIP2)
    return by_kind(model, [replace(exam, pixels=torch.full_like(exam.pixels, 200))])


def search(model: Any, scenes: int, plain: bool = False, blank: bool = False) -> Figures:
    """Recall and matching among so many scenes."""
    exam = score_retrieval.exam("test", scenes, CPU, plain)
    shown = replace(exam, pixels=torch.full_like(exam.pixels, 200)) if blank else exam
    return score_retrieval.grade(model, shown)


EXAMS: dict[str, dict[str, Callable[[Any], Figures]]] = {
    "demo-llava": {"answers": lambda model: answers(model, LLAVA)},
    "demo-blip2": {"answers": lambda model: answers(model, BLIP2), "blind": blind_answers},
    "demo-blip2-itm": {
        "named": lambda model: search(model, 200),
        "plain": lambda model: search(model, 200, plain=True),
        "blank": lambda model: search(model, 100, blank=True),
    },
}


def main() -> None:
    """Measure everything and write the file."""
    torch.set_num_threads(1)
    measured: dict[str, Any] = {}
    for name, exams in EXAMS.items():
        model = load(name)
        measured[name] = {"digest": digest(name), "figures": {exam: run(model) for exam, run in exams.items()}}
    FILE.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
