"""A small artifact of a random LLaVA, with a report: what publishing needs, without the embedded model."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from exporter.artifact import REPORT, Artifact
from exporter.backends import weights_digest
from exporter.device import choose
from exporter.events import ignore
from exporter.export import export
from exporter.families import FAMILIES
from exporter.recipe import Recipe
from exporter.recipe_file import load_recipe


def tiny_model(folder: Path, seed: int = 0) -> Path:
    """A LLaVA of random weights in hub layout: config.json, shards, one text file."""
    family = FAMILIES["llava"]
    config = dict(family.tiny_config()) | {"architectures": ["LlavaForConditionalGeneration"]}
    torch.manual_seed(seed)
    model = family.skeleton(config)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        family.canonical_name(name): (torch.randn(p.shape) * 0.05).to(torch.float16)
        for name, p in model.named_parameters()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    return folder


def recipe(model: Path, bits: int = 4) -> Recipe:
    """Rounding to nearest, which needs no calibration data."""
    data = load_recipe("llava-w4").model_dump()
    rule = {"component": "language", "method": "rtn", "bits": bits, "group_size": 16}
    data |= {"name": f"rtn-{bits}", "quantize": [rule], "model": {"repo": str(model), "family": "llava"}}
    return Recipe.model_validate(data)


def tiny_artifact(folder: Path, model: Path, bits: int = 4) -> Path:
    """An exported artifact whose gates passed on invented scores."""
    export(recipe(model, bits), out=folder, device=choose("cpu"), on_event=ignore, skip_evaluation=True)
    write_scores(folder, after=0.88)
    return folder


def write_scores(folder: Path, after: float, passed: bool = True) -> None:
    """A report as an evaluation writes it, with the figures given."""
    drop = 0.9 - after
    difference = {"before": 0.9, "after": after, "drop": drop, "low": drop - 0.01, "high": drop + 0.01}
    gate = {"task": "vqa", "metric": "accuracy", "max_drop": 0.03, "decide": "point", "lost": drop / 0.9}
    report: dict[str, Any] = {
        "passed": passed,
        "measures": [{"task": "vqa", "metric": "accuracy", "samples": 500, "difference": difference}],
        "gates": [gate | {"passed": passed}],
        "evaluation": {"models": {"artifact": {"weights": weights_digest(Artifact.open(folder))}}},
    }
    (folder / REPORT).write_text(json.dumps(report))
