"""The training of `bench/smollm2_llava.py`: the tower alone, then tower, projector and language model together."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.smollm2_model import VISION, LowRank, patches_of, scores_of
from bench.smollm2_rows import ASKED, CHUNK, IMAGE_TOKENS, Rows, conversations, pack
from exporter.data.demo.scenes import CELLS, COLORS, DOTS, SHAPES, SIZES, Scenes, draw, scene_objects, scenes

ANSWER_WEIGHT = 3.0  # loss weight of an answer's token relative to a caption's
PROSE_EVERY = 4  # steps
COLUMNS = {"color": len(COLORS), "size": len(SIZES), "shape": len(SHAPES), "dot": len(DOTS)}


class ObjectHead(nn.Module):
    """Names the object in each cell from all patches; only the first phase of the training uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(IMAGE_TOKENS * VISION, len(CELLS) * (2 + sum(COLUMNS.values())))

    def loss(self, patches: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and which pictures are named without a mistake, bool `[n]`.

        patches: `[n, 64, width]`. targets: int64 `[n, 9, 5]`, presence and the attributes (-100 in an empty cell).
        """
        scores = self.linear(patches.flatten(1)).float().view(len(patches), len(CELLS), -1)
        parts = scores.split((2, *COLUMNS.values()), dim=-1)
        losses = [F.cross_entropy(part.transpose(1, 2), targets[..., i]) for i, part in enumerate(parts)]
        right = [(part.argmax(-1) == targets[..., i]) | (targets[..., i] < 0) for i, part in enumerate(parts)]
        return torch.stack(losses).sum(), torch.stack(right).all(0).all(1)


def targets_of(batch: Scenes) -> Tensor:
    """The object in each cell, int64 `[n, 9, 5]`: presence, then color, size, shape and dot or -100."""
    n, cells = len(batch.index), len(CELLS)
    column = torch.where(batch.cell < 0, cells, batch.cell)
    values = [torch.ones_like(batch.cell), *(getattr(batch, name) for name in COLUMNS)]
    grids = []
    for i, value in enumerate(values):
        empty = torch.full((n, cells + 1), -100 if i else 0, device=column.device)
        grids.append(empty.scatter(1, column, value)[:, :cells])
    return torch.stack(grids, dim=-1)


@dataclass(frozen=True)
class Clock:
    """The learning rate by the elapsed share of `seconds`: warm-up for 3 %, then a cosine to 0."""

    seconds: float
    steps: int | None

    def progress(self) -> Iterator[float]:
        """The share done, before each step, until the time or the number of steps is used up."""
        start, done = time.monotonic(), 0
        while (share := done / self.steps if self.steps else (time.monotonic() - start) / self.seconds) < 1:
            yield share
            done += 1
            if done % 10 == 0 and torch.cuda.is_available():
                torch.cuda.synchronize()  # so that the clock is correct

    @staticmethod
    def rate(share: float) -> float:
        """The factor of the learning rate."""
        return min(share / 0.03 + 0.01, 1.0) * 0.5 * (1 + math.cos(math.pi * share))


def optimizer_of(groups: list[tuple[Any, float]], device: torch.device) -> torch.optim.Optimizer:
    """AdamW over (parameters, learning rate) groups."""
    parts = [{"params": list(parameters), "lr": rate, "base": rate} for parameters, rate in groups]
    return torch.optim.AdamW(parts, betas=(0.9, 0.98), weight_decay=0.01, fused=device.type == "cuda")


def advance(optimizer: torch.optim.Optimizer, loss: Tensor, share: float) -> None:
    """One step down the gradient of `loss`."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], 1.0)
        group["lr"] = group["base"] * Clock.rate(share)
    optimizer.step()


def half(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def pictures(count: int, device: torch.device) -> Tensor:
    """The first `count` training scenes, uint8 `[count, 3, 64, 64]`."""
    return torch.cat([draw(scenes("train", part)) for part in torch.arange(count, device=device).split(CHUNK)])


def train_tower(model: Any, pixels: Tensor, clock: Clock, size: int, log: Callable[[str], None]) -> dict[str, float]:
    """Train the tower on naming the object in every cell of `pixels`, and return the loss and the exact share."""
    device = pixels.device
    targets = targets_of(scenes("train", torch.arange(len(pixels), device=device)))
    head = ObjectHead().to(device)
    tower = model.model.vision_tower
    optimizer = optimizer_of([(tower.parameters(), 1e-3), (head.parameters(), 2e-4)], device)
    generator = torch.Generator(device).manual_seed(0)
    figures: dict[str, float] = {}
    for step, share in enumerate(clock.progress()):
        indices = torch.randint(len(pixels), (size,), device=device, generator=generator)
        with half(device):
            loss, right = head.loss(patches_of(model, pixels[indices]), targets[indices])
        advance(optimizer, loss, share)
        if step % 200 == 0:
            log(f"tower step {step} loss {float(loss.detach()):.4f} exact {float(right.float().mean()):.3f}")
    figures = {"tower steps": step + 1, "tower loss": float(loss.detach()), "tower exact": float(right.float().mean())}
    return figures


def packed_scenes(count: int, tokenizer: Any, image: int) -> Rows:
    """Rows of the first `count` training scenes."""
    objects = scene_objects(scenes("train", torch.arange(count)))
    return pack([conversations(items, i, ASKED) for i, items in enumerate(objects)], tokenizer, image)


def kept_prose(model: Any, adapters: dict[str, LowRank], tokens: Tensor) -> Tensor:
    """The divergence of next tokens of prose from the language model without adapters. tokens: int64 `[n, t]`."""
    language = model.model.language_model
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.enabled = False
        truth = model.lm_head(language(input_ids=tokens, use_cache=False)[0]).float().log_softmax(-1)
        for adapter in adapters.values():
            adapter.enabled = True
    own = model.lm_head(language(input_ids=tokens, use_cache=False)[0]).float().log_softmax(-1)
    return F.kl_div(own.flatten(0, 1), truth.flatten(0, 1), log_target=True, reduction="batchmean")


def train_language(
    model: Any,
    adapters: dict[str, LowRank],
    pixels: Tensor,
    rows: Rows,
    prose: Tensor,
    clock: Clock,
    size: int,
    check: Callable[[], dict[str, float]],
    log: Callable[[str], None],
) -> dict[str, float]:
    """Train tower, projector and adapters on `rows` about `pixels`; `prose` `[n, t]` keeps the language model."""
    device = pixels.device
    lowrank = [parameter for adapter in adapters.values() for parameter in (adapter.down, adapter.up)]
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    groups = [(lowrank, 1e-3), (projector.parameters(), 1e-3), (tower.parameters(), 2e-4)]
    optimizer = optimizer_of(groups, device)
    generator = torch.Generator(device).manual_seed(1)

    def pick(high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), device=device, generator=generator)

    reported, divergence = time.monotonic(), torch.zeros(())
    for step, share in enumerate(clock.progress()):
        if step % PROSE_EVERY == PROSE_EVERY - 1:
            with half(device):
                loss = divergence = kept_prose(model, adapters, prose[pick(len(prose), max(1, size // 8))].long())
        else:
            indices = pick(len(rows.tokens), size)
            part = rows.part(indices)
            with half(device):
                scores, labels = scores_of(model, pixels[indices], part)
            weight = torch.where(part.slots[part.labels >= 0] > 1, ANSWER_WEIGHT, 1.0)
            loss = (F.cross_entropy(scores, labels, reduction="none") * weight).sum() / weight.sum()
            captions = loss
        advance(optimizer, loss, share)
        if time.monotonic() - reported > 20:
            reported = time.monotonic()
            shares = " ".join(f"{name} {value:.3f}" for name, value in check().items())
            log(f"step {step} loss {float(captions.detach()):.4f} prose {float(divergence.detach()):.4f} {shares}")
    return {"steps": step + 1, "loss": float(captions.detach()), "prose divergence": float(divergence.detach())}
