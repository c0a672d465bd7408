"""Exact-match scores without generation: greedy decoding gives an answer iff each of its tokens is the argmax."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from exporter.data.demo import easy_vqa
from exporter.data.demo.language import QUESTIONS, caption, question
from exporter.data.demo.scenes import Split, draw, scene_objects, scenes
from tools.demo_training.packing import LLAVA, PromptLayout, Rows, mask_and_positions, normalize, pack, slot_lengths

EASY_SLOTS = 12
CHUNK = 250  # pictures in one forward pass


@dataclass(frozen=True)
class Exam:
    """Pictures uint8 `[n, 3, 64, 64]`, rows of conversations, and the kind of every slot (`""` when empty)."""

    pixels: Tensor
    rows: Rows
    lengths: tuple[int, ...]
    kinds: list[tuple[str, ...]]
    layout: PromptLayout = LLAVA


def scene_exam(split: Split, start: int, count: int, device: torch.device, layout: PromptLayout = LLAVA) -> Exam:
    """The caption and one question of every kind about scenes `start .. start+count-1` of a split."""
    batch = scenes(split, torch.arange(start, start + count))
    rows, kinds = [], []
    for i, objects in enumerate(scene_objects(batch), start):
        questions = [question(kind, objects, i) for kind in QUESTIONS]
        rows.append([(None, caption(objects)), *((q.text, q.answer) if q else None for q in questions)])
        kinds.append(("caption", *(q.kind if q else "" for q in questions)))
    lengths = slot_lengths(1, len(QUESTIONS), layout)
    return Exam(draw(batch).to(device), pack(rows, lengths, layout), lengths, kinds, layout)


def easy_exam(device: torch.device, layout: PromptLayout = LLAVA) -> Exam:
    """Every question about the embedded easy-VQA test pictures."""
    import numpy as np

    questions = [pairs[:EASY_SLOTS] for _, pairs in easy_vqa.test_questions()]
    pictures = np.stack([np.asarray(easy_vqa.test_picture(i)) for i in range(len(questions))])
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous().to(device)
    rows = [[*row, *[None] * (EASY_SLOTS - len(row))] for row in questions]
    kinds = [tuple(easy_vqa.kind(entry[1]) if entry else "" for entry in row) for row in rows]
    lengths = slot_lengths(0, EASY_SLOTS, layout)
    return Exam(pixels, pack(rows, lengths, layout), lengths, kinds, layout)


@torch.no_grad()
def grade(model: Any, exam: Exam) -> tuple[Tensor, Tensor]:
    """Correct or not, bool `[n, slots]`, and the mean negative log-likelihood per token, float32 `[n, slots]`."""
    device = exam.pixels.device
    mask, positions = mask_and_positions(exam.lengths, device, exam.layout.prefix)
    forward, dtype = exam.layout.forward(device), next(model.parameters()).dtype
    right, loss = [], []
    for start in range(0, exam.pixels.shape[0], CHUNK):
        part = slice(start, start + CHUNK)
        tokens, labels = (t[part].to(device).long() for t in (exam.rows.tokens, exam.rows.labels))
        scores = forward(model, normalize(exam.pixels[part]).to(dtype), tokens, mask, positions).float()
        is_answer = labels >= 0
        hit = (scores.argmax(-1) == labels) | ~is_answer
        nll = F.cross_entropy(scores.transpose(1, 2), labels, ignore_index=-100, reduction="none")
        ends = list(torch.tensor(exam.lengths).cumsum(0).tolist())
        spans = list(zip([0, *ends], ends, strict=False))
        right.append(torch.stack([hit[:, a:b].all(1) for a, b in spans], 1).cpu())
        counts = torch.stack([is_answer[:, a:b].sum(1) for a, b in spans], 1).clamp(min=1)
        loss.append((torch.stack([nll[:, a:b].sum(1) for a, b in spans], 1) / counts).cpu())
    return torch.cat(right), torch.cat(loss)


def by_kind(model: Any, exams: Sequence[Exam]) -> dict[str, float]:
    """Share of right answers by kind, and `caption nll`, the captions' mean negative log-likelihood per token."""
    hits: dict[str, list[float]] = {}
    for exam in exams:
        right, loss = grade(model, exam)
        for i, kinds in enumerate(exam.kinds):
            for j, kind in enumerate(kinds):
                if kind:
                    hits.setdefault(kind, []).append(float(right[i, j]))
                if kind == "caption":
                    hits.setdefault("caption nll", []).append(float(loss[i, j]))
    return {kind: sum(values) / len(values) for kind, values in hits.items()}


def summary(kinds: dict[str, float]) -> dict[str, float]:
    """The three headline figures: exact captions, scene questions (mean of kinds) and easy-VQA (mean of kinds)."""
    scene = [kinds[kind] for kind in QUESTIONS if kind in kinds]
    easy = [value for kind, value in kinds.items() if kind.startswith("easy-vqa")]
    result = {"captions": kinds["caption"], "caption nll": kinds["caption nll"], "scenes": sum(scene) / len(scene)}
    return result | ({"easy-vqa": sum(easy) / len(easy)} if easy else {})
