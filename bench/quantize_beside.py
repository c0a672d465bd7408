"""Comparison of mmq's GPTQ with llm-compressor's: same weights, samples, settings and test data.

Used by `bench/quantize.py --peer PYTHON`. For every draw of calibration samples and every range search, both quantize
the language model: mmq in this process, llm-compressor in the environment of the given Python
(`bench/quantize_peer.py`). The errors are measured on held-out samples, as relative norms: of every linear's output on
the inputs from the full-precision model (mean and worst), and of the logits of the whole model. Both weights are first
rounded to the checkpoint's 16-bit dtype, as in an engine.
"""

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.quantize_phase import inputs_of, phase
from exporter import data
from exporter.device import Device, release
from exporter.dtypes import FLOAT16
from exporter.model.embedded import MODELS
from exporter.model.inference.forward_hooks import watch_inputs
from exporter.model.inference.predict import batches
from exporter.model.processors.processor import load_processor
from exporter.model.stream import load_whole
from exporter.pipeline.preparation import prepare
from exporter.pipeline.samples import test_sources
from exporter.planning.plan import PlanRow
from exporter.planning.recipe import Recipe
from exporter.quantization.block import Block
from exporter.quantization.workdir import Workdir

ROOT = Path(__file__).resolve().parent.parent
Batch = dict[str, Tensor]
Weights = Mapping[str, Tensor]  # by live name

RANGES = {"minmax": "memoryless_minmax", "mse": "memoryless_mse"}  # mmq's name: llm-compressor's
MMQ, PEER = "mmq", "llm-compressor"
ERRORS = ("linears", "worst", "logits")
COSTS = ("seconds", "device_gib", "host_gib")


@dataclass(frozen=True)
class Setting:
    """Settings of the comparison. group: columns that share a scale. test_samples: number of test samples. cache: cache
    folder for the peer's results, or None."""

    python: str
    group: int
    seeds: int
    test_samples: int
    cache: Path | None = None


def language_only(recipe: Recipe, group: int, range_: str, seed: int) -> Recipe:
    """A recipe that quantizes the language model with W4 GPTQ, with options that the peer also supports."""
    rule = {"component": "language", "method": "gptq", "bits": 4, "group_size": group, "options": {"range": range_}}
    changed = recipe.adjusted(calibration={"seed": seed})
    return Recipe.model_validate(changed.model_dump() | {"quantize": [rule]})


@contextmanager
def at_once() -> Iterator[None]:
    """Make mmq calibrate all linears of a block before it quantizes any of them, as the peer does."""

    gather, before = Block.gather, dict[int, dict[str, Any]]()

    def gather_once(block: Block, rows: Sequence[PlanRow]) -> dict[str, Any]:
        if block.unit.index not in before:
            before.clear()
            before[block.unit.index] = gather(block, block.unit.rows)
        statistics = before[block.unit.index]
        return {row.linear: statistics[row.linear] for row in rows if row.linear in statistics}

    with patch.object(Block, "gather", gather_once):
        yield


