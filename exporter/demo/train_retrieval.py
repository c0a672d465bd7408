"""Training of retrieval: contrast, matching and telling (Li et al., BLIP-2, arXiv 2301.12597, section 3.1).

Telling (writing the caption from the picture) only teaches: the word embeddings are its output matrix, and no tensor of
it is stored. Matching learns from captions that differ in one thing and from the captions that contrast confuses.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exporter.demo.blip2_packing import see
from exporter.demo.blip2_retrieval import matching, picture_features, telling, text_features
from exporter.demo.folder import EOS, PAD
from exporter.demo.packing import normalize
from exporter.demo.scenes import Scenes, draw, scenes
from exporter.demo.score_retrieval import exam, grade
from exporter.demo.texts import STYLES, lexicon_tokens, spoil, texts
from exporter.demo.train_loop import Work

CHUNK = 4000
COLUMNS = ("cell", "color", "size", "shape", "dot")
TELLING = 1.0  # weight of its loss beside contrast's and matching's


def _shuffled(batch: Scenes, rows: Tensor) -> Scenes:
    return Scenes(batch.split, batch.index[rows], *(getattr(batch, name)[rows] for name in COLUMNS))


def batches(pixels: Tensor, all_scenes: Scenes, size: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Endless batches: pictures uint8 `[size, 3, 64, 64]`, and three texts each, int64 `[size, 40]`.

    The texts: the caption in any style, the caption in the first style, a caption in any style that is wrong.
    """
    device = pixels.device
    chance = torch.Generator(device).manual_seed(seed)
    known = lexicon_tokens(device)
    while True:
        rows = torch.randint(pixels.shape[0], (size,), device=device, generator=chance)
        batch = _shuffled(all_scenes, rows)
        style = torch.randint(STYLES, (size,), device=device, generator=chance)
        right, exact = texts(batch, style, known), texts(batch, torch.zeros_like(style), known)
        yield pixels[rows], right, exact, texts(spoil(batch, chance), style, known)


def _contrast(similarity: Tensor) -> Tensor:
    own = torch.arange(similarity.shape[0], device=similarity.device)
    return (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2


def _confused(similarity: Tensor) -> Tensor:
    """For every picture a wrong text, drawn by how alike contrast finds them, int64 `[n]`."""
    itself = torch.eye(similarity.shape[0], dtype=torch.bool, device=similarity.device)
    noise = -torch.log(-torch.log(torch.rand_like(similarity).clamp(1e-9, 1 - 1e-7)))
    return (similarity.detach() + noise).masked_fill(itself, -math.inf).argmax(dim=1)


def loss_of(model: Any, scale: nn.Parameter) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The training loss as a function of one batch; scale: the logarithm of what similarities are multiplied by."""

    def loss(pixels: Tensor, right: Tensor, exact: Tensor, wrong: Tensor) -> Tensor:
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.device.type == "cuda"):
            image = see(model, normalize(pixels))
            told = torch.cat([torch.full_like(exact[:, :1], EOS), exact[:, 1:]], dim=1)
            queries, scores = telling(model, image, told)
            found, said = picture_features(model, queries), text_features(model, right)
        wanted = torch.cat([exact[:, 1:], torch.full_like(exact[:, :1], PAD)], dim=1)
        ends = (exact != PAD).sum(1, keepdim=True) - 1
        wanted = wanted.scatter(1, ends, EOS).masked_fill(wanted.scatter(1, ends, EOS) == PAD, -100)
        tell = F.cross_entropy(scores.float().transpose(1, 2), wanted, ignore_index=-100)
        similarity = torch.einsum("iqd,jd->iqj", found.float(), said.float()).amax(dim=1)  # [pictures, texts]
        similarity = similarity * scale.exp().clamp(max=100.0)
        pairs = torch.cat([right, wrong, right[_confused(similarity)]])
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.device.type == "cuda"):
            match = matching(model, image.repeat(3, 1, 1), pairs).float()
        fits = torch.zeros(len(pairs), dtype=torch.long, device=pairs.device)
        fits[: len(right)] = 1
        each = F.cross_entropy(match, fits, reduction="none")
        judged = (each[: len(right)].mean() + each[len(right) :].mean()) / 2
        return _contrast(similarity) + judged + TELLING * tell

    return loss


def work(model: Any, save: Callable[[], None], options: argparse.Namespace, device: torch.device) -> Work:
    """The training of the retrieval model."""
    index = torch.arange(options.scenes, device=device)
    whole = scenes("train", index)
    pixels = torch.cat([draw(scenes("train", part)) for part in index.split(CHUNK)])
    scale = nn.Parameter(torch.tensor(math.log(1 / 0.07), device=device))
    source = batches(pixels, whole, options.batch, options.seed)
    check = exam("validation", 400, device)
    return Work([*model.parameters(), scale], loss_of(model, scale), source, lambda: grade(model, check), save)


def final(model: Any, device: torch.device) -> dict[str, Any]:
    """What a trained model knows of the test split: `summary`."""
    return {"summary": grade(model, exam("test", 1000, device))}
