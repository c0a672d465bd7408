"""Training loop of the demo models: optimizer, learning rate, loop."""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Work:
    """One training. loss: of one batch of `source`; look: figures to print at intervals; save: save the model.

    parameters: the trained parameters, of the model and of the loss.
    """

    parameters: list[nn.Parameter]
    loss: Callable[..., Tensor]
    source: Iterator[tuple[Tensor, ...]]
    look: Callable[[], dict[str, float]]
    save: Callable[[], None]


def _optimizer(parameters: list[nn.Parameter], rate: float, decay: float) -> torch.optim.Optimizer:
    matrices, others = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), eps=1e-8, fused=others[0].is_cuda)


def _rate(progress: float) -> float:
    """Learning rate as a share of the highest: up for 3 %, then down a cosine to 0."""
    return min(progress / 0.03 + 0.01, 1.0) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _line(elapsed: float, step: int, loss: float, figures: dict[str, float]) -> str:
    words = " ".join(f"{name} {figure:.3f}" for name, figure in figures.items())
    return f"{elapsed / 60:.1f} min  step {step}  loss {loss:.4f}  {words}"


def run(work: Work, options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Train in place; returns the figures of the run. say: gets a line of figures now and then."""
    optimizer, loss = _optimizer(work.parameters, options.rate, options.decay), work.loss
    if options.compile:
        loss = torch.compile(loss)
        loss(*next(work.source)).backward()  # compile before the training time starts
    start, reported, step, progress, kept = time.monotonic(), 0.0, 0, 0.0, False
    while progress < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = options.rate * _rate(progress)
        optimizer.zero_grad(set_to_none=True)
        value = loss(*next(work.source))
        value.backward()
        nn.utils.clip_grad_norm_(work.parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 20 == 0:
            value.item()  # wait for the device, so that the clock is correct
        elapsed = time.monotonic() - start
        progress = step / options.steps if options.steps else elapsed / 60 / options.minutes
        if elapsed - reported >= options.report:
            reported = elapsed
            say(_line(elapsed, step, value.item(), work.look()))
        if progress >= options.keep and not kept:
            work.save()
            kept = True
    return {"steps": step, "seconds": round(time.monotonic() - start, 1), "loss": round(value.item(), 5)}
