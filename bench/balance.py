"""Weight of image tokens in calibration (`calibration.vision_weight`): `python bench/balance.py --json out.json`.

Every row is one export of the demo model with a quantized language model, read from its artifact. Weights: 1 weights
all tokens equally, `equal` gives both modalities the same total weight, `gradient` weights them by the sensitivity of
the reply's loss (as MBQ, arXiv 2412.19509, with one ratio for the whole model), 0 ignores image tokens. The figures are
shares of exact greedy answers.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporter.artifact.artifact import Artifact
from exporter.data import places, samples_from
from exporter.device import choose
from exporter.events import ignore
from exporter.model.embedded import MODELS
from exporter.model.families import FAMILIES
from exporter.model.inference.predict import batches
from exporter.model.processors.processor import load_processor
from exporter.pipeline.export import Export, export
from exporter.planning.recipe import Recipe
from tools.demo_training.score import Exam, by_kind, easy_exam, scene_exam, summary

FAMILY = FAMILIES["llava"]
SETTINGS = (("gptq", 4, 32), ("awq", 4, 32), ("gptq", 3, 32), ("awq", 3, 32), ("gptq", 2, 32), ("awq", 2, 32))


def recipe(folder: Path, method: str, bits: int, group: int, weight: float, seed: int) -> Recipe:
    """A recipe that quantizes the language model with `method` and nothing else."""
    return Recipe.model_validate(
        {
            "name": "balance",
            "summary": "one row of a table",
            "model": {"repo": str(folder), "family": "llava"},
            "quantize": [{"component": "language", "method": method, "bits": bits, "group_size": group}],
            "calibration": {"vision_weight": weight, "seed": seed},
            "gates": [],
            "evidence": [{"finding": "none", "figures": "none", "source": "bench/balance.py"}],
        }
    )


def calibration(folder: Path, count: int) -> list[dict[str, Tensor]]:
    """Calibration batches: captions and answers alternate."""
    lists = [samples_from(places(("demo",)), task, "train", count // 2, 0) for task in ("captioning", "vqa")]
    mixed = [sample for pair in zip(*lists, strict=True) for sample in pair]
    return batches(load_processor(folder), FAMILY, mixed, 8)


def shares(model: Any, calibration_batches: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """`equal`: text tokens per image token. `gradient`: sensitivity to image tokens relative to text tokens.

    The sensitivity is the mean absolute gradient of the reply's loss with respect to a block's output, averaged over
    blocks.
    """
    image, tokens = model.config.image_token_index, {True: 0, False: 0}
    outputs: list[Tensor] = []
    ratios: list[float] = []

    def store_output(module: Any, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)
        outputs[-1].retain_grad()

    handles = [block.register_forward_hook(store_output) for block in model.model.language_model.layers]
    for batch in calibration_batches:
        outputs.clear()
        ids, real = batch["input_ids"], batch["attention_mask"].bool()
        last = ((ids == image) * torch.arange(ids.shape[1])).amax(1, keepdim=True)
        labels = ids.masked_fill(~real | (torch.arange(ids.shape[1]) <= last), -100)  # the text after the picture
        model(**batch, labels=labels).loss.backward()
        modalities = {picture: real & ((ids == image) == picture) for picture in (True, False)}
        for picture, mask in modalities.items():
            tokens[picture] += int(mask.sum())
        sizes = [
            [float(o.grad[mask].abs().mean()) for mask in modalities.values()] for o in outputs if o.grad is not None
        ]
        ratios += [picture / text for picture, text in sizes]
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return {"equal": tokens[False] / tokens[True], "gradient": sum(ratios) / len(ratios)}


def make(model: Any, quantized_recipe: Recipe) -> Export:
    """Export with the recipe, and load the artifact's weights into `model`."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "artifact"
        result = export(quantized_recipe, out=out, device=choose("cpu"), on_event=ignore, skip_evaluation=True)
        artifact = Artifact.open(out)
        model.load_state_dict({FAMILY.live_name(name): artifact.read(name) for name in artifact.names()})
    return result


def figures(model: Any, exams: Sequence[Exam], quantized_recipe: Recipe) -> dict[str, float]:
    """Scores of the recipe's artifact."""
    make(model, quantized_recipe)
    return summary(by_kind(model, list(exams)))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Table with settings and weights as rows and figures, averaged over seeds, as columns."""
    lines = ["method bits weight            " + "  ".join(f"{name:>11}" for name in rows[0]["figures"])]
    keys = list(dict.fromkeys((row["method"], row["bits"], row["name"], row["weight"]) for row in rows))
    for key in keys:
        same = [row["figures"] for row in rows if (row["method"], row["bits"], row["name"], row["weight"]) == key]
        means = "  ".join(f"{sum(f[name] for f in same) / len(same):11.3f}" for name in same[0])
        lines.append(f"{key[0]:<6} {key[1]:>4} {key[2]:<9} {key[3]:6.3f}  {means}")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    from transformers import LlavaForConditionalGeneration

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODELS["demo-llava"])
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2, help="draws of calibration samples to average over")
    parser.add_argument("--settings", default="", help="only these settings: gptq-3,awq-2")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = LlavaForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32).eval()
    vision_weights = shares(model, calibration(options.model, 32))
    weights = {"every": 1.0, **vision_weights, "none": 0.0, "threefold": 3.0}
    exams = [scene_exam("test", 0, options.scenes, torch.device("cpu")), easy_exam(torch.device("cpu"))]
    rows: list[dict[str, Any]] = []
    for method, bits, group in SETTINGS:
        if options.settings and f"{method}-{bits}" not in options.settings.split(","):
            continue
        for name, weight in weights.items():
            for seed in range(options.seeds):
                scores = figures(model, exams, recipe(options.model, method, bits, group, weight, seed))
                rows.append({"method": method, "bits": bits, "name": name, "weight": weight, "seed": seed})
                rows[-1]["figures"] = scores
            print(table(rows[-options.seeds :]).splitlines()[-1], flush=True)
            if options.json:
                options.json.write_text(json.dumps({"scenes": options.scenes, "rows": rows}, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
