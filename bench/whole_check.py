"""Compare the statistics of calibration with those of the whole model: `python -m bench.whole_check FOLDER ...`.

Every FOLDER is a model. GPTQ quantizes all its components in an ordinary export, with samples of the demo data. Each
Hessian that GPTQ gets is computed again from forward passes of transformers' whole model in float32, whose linears have
the quantized weights of the blocks before. A line for every model says `refused` with the reason, or the number of
Hessians, the largest relative difference (it must be below 1e-5), and what the verification of the artifact measured.
`refused` means by `mmq plan`, from the headers alone; an error that comes later is `failed`. `--out F` also writes the
lines to F as JSON after every model, for the table of docs/measurements/families.md.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporter.device import choose
from exporter.errors import MmqError
from exporter.events import ignore
from exporter.methods import gptq
from exporter.model.inference.predict import batches
from exporter.model.processors.processor import load_processor
from exporter.model.source import open_source
from exporter.model.stream import load_whole
from exporter.pipeline.export import export
from exporter.pipeline.preparation import prepare
from exporter.pipeline.samples import calibration_samples
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import load_recipe
from tests.whole_forward import captured_rows, rules, stacks

LIMIT = 1e-5
BATCH = 3


def recipe_for(folder: Path) -> Recipe:
    """GPTQ with 8 bits for every component."""
    family = open_source(str(folder))[1]
    changed = {
        "name": "whole-check",
        "model": {"repo": str(folder)},
        "quantize": [rule.model_dump() for rule in rules(family)],
        "calibration": {"data": "demo", "tasks": list(family.tasks), "samples": 8, "batch": BATCH},
        "gates": (),
    }
    return Recipe.model_validate(load_recipe("llava-w4").model_dump() | changed)


@contextmanager
def recorded() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The Hessian of every call of GPTQ and the weights as an engine uses them, f32 `[rows, in]`, in order."""
    calls: list[tuple[Tensor, Tensor]] = []
    module: Any = gptq
    quantize_linear = module.quantize_linear

    def spy(weight: Tensor, statistics: Any, *rest: Any) -> Any:
        result, notes = quantize_linear(weight, statistics, *rest)
        calls.append((statistics.hessian.clone(), result.as_served()))
        return result, notes

    module.quantize_linear = spy
    try:
        yield calls
    finally:
        module.quantize_linear = quantize_linear


def largest_difference(recipe: Recipe, calls: list[tuple[Tensor, Tensor]]) -> float:
    """Largest relative difference of a Hessian from that of the whole model."""
    plan, checkpoint = prepare(recipe, choose("cpu"))
    inputs = batches(load_processor(checkpoint.folder), plan.family, calibration_samples(plan, ()), BATCH)
    names, cpu, config = list(checkpoint.tensors), torch.device("cpu"), dict(checkpoint.config)
    model = load_whole(plan.family, config, names, checkpoint.read, cpu, torch.float32).eval()
    largest = 0.0
    for (component, modules), (hessian, served) in zip(stacks(plan), calls, strict=True):
        with torch.no_grad():
            rows = captured_rows(model, plan.family, component, modules[0], config, inputs)
        whole = (rows.T @ rows / len(rows)).float()
        largest = max(largest, float((hessian - whole).norm() / whole.norm()))
        linears = [model.get_submodule(plan.family.live_name(module)) for module in modules]
        for linear, weight in zip(linears, served.split([len(linear.weight) for linear in linears]), strict=True):
            linear.weight.data = weight
    return largest


def check(folder: Path) -> dict[str, Any]:
    """Verdict, with its reason or its figures."""
    with tempfile.TemporaryDirectory(prefix="mmq-whole-") as scratch:
        out = Path(scratch) / "artifact"
        try:
            recipe = recipe_for(folder)
            prepare(recipe, choose("cpu"), headers_only=True)
        except MmqError as error:
            return {"verdict": "refused", "reason": " ".join(error.message.split()).replace(str(folder), folder.name)}
        try:
            with recorded() as calls:
                done = export(recipe, out=out, device=choose("cpu"), on_event=ignore, skip_evaluation=True)
        except MmqError as error:
            return {"verdict": "failed", "reason": " ".join(error.message.split())}
        largest, verified = largest_difference(recipe, calls), done.verified
        figures = {"family": done.plan.family.name, "hessians": len(calls), "largest": float(f"{largest:.1e}")}
        checked = {"blocks": verified.blocks, "difference": verified.block_difference, "skipped": verified.skipped}
        return {"verdict": "equal" if largest < LIMIT else "differs", **figures, **checked}


def main() -> None:
    """Check the folders and count the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, metavar="F")
    arguments = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for folder in arguments.folders:
        results[folder.name] = check(folder)
        print(f"{folder.name}: {json.dumps(results[folder.name])}", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    counts = Counter(result["verdict"] for result in results.values())
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    sys.exit(bool(counts["differs"] or counts["failed"]))


if __name__ == "__main__":
    main()
