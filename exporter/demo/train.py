"""Train the demo model: `python -m exporter.demo.train --out DIR --seed 0 --minutes 8 --device cuda`.

Needs the package `easy-vqa` (`pip install 'mmq[train]'`). The learning rate follows the clock, or the steps when
`--steps` is given; then a run depends on seed, versions and device alone, as far as the device is deterministic.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from exporter.demo import easy_vqa
from exporter.demo.folder import build, config, save
from exporter.demo.language import Dice, caption, question
from exporter.demo.packing import (
    CAPTION_SLOT,
    Rows,
    logits,
    mask_and_positions,
    normalize,
    pack,
    slot_lengths,
    user_ids,
)
from exporter.demo.scenes import draw, scenes, things
from exporter.demo.score import by_kind, easy_exam, scene_exam, summary

ALWAYS = ("color", "shape", "size", "dot", "place", "find", "name")  # kinds asked of every training scene
SOMETIMES = ("exists", "exists", "count")  # one of these
SLOTS = slot_lengths(1, len(ALWAYS) + 1)
EASY_SHARE = 0.12  # of a batch
QUESTION_WEIGHT = 1.5  # a question's token against a caption's
CHUNK = 4000  # scenes drawn or tokenized at once
SETTINGS = (("vision-blocks", 2), ("text-blocks", 2), ("heads", 2), ("batch", 256), ("scenes", 80_000))


@dataclass(frozen=True)
class Data:
    """Everything one step needs, on the device: pictures uint8, tokens and labels int16, and whose rows are whose."""

    pixels: Tensor
    easy_pixels: Tensor
    easy_picture: Tensor
    rows: Rows
    easy_rows: Rows


def _pack_scenes(start: int) -> Rows:
    torch.set_num_threads(1)
    rows: list[list[tuple[str | None, str] | None]] = []
    for i, objects in enumerate(things(scenes("train", torch.arange(start, start + CHUNK))), start):
        kinds = (*ALWAYS, Dice(i).pick(SOMETIMES))
        asked = [question(kind, objects, i) for kind in kinds]
        rows.append([(None, caption(objects)), *((q.text, q.answer) if q else None for q in asked)])
    return pack(rows, SLOTS)


def _easy_rows(asked: list[list[tuple[str, str]]]) -> tuple[Rows, Tensor]:
    """Rows of at most eight questions, and the number of the picture of each row, int64."""
    rows: list[list[tuple[str | None, str] | None]] = []
    owners: list[int] = []
    room = len(SLOTS) - 1
    for picture, questions in enumerate(asked):
        for start in range(0, len(questions), room):
            part = questions[start : start + room]
            rows.append([None, *part, *[None] * (room - len(part))])
            owners.append(picture)
    return pack(rows, SLOTS), torch.tensor(owners)


def _easy_pixels(paths: list[Path]) -> Tensor:
    import numpy as np
    from PIL import Image

    pictures = []
    for path in paths:
        with Image.open(path) as picture:
            pictures.append(np.asarray(picture.convert("RGB")))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def load(count: int, workers: int, device: torch.device) -> Data:
    """Draw and tokenize `count` training scenes and read easy-VQA's train split."""
    starts = range(0, count, CHUNK)
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(_pack_scenes, starts))
    pixels = [draw(scenes("train", torch.arange(s, s + CHUNK, device=device))) for s in starts]
    paths, asked = easy_vqa.train()
    easy_rows, owners = _easy_rows(asked)
    tokens, labels = (torch.cat([getattr(part, f) for part in parts]).to(device) for f in ("tokens", "labels"))
    easy = Rows(easy_rows.tokens.to(device), easy_rows.labels.to(device))
    return Data(torch.cat(pixels), _easy_pixels(paths).to(device), owners.to(device), Rows(tokens, labels), easy)


def _turn(pixels: Tensor, how: Tensor) -> Tensor:
    """Flip and transpose pictures `[n, 3, s, s]` by the bits of `how` `[n]`; no easy-VQA answer changes."""
    pixels = torch.where((how & 1).bool()[:, None, None, None], pixels.flip(2), pixels)
    pixels = torch.where((how & 2).bool()[:, None, None, None], pixels.flip(3), pixels)
    return torch.where((how & 4).bool()[:, None, None, None], pixels.transpose(2, 3), pixels)