def held_out_batches(recipe: Recipe, count: int, device: Device) -> list[Batch]:
    """Batches of the test split of the recipe's tasks, about `count` samples in total."""
    plan, checkpoint = prepare(recipe, device)
    tasks = recipe.calibration.tasks
    places = test_sources(plan.recipe)
    samples = [s for task in tasks for s in data.samples_from(places, task, "test", -(-count // len(tasks)), 0)]
    return batches(load_processor(checkpoint.folder), plan.family, samples, recipe.calibration.batch)


def own_run(recipe: Recipe, inputs: Sequence[Batch], device: Device, work: Path) -> tuple[dict[str, Any], Weights]:
    """mmq's figures and weights."""
    plan, _ = prepare(recipe, device)
    figures = phase(recipe, inputs, device, work)
    workdir = Workdir.open(work, {"bench": str(work)})
    weights = {
        plan.family.live_name(name): linear.dequantize().cpu()
        for unit in plan.units
        for name, linear in workdir.read(unit).linears.items()
    }
    release(device)
    return figures, weights


def peer_run(
    setting: Setting, model: Path, observer: str, inputs: Sequence[Batch], device: Device, folder: Path
) -> tuple[dict[str, Any], Weights]:
    """llm-compressor's figures and weights on the same folder and samples."""
    model, folder = model.resolve(), folder.resolve()  # the peer starts in a folder of its own
    figures, out = folder / "figures.json", folder / "peer.safetensors"
    if not figures.exists():
        flat = {f"{i}.{name}": tensor.contiguous() for i, batch in enumerate(inputs) for name, tensor in batch.items()}
        save_file(flat, folder / "inputs.safetensors")
        command = [
            setting.python,
            "-m",
            "bench.quantize_peer",
            str(model),
            str(folder / "inputs.safetensors"),
            str(out),
        ]
        command += ["--group", str(setting.group), "--observer", observer, "--device", device.kind]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if process.returncode:
            raise SystemExit(
                f"the peer failed ({process.returncode}): {process.stdout[-2000:]}{process.stderr[-4000:]}"
            )
        figures.write_text(process.stdout.splitlines()[-1])
    return json.loads(figures.read_text()), load_file(out)


class ErrorMeasure:
    """The full-precision model on held-out batches; computes the error of quantized weights."""

    def __init__(self, recipe: Recipe, held_out: Sequence[Batch], device: Device) -> None:
        plan, checkpoint = prepare(recipe, device)
        place, dtype = device.torch_device, device.compute_dtype(FLOAT16).torch
        tensors, config = checkpoint.tensors, checkpoint.config
        rows = [row for unit in plan.units for row in unit.rows if row.rule]
        self.stored = rows[0].tensor.dtype.torch
        self.model = load_whole(plan.family, config, tensors, checkpoint.read, place, dtype)
        self.linears = {
            name: self.model.get_submodule(name) for name in (plan.family.live_name(r.module) for r in rows)
        }
        self.batches = [
            {name: t.to(place, dtype if t.is_floating_point() else None) for name, t in batch.items()}
            for batch in held_out
        ]

    @torch.inference_mode()
    def __call__(self, weights: Weights) -> dict[str, float]:
        """Relative errors of linears (mean, worst) and logits; restores the model's weights."""
        quantized = {name: weights[name].to(linear.weight.device, self.stored) for name, linear in self.linears.items()}
        error, norm = dict.fromkeys(quantized, 0.0), dict.fromkeys(quantized, 0.0)
        logit_error = logit_norm = 0.0
        for batch in self.batches:
            real = batch["attention_mask"].bool()

            def add_errors(name: str, x: Tensor, real: Tensor = real) -> None:
                rows = _without_padding(x, real).float()
                weight = self.linears[name].weight.float()
                norm[name] += float((rows @ weight.T).double().square().sum())
                error[name] += float((rows @ (quantized[name].float() - weight).T).double().square().sum())

            with watch_inputs(self.linears, add_errors, stop=False):
                reference = _without_padding(self.model(**batch).logits.float(), real)
            with self._with_weights(quantized):
                logits = _without_padding(self.model(**batch).logits.float(), real)
            logit_error += float((logits - reference).double().square().sum())
            logit_norm += float(reference.double().square().sum())
        ratios = [(error[name] / norm[name]) ** 0.5 for name in quantized]
        return {"linears": mean(ratios), "worst": max(ratios), "logits": (logit_error / logit_norm) ** 0.5}

    @contextmanager
    def _with_weights(self, quantized: Weights) -> Iterator[None]:
        before = {name: linear.weight.data for name, linear in self.linears.items()}
        try:
            for name, linear in self.linears.items():
                linear.weight.data = quantized[name].to(before[name].dtype)
            yield
        finally:
            for name, linear in self.linears.items():
                linear.weight.data = before[name]


def _without_padding(x: Tensor, real: Tensor) -> Tensor:
    """Rows of x, `[batch, tokens, width]` or `[batch * tokens, width]`, without padding."""
    return x.reshape(len(real), -1, x.shape[-1])[:, -real.shape[1] :][real]


def beside_peer(recipe: Recipe, setting: Setting, device: Device, scratch: Path) -> list[dict[str, Any]]:
    """One row of figures per range search, draw of samples, and side."""
    held_out = held_out_batches(recipe, setting.test_samples, device)
    measure = ErrorMeasure(language_only(recipe, setting.group, "mse", 0), held_out, device)
    return [
        row
        for name in RANGES
        for seed in range(setting.seeds)
        for row in _pair(language_only(recipe, setting.group, name, seed), name, setting, measure, device, scratch)
    ]


def _pair(
    recipe: Recipe, range_: str, setting: Setting, measure: ErrorMeasure, device: Device, scratch: Path
) -> Iterator[dict[str, Any]]:
    seed = recipe.calibration.seed
    _, inputs = inputs_of(recipe, device)
    folder = (setting.cache or scratch) / f"{range_}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    figures, weights = own_run(recipe, inputs, device, scratch / f"own-{range_}-{seed}")
    yield {"range": range_, "seed": seed, "side": MMQ} | figures | measure(weights)
    model = MODELS.get(recipe.model.repo) or Path(recipe.model.repo)
    figures, weights = peer_run(setting, model, RANGES[range_], inputs, device, folder)
    yield {"range": range_, "seed": seed, "side": PEER} | figures | measure(weights)


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Table of means over the draws, and of mmq relative to the peer (mean and standard deviation over draws)."""
    lines = [f"{'ranges':8}{'side':17}" + "".join(f"{name:>16}" for name in (*ERRORS, *COSTS))]
    for range_ in dict.fromkeys(row["range"] for row in rows):
        sides = {side: [r for r in rows if r["range"] == range_ and r["side"] == side] for side in (MMQ, PEER)}
        for side, side_rows in sides.items():
            cells = "".join(f"{mean(row[name] for row in side_rows):16.4f}" for name in (*ERRORS, *COSTS))
            lines.append(f"{range_:8}{side:17}{cells}")
        pairs = list(zip(sides[MMQ], sides[PEER], strict=True))
        cells = "".join(f"{_ratio([(a[name], b[name]) for a, b in pairs]):>16}" for name in (*ERRORS, *COSTS))
        lines.append(f"{range_:8}{'mmq as a share':17}{cells}")
    return "\n".join(lines)


def _ratio(pairs: Sequence[tuple[float, float]]) -> str:
    if not all(peer for _, peer in pairs):
        return "-"
    ratios = [mmq / peer for mmq, peer in pairs]
    return f"{mean(ratios):.3f} +- {stdev(ratios) if len(ratios) > 1 else 0:.3f}"
