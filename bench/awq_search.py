"""AWQ scale search by the outputs of the linears against the output of the block, on the demo model.

    python -m bench.awq_search [--seeds 2] [--scenes 300] [--points 20]

Quantizes the language model with AWQ in groups of 32, with each `search`, for several draws of calibration samples.
Prints the relative error of the logits on test samples, the scores of the tasks, and the seconds of quantization.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from bench.balance import FAMILY, make, recipe
from bench.quantize_beside import held_out_batches
from exporter.device import choose
from exporter.model.embedded import MODELS
from exporter.planning.recipe import Recipe
from tools.demo_training.score import Exam, by_kind, easy_exam, scene_exam, summary

CPU = choose("cpu")


def with_search(base: Recipe, search: str, points: int) -> Recipe:
    """The recipe with the given `search` and `points`."""
    rule = base.quantize[0].model_dump() | {"options": {"search": search, "points": points}}
    return Recipe.model_validate(base.model_dump() | {"quantize": [rule]})


@torch.no_grad()
def logits(model: Any, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """Logits of all unmasked tokens, f32 `[tokens, vocabulary]`."""
    return torch.cat([FAMILY.outputs(model, batch)[batch["attention_mask"].bool()] for batch in batches])


def figures(
    model: Any, variant: Recipe, exams: Sequence[Exam], held_out: Sequence[dict[str, Tensor]], reference: Tensor
) -> dict[str, float]:
    """Logit error, scores and seconds of the recipe's artifact. truth: logits of the full model on `judged`."""
    result = make(model, variant)
    error = float((logits(model, held_out) - reference).norm() / reference.norm())
    return (
        {"logits": error}
        | summary(by_kind(model, list(exams)))
        | {"seconds": next(step.seconds for step in result.measured if step.name == "quantize")}
    )


def main() -> None:
    """Command line."""
    from transformers import LlavaForConditionalGeneration

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODELS["demo-llava"])
    parser.add_argument("--seeds", type=int, default=2, help="choices of calibration samples")
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--points", type=int, default=20)
    options = parser.parse_args()
    model = LlavaForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32).eval()
    exams = [scene_exam("test", 0, options.scenes, CPU.torch_device), easy_exam(CPU.torch_device)]
    held_out = held_out_batches(recipe(options.model, "awq", 4, 32, 1.0, 0), 64, CPU)
    reference = logits(model, held_out)
    for bits in (4, 3, 2):
        rows: dict[str, list[dict[str, float]]] = {}
        for search in ("linears", "block"):
            variants = (recipe(options.model, "awq", bits, 32, 1.0, seed) for seed in range(options.seeds))
            rows[search] = [
                figures(model, with_search(w, search, options.points), exams, held_out, reference) for w in variants
            ]
            means = "  ".join(f"{name} {mean(row[name] for row in rows[search]):.4f}" for name in rows[search][0])
            print(f"W{bits} {search:8} {means}", flush=True)
        ratios = [b["logits"] / a["logits"] for a, b in zip(rows["linears"], rows["block"], strict=True)]
        print(f"W{bits} block over linears, logits: {mean(ratios):.3f} +- {stdev(ratios) if ratios[1:] else 0:.3f}")


if __name__ == "__main__":
    main()