def batches(data: Data, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless batches: pictures uint8 `[size, 3, 64, 64]`, tokens and labels int16 `[size, t]`, on the device."""
    device = data.pixels.device
    chance = torch.Generator(device).manual_seed(seed)
    easy = round(size * EASY_SHARE)

    def pick(high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), device=device, generator=chance)

    while True:
        a, b = pick(data.pixels.shape[0], size - easy), pick(data.easy_picture.shape[0], easy)
        turned = _turn(data.easy_pixels[data.easy_picture[b]], pick(8, easy))
        yield (
            torch.cat([data.pixels[a], turned]),
            torch.cat([data.rows.tokens[a], data.easy_rows.tokens[b]]),
            torch.cat([data.rows.labels[a], data.easy_rows.labels[b]]),
        )


def loss_of(model: Any, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The training loss as a function of one batch."""
    sees, positions = mask_and_positions(SLOTS, device)
    user = user_ids().to(device)
    weight = torch.full((sum(SLOTS),), QUESTION_WEIGHT, device=device)
    weight[:CAPTION_SLOT] = 1.0

    def loss(pixels: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            scores = logits(model, normalize(pixels), tokens.long(), sees, positions, user)
        wanted = labels.long()
        each = F.cross_entropy(scores.float().transpose(1, 2), wanted, ignore_index=-100, reduction="none") * weight
        return each.sum() / ((wanted >= 0) * weight).sum()

    return loss


def _optimizer(model: Any, rate: float, decay: float) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    fused = others[0].is_cuda
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), eps=1e-8, fused=fused)


def _rate(progress: float) -> float:
    """Learning rate as a share of the highest: up for 3 %, then down a cosine to 0."""
    return min(progress / 0.03 + 0.01, 1.0) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def train(model: Any, data: Data, options: argparse.Namespace) -> dict[str, Any]:
    """Train in place; returns the figures of the run."""
    device = data.pixels.device
    check = scene_exam("validation", 0, 400, device)
    optimizer = _optimizer(model, options.rate, options.decay)
    loss, source = loss_of(model, device), batches(data, options.batch, options.seed)
    if options.compile:
        loss = torch.compile(loss)
        loss(*next(source)).backward()  # compiling is no part of the training time
    start, reported, step, progress = time.monotonic(), 0.0, 0, 0.0
    while progress < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = options.rate * _rate(progress)
        optimizer.zero_grad(set_to_none=True)
        value = loss(*next(source))
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 20 == 0:
            value.item()  # keeps the clock honest: waits for the device
        elapsed = time.monotonic() - start
        progress = step / options.steps if options.steps else elapsed / 60 / options.minutes
        if elapsed - reported >= 60:
            reported = elapsed
            figures = by_kind(model, [check])
            words = " ".join(f"{kind} {figure:.3f}" for kind, figure in figures.items())
            print(f"{elapsed / 60:.1f} min  step {step}  loss {value.item():.4f}  {words}", flush=True)
    return {"steps": step, "seconds": round(time.monotonic() - start, 1), "loss": round(value.item(), 5)}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=0, help="train this many steps instead of --minutes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the loss")
    parser.add_argument("--workers", type=int, default=4, help="processes that tokenize")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--decay", type=float, default=0.05)
    for name, default in SETTINGS:
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def main() -> None:
    """Command line."""
    options, begun = _arguments(), time.monotonic()
    device = torch.device(options.device)
    settings = config(options.vision_blocks, options.text_blocks, options.heads)
    data = load(options.scenes, options.workers, device)
    model = build(settings, options.seed).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"data after {time.monotonic() - begun:.0f} s, {parameters} parameters", flush=True)
    figures = train(model, data, options)
    save(model, settings, options.out)
    kinds = by_kind(model.to(torch.bfloat16), [scene_exam("test", 0, 1000, device), easy_exam(device)])
    asked = {k: v for k, v in vars(options).items() if k not in ("out", "workers")}
    record = {"options": asked, "torch": torch.__version__, **figures, "parameters": parameters}
    record |= {"summary": summary(kinds), "kinds": kinds}
    (options.out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
