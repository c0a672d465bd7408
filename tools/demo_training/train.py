"""Train a demo model.

    python -m tools.demo_training.train --model demo-llava --out DIR --seed 0 --minutes 8 --device cuda

Needs the package `easy-vqa`, except for retrieval. The learning rate depends on the elapsed time, or with `--steps` on
the step; a run with `--steps` depends only on seed, versions and device, as far as the device is deterministic.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from exporter.model.embedded import MODELS
from tools.demo_training import blip2_folder, folder, train_answers, train_retrieval
from tools.demo_training.blip2_packing import BLIP2
from tools.demo_training.packing import LLAVA
from tools.demo_training.train_loop import Training, run

SETTINGS = (("vision-blocks", 2), ("text-blocks", 2), ("heads", 2), ("batch", 256), ("scenes", 80_000))


@dataclass(frozen=True)
class Recipe:
    """How one demo model is trained: config.json, initial weights, folder, training and final scores."""

    config: Callable[[argparse.Namespace], dict[str, Any]]
    build: Callable[[dict[str, Any], int], Any]
    save: Callable[[Any, dict[str, Any], Path], None]
    training: Callable[[Any, Callable[[], None], argparse.Namespace, torch.device], Training]
    final: Callable[[Any, torch.device], dict[str, Any]]


def _answers(layout: Any) -> dict[str, Any]:
    def training(model: Any, save: Callable[[], None], options: argparse.Namespace, device: torch.device) -> Training:
        return train_answers.training(model, save, layout, options, device)

    return {"training": training, "final": lambda model, device: train_answers.final(model, layout, device)}


RECIPES: dict[str, Recipe] = {
    "demo-llava": Recipe(
        lambda o: folder.config(o.vision_blocks, o.text_blocks, o.heads), folder.build, folder.save, **_answers(LLAVA)
    ),
    "demo-blip2": Recipe(
        lambda o: blip2_folder.config("captioning"), blip2_folder.build, blip2_folder.save, **_answers(BLIP2)
    ),
    "demo-blip2-itm": Recipe(
        lambda o: blip2_folder.config("retrieval"),
        blip2_folder.build,
        blip2_folder.save,
        train_retrieval.training,
        train_retrieval.final,
    ),
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a demo model.")
    parser.add_argument("--model", choices=sorted(RECIPES), default="demo-llava")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=0, help="train this many steps instead of --minutes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the loss")
    parser.add_argument("--workers", type=int, default=4, help="tokenizer processes")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--decay", type=float, default=0.05)
    parser.add_argument("--report", type=float, default=60.0, help="seconds between two lines of figures")
    parser.add_argument("--keep", type=float, default=2.0, help="also save after this share of the training")
    start = "model from whose weights the retrieval model starts"
    parser.add_argument("--start", type=Path, default=MODELS["demo-blip2"], help=start)
    for name, default in SETTINGS:
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def main() -> None:
    """Command line."""
    options, begun = _arguments(), time.monotonic()
    recipe, device = RECIPES[options.model], torch.device(options.device)
    settings = recipe.config(options)
    model = recipe.build(settings, options.seed).to(device)
    save = partial(recipe.save, model, settings, options.out)
    training = recipe.training(model, save, options, device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"data after {time.monotonic() - begun:.0f} s, {parameters} parameters", flush=True)
    figures = run(training, options, partial(print, flush=True))
    save()
    recorded = {k: v for k, v in vars(options).items() if k not in ("out", "workers", "report", "keep", "start")}
    record = {"options": recorded, "torch": torch.__version__, **figures, "parameters": parameters}
    record |= recipe.final(model.to(torch.bfloat16), device)
    (options.out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
