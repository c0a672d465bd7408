"""What tells AWQ a good scale: the outputs of the linears, or of the whole block? Both, on the demo model.

    python -m bench.awq_search [--seeds 2] [--scenes 300] [--points 20]

The language model alone by AWQ in groups of 32, with each `search`, for some choices of calibration samples. Printed:
the error of the logits on test samples (relative size, against the full model), what the tasks score, seconds of the
quantization phase.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from bench.balance import FAMILY, recipe
from bench.quantize_beside import judged_on
from exporter.artifact import Artifact
from exporter.demo import MODELS
from exporter.demo.score import Exam, by_kind, easy_exam, scene_exam, summary
from exporter.device import choose
from exporter.export import export
from exporter.families.llava import live_name
from exporter.recipe import Recipe

CPU = choose("cpu")


def searched(wanted: Recipe, search: str, points: int) -> Recipe:
    """The recipe with one `search`."""
    rule = wanted.quantize[0].model_dump() | {"options": {"search": search, "points": points}}
    return Recipe.model_validate(wanted.model_dump() | {"quantize": [rule]})


@torch.no_grad()
def logits(model: Any, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """Of all tokens that no mask hides, f32 `[tokens, vocabulary]`."""
    return torch.cat([FAMILY.outputs(model, batch)[batch["attention_mask"].bool()] for batch in batches])


def figures(model: Any, wanted: Recipe, exams: Sequence[Exam], judged: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Scores, error and seconds of the artifact that the recipe makes; the model is as before afterwards."""
    whole, truth = {name: tensor.clone() for name, tensor in model.state_dict().items()}, logits(model, judged)
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "artifact"
        done = export(wanted, out=out, device=CPU, on_event=lambda event: None, skip_evaluation=True)
        artifact = Artifact.open(out)
        model.load_state_dict({live_name(name): artifact.read(name) for name in artifact.names()})
    found = {"logits": float((logits(model, judged) - truth).norm() / truth.norm())}
    found |= summary(by_kind(model, list(exams))) | {"seconds": done.seconds["quantize"]}
    model.load_state_dict(whole)
    return found


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
    judged = judged_on(recipe(options.model, "awq", 4, 32, 1.0, 0), 64, CPU)
    for bits in (4, 3, 2):
        rows: dict[str, list[dict[str, float]]] = {}
        for search in ("linears", "block"):
            wanted = (recipe(options.model, "awq", bits, 32, 1.0, seed) for seed in range(options.seeds))
            rows[search] = [figures(model, searched(w, search, options.points), exams, judged) for w in wanted]
            shown = "  ".join(f"{name} {mean(row[name] for row in rows[search]):.4f}" for name in rows[search][0])
            print(f"W{bits} {search:8} {shown}", flush=True)
        shares = [b["logits"] / a["logits"] for a, b in zip(rows["linears"], rows["block"], strict=True)]
        print(f"W{bits} block over linears, logits: {mean(shares):.3f} +- {stdev(shares) if shares[1:] else 0:.3f}")


if __name__ == "__main__":
    main()
