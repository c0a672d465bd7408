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
class Training:
    """One training run.

    parameters: trained parameters, of the model and of the loss. loss: of one batch of `source`. metrics: figures to
    print at intervals. save: saves the model.
    """

    parameters: list[nn.Parameter]
    loss: Callable[..., Tensor]
    source: Iterator[tuple[Tensor, ...]]
    metrics: Callable[[], dict[str, float]]
    save: Callable[[], None]


def _optimizer(parameters: list[nn.Parameter], rate: float, decay: float) -> torch.optim.Optimizer:
    matrices, others = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), eps=1e-8, fused=others[0].is_cuda)


def _rate(progress: float) -> float:
    """Learning rate divided by its maximum: linear warm-up for 3 % of the run, then cosine decay to 0."""
    return min(progress / 0.03 + 0.01, 1.0) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _line(elapsed: float, step: int, loss: float, figures: dict[str, float]) -> str:
    words = " ".join(f"{name} {figure:.3f}" for name, figure in figures.items())
    return f"{elapsed / 60:.1f} min  step {step}  loss {loss:.4f}  {words}"


def run(training: Training, options: argparse.Namespace, log: Callable[[str], None]) -> dict[str, Any]:
    """Train in place; returns the figures of the run. log: called with a line of figures at intervals."""
    optimizer, loss = _optimizer(training.parameters, options.rate, options.decay), training.loss
    if options.compile:
        loss = torch.compile(loss)
        loss(*next(training.source)).backward()  # compile before the training time starts
    start, reported, step, progress, saved = time.monotonic(), 0.0, 0, 0.0, False
    while progress < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = options.rate * _rate(progress)
        optimizer.zero_grad(set_to_none=True)
        value = loss(*next(training.source))
        value.backward()
        nn.utils.clip_grad_norm_(training.parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 20 == 0:
            value.item()  # wait for the device, so that the clock is correct
        elapsed = time.monotonic() - start
        progress = step / options.steps if options.steps else elapsed / 60 / options.minutes
        if elapsed - reported >= options.report:
            reported = elapsed
            log(_line(elapsed, step, value.item(), training.metrics()))
        if progress >= options.keep and not saved:
            training.save()
            saved = True
    return {"steps": step, "seconds": round(time.monotonic() - start, 1), "loss": round(value.item(), 5)}
