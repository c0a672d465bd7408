"""Samples of the demo tasks: drawn scenes with captions and questions; the test split also has easy-VQA questions."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Literal, get_args

import torch
from PIL.Image import Image, fromarray

from exporter.data.demo import easy_vqa
from exporter.data.demo.language import QUESTIONS, Dice, captions, plain_captions, question
from exporter.data.demo.scenes import SceneObject, Split, draw, scene_objects, scenes
from exporter.data.tasks.sample import Sample
from exporter.errors import DataError

TaskName = Literal["vqa", "captioning", "retrieval"]
Captions = Callable[[Sequence[SceneObject]], tuple[str, ...]]
SIZES: dict[str, int] = {"train": 80_000, "validation": 2_000, "test": 1_000}  # scenes per split
KEPT = 2048  # pictures in memory, 12 KiB each
EASY_EVERY = 3  # in the test split, every third question is from easy-VQA until they are used up


def picture(split: Split, index: int) -> Image:
    """Scene `index` of a split as an RGB picture of 64 x 64 pixels."""
    return _drawn(split, index).copy()


@lru_cache(maxsize=KEPT)
def _drawn(split: Split, index: int) -> Image:
    """The picture, drawn once for the several times that an evaluation opens it."""
    pixels = draw(scenes(split, torch.tensor([index])))[0]
    return fromarray(pixels.permute(1, 2, 0).contiguous().numpy(), "RGB")


def _shuffled(count: int, seed: int) -> list[int]:
    """A permutation of `0 .. count-1` that depends only on the seed; seed 0 is the identity."""
    order = list(range(count))
    dice = Dice(seed)
    for i in range(count - 1, 0, -1) if seed else ():
        j = dice.roll(i + 1)
        order[i], order[j] = order[j], order[i]
    return order


def _objects(split: Split, indices: Sequence[int]) -> list[tuple[SceneObject, ...]]:
    return scene_objects(scenes(split, torch.tensor(indices, dtype=torch.int64)))


def _captioning(split: Split, indices: Sequence[int], caption: Captions = captions) -> list[Sample]:
    return [
        Sample(f"scenes/{split}/{i:06d}/caption", partial(picture, split, i), None, caption(objects), "caption")
        for i, objects in zip(indices, _objects(split, indices), strict=True)
    ]


def _scene_questions(split: Split, indices: Sequence[int], kinds: Sequence[str] = tuple(QUESTIONS)) -> list[Sample]:
    """One question per scene, rotating through the kinds; a kind without a valid question is skipped."""
    samples = []
    for i, objects in zip(indices, _objects(split, indices), strict=True):
        turns = [kinds[(i + step) % len(kinds)] for step in range(len(kinds))]
        item = next(q for q in (question(kind, objects, i) for kind in turns) if q is not None)
        name = f"scenes/{split}/{i:06d}/{item.kind}"
        samples.append(Sample(name, partial(picture, split, i), item.text, (item.answer,), item.kind))
    return samples


def _easy_questions(seed: int) -> list[Sample]:
    """The embedded easy-VQA questions, shuffled, because each picture's list starts with the harder kinds."""
    all_questions = [
        Sample(
            f"easy-vqa/test/{number}/{turn}",
            partial(easy_vqa.test_picture, sheet),
            text,
            (answer,),
            easy_vqa.kind(answer),
        )
        for sheet, (number, questions) in enumerate(easy_vqa.test_questions())
        for turn, (text, answer) in enumerate(questions)
    ]
    return [all_questions[i] for i in _shuffled(len(all_questions), seed + 1)]


def _mixed(scene: Sequence[Sample], easy: Sequence[Sample]) -> list[Sample]:
    drawn, remaining_easy = list(scene), list(easy)
    mixed: list[Sample] = []
    while drawn:
        take_easy = remaining_easy and len(mixed) % EASY_EVERY == EASY_EVERY - 1
        mixed.append(remaining_easy.pop(0) if take_easy else drawn.pop(0))
    return mixed


def samples(task: TaskName, split: Split, limit: int | None = None, seed: int = 0) -> list[Sample]:
    """The first `limit` samples of a task (all if None), in an order that depends on `seed`.

    captioning, retrieval: one sample per scene, with the exact caption and three paraphrases as references. vqa: one
    question per scene; in the test split, every third sample is an easy-VQA question. The splits share no scene (see
    `scenes`). Raises DataError for an unknown task or split, or if `limit` exceeds the number of samples.
    """
    return _select(task, split, limit, seed, captions, tuple(QUESTIONS))


def drawings(task: TaskName, split: Split, limit: int | None = None, seed: int = 0) -> list[Sample]:
    """`samples` for models that do not know the lexicon: captions in plain words, no questions about names."""
    plain = tuple(kind for kind in QUESTIONS if kind not in ("find", "name"))
    return _select(task, split, limit, seed, plain_captions, plain)


def _select(
    task: TaskName, split: Split, limit: int | None, seed: int, caption: Captions, kinds: Sequence[str]
) -> list[Sample]:
    if task not in get_args(TaskName) or split not in SIZES:
        options = f"{', '.join(get_args(TaskName))}; {', '.join(SIZES)}"
        raise DataError(f"no demo data for task '{task}', split '{split}'", options)
    size = SIZES[split]
    easy = _easy_questions(seed) if task == "vqa" and split == "test" else []
    available = size + min(len(easy), size // (EASY_EVERY - 1))
    if limit is not None and not 0 < limit <= available:
        raise DataError(f"{limit} samples of {task}, split '{split}', are not available", f"use 1 to {available}")
    count = size if limit is None else min(limit, size)
    indices = _shuffled(size, seed)[:count]
    if task == "captioning":
        return _captioning(split, indices, caption)
    if task == "retrieval":
        counted = zip(_captioning(split, indices, caption), _objects(split, indices), strict=True)
        return [replace(sample, kind=f"{len(objects)} objects") for sample, objects in counted]
    return _mixed(_scene_questions(split, indices, kinds), easy)[:limit]
