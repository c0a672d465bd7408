"""Train the LLaVA and BLIP-2 demo models on captions and questions about scenes and on easy-VQA."""

import argparse
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from exporter.data.demo.language import Dice, caption, question
from exporter.data.demo.scenes import draw, scene_objects, scenes
from exporter.errors import DataError
from tools.demo_training.packing import PromptLayout, Rows, mask_and_positions, normalize, pack, slot_lengths
from tools.demo_training.score import by_kind, easy_exam, scene_exam, summary
from tools.demo_training.train_loop import Training

ALWAYS = ("color", "shape", "size", "dot", "place", "find", "name")  # kinds of questions about every training scene
SOMETIMES = ("exists", "exists", "count")  # one of these per scene
QUESTIONS_PER_ROW = len(ALWAYS) + 1
EASY_SHARE = 0.12  # of a batch
QUESTION_WEIGHT = 1.5  # loss weight of a question's token relative to a caption's
CHUNK = 4000  # scenes drawn or tokenized at once


def easy_questions() -> tuple[list[Path], list[list[tuple[str, str]]]]:
    """Pictures of easy-VQA's train split, and the questions with answers about each (DataError without the package)."""
    try:
        import easy_vqa
    except ImportError as error:
        raise DataError("training reads the package easy-vqa", "pip install easy-vqa") from error
    questions, answers, images = easy_vqa.get_train_questions()
    by_image: dict[int, list[tuple[str, str]]] = {}
    for text, answer, image in zip(questions, answers, images, strict=True):
        by_image.setdefault(image, []).append((text, answer))
    paths = easy_vqa.get_train_image_paths()
    return [Path(paths[image]) for image in sorted(by_image)], [by_image[image] for image in sorted(by_image)]


@dataclass(frozen=True)
class Data:
    """Training data on the device. pixels: uint8; easy_picture: int64, index of each easy row's picture."""

    pixels: Tensor
    easy_pixels: Tensor
    easy_picture: Tensor
    rows: Rows
    easy_rows: Rows


def _pack_scenes(start: int, layout: PromptLayout) -> Rows:
    torch.set_num_threads(1)
    rows: list[list[tuple[str | None, str] | None]] = []
    for i, objects in enumerate(scene_objects(scenes("train", torch.arange(start, start + CHUNK))), start):
        kinds = (*ALWAYS, Dice(i).pick(SOMETIMES))
        questions = [question(kind, objects, i) for kind in kinds]
        rows.append([(None, caption(objects)), *((q.text, q.answer) if q else None for q in questions)])
    return pack(rows, slot_lengths(1, QUESTIONS_PER_ROW, layout), layout)


def _easy_rows(questions: list[list[tuple[str, str]]], layout: PromptLayout) -> tuple[Rows, Tensor]:
    """Rows of at most eight questions, and the number of the picture of each row, int64."""
    rows: list[list[tuple[str | None, str] | None]] = []
    owners: list[int] = []
    room = QUESTIONS_PER_ROW
    for picture, pairs in enumerate(questions):
        for start in range(0, len(pairs), room):
            part = pairs[start : start + room]
            rows.append([None, *part, *[None] * (room - len(part))])
            owners.append(picture)
    return pack(rows, slot_lengths(1, room, layout), layout), torch.tensor(owners)


def _easy_pixels(paths: list[Path]) -> Tensor:
    import numpy as np
    from PIL import Image

    pictures = []
    for path in paths:
        with Image.open(path) as picture:
            pictures.append(np.asarray(picture.convert("RGB")))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def load(count: int, workers: int, device: torch.device, layout: PromptLayout) -> Data:
    """Draw and tokenize `count` training scenes and read easy-VQA's train split."""
    starts = range(0, count, CHUNK)
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(partial(_pack_scenes, layout=layout), starts))
    pixels = [draw(scenes("train", torch.arange(s, s + CHUNK, device=device))) for s in starts]
    paths, questions = easy_questions()
    easy_rows, owners = _easy_rows(questions, layout)
    tokens, labels = (torch.cat([getattr(part, f) for part in parts]).to(device) for f in ("tokens", "labels"))
    easy = Rows(easy_rows.tokens.to(device), easy_rows.labels.to(device))
    return Data(torch.cat(pixels), _easy_pixels(paths).to(device), owners.to(device), Rows(tokens, labels), easy)


def _augment(pixels: Tensor, bits: Tensor) -> Tensor:
    """Flip and transpose pictures `[n, 3, s, s]` by `bits` `[n]`; no easy-VQA answer changes."""
    pixels = torch.where((bits & 1).bool()[:, None, None, None], pixels.flip(2), pixels)
    pixels = torch.where((bits & 2).bool()[:, None, None, None], pixels.flip(3), pixels)
    return torch.where((bits & 4).bool()[:, None, None, None], pixels.transpose(2, 3), pixels)


def batches(data: Data, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless batches: pictures uint8 `[size, 3, 64, 64]`, tokens and labels int16 `[size, t]`, on the device."""
    device = data.pixels.device
    generator = torch.Generator(device).manual_seed(seed)
    easy = round(size * EASY_SHARE)

    def pick(high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), device=device, generator=generator)

    while True:
        a, b = pick(data.pixels.shape[0], size - easy), pick(data.easy_picture.shape[0], easy)
        augmented = _augment(data.easy_pixels[data.easy_picture[b]], pick(8, easy))
        yield (
            torch.cat([data.pixels[a], augmented]),
            torch.cat([data.rows.tokens[a], data.easy_rows.tokens[b]]),
            torch.cat([data.rows.labels[a], data.easy_rows.labels[b]]),
        )


def loss_of(model: Any, device: torch.device, layout: PromptLayout) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The training loss as a function of one batch."""
    lengths, forward = slot_lengths(1, QUESTIONS_PER_ROW, layout), layout.forward(device)
    mask, positions = mask_and_positions(lengths, device, layout.prefix)
    weight = torch.full((sum(lengths),), QUESTION_WEIGHT, device=device)
    weight[: layout.caption_slot] = 1.0

    def loss(pixels: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            scores = forward(model, normalize(pixels), tokens.long(), mask, positions)
        targets = labels.long()
        losses = F.cross_entropy(scores.float().transpose(1, 2), targets, ignore_index=-100, reduction="none") * weight
        return losses.sum() / ((targets >= 0) * weight).sum()

    return loss


def training(
    model: Any, save: Callable[[], None], layout: PromptLayout, options: argparse.Namespace, device: torch.device
) -> Training:
    """The training of a model with the prompts of `layout`."""
    data = load(options.scenes, options.workers, device, layout)
    check = scene_exam("validation", 0, 400, device, layout)
    source = batches(data, options.batch, options.seed)
    loss = loss_of(model, device, layout)
    return Training(list(model.parameters()), loss, source, lambda: by_kind(model, [check]), save)


def final(model: Any, layout: PromptLayout, device: torch.device) -> dict[str, Any]:
    """Scores of a trained model on the test split: `summary` and `kinds`."""
    kinds = by_kind(model, [scene_exam("test", 0, 1000, device, layout), easy_exam(device, layout)])
    return {"summary": summary(kinds), "kinds": kinds}
