"""Time and memory of the quantization phase by term, and its error beside llm-compressor's.

    python -m bench.quantize --header llava-hf--llava-1.5-7b-hf --recipe bench/recipes/llava-w4-vit8-gptq.yaml
    python -m bench.quantize --header Salesforce--blip2-opt-2.7b --recipe RECIPE --blocks 4
    python -m bench.quantize --model demo-llava --peer /path/to/python --group 32

A header gives true shapes with random weights (--blocks: only the first of each part); --model takes a folder or an
embedded model. The phase runs twice, once untouched for its time and memory, and once with a clock around each term.
With --peer, the language model alone is quantized by both at equal settings, on the same weights and samples: mmq in
this process, llm-compressor in the environment of the given Python (`bench/quantize_peer.py`). Errors are then
measured by one judge: inputs of every linear from the full-precision model, and the logits of the whole model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.memory import Watch
from bench.random_checkpoint import write
from exporter import calibrate, flow, job, moments, smooth
from exporter.backends import load_processor
from exporter.demo import MODELS
from exporter.device import Device, choose, exact_math, peak_bytes, release, reset_peak, synchronize
from exporter.events import ignore
from exporter.export import calibration_samples, prepare
from exporter.methods import awq, gptq, rtn
from exporter.plan import Plan
from exporter.predict import batches
from exporter.recipe import Recipe
from exporter.recipe_file import load_recipe
from exporter.stream import load_whole, watch_inputs
from exporter.workdir import Workdir

TERMS: tuple[tuple[str, Any, str], ...] = (
    ("forward passes", flow.Flow, "run"),
    ("Hessians", moments.Statistics, "update"),
    ("errors for the report", moments.Statistics, "energy"),
    ("factorizations", gptq, "inverse_factor"),
    ("ranges", gptq, "fit_scale"),
    ("ranges", rtn, "fit_scale"),
    ("column loops", gptq, "_walk"),
    ("search of scales", awq, "find_scales"),
    ("search of scales", awq, "_clip"),
    ("folds", smooth, "fold"),
    ("inputs of components", calibrate, "arrive"),
    ("reading weights", job.Job, "read"),
    ("writing units", job.Job, "settle"),
)
GIB = 2**30


class Terms:
    """Seconds of each term, without those of the terms inside it."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._open: list[str] = []
        self._last = 0.0
        self.seconds: dict[str, float] = {}

    def _lap(self) -> None:
        synchronize(self._device)
        now = time.perf_counter()
        name = self._open[-1] if self._open else "the rest"
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time booked under `name`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._lap()
            self._open.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                self._lap()
                self._open.pop()

        return timed

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time everything inside the block."""
        with ExitStack() as stack:
            for name, owner, attribute in TERMS:
                timed = self.around(name, getattr(owner, attribute))
                stack.enter_context(mock.patch.object(owner, attribute, timed))
            synchronize(self._device)
            self._last = time.perf_counter()
            yield
            self._lap()


def phase(
    recipe: Recipe, inputs: Sequence[dict[str, Tensor]], device: Device, work: Path, terms: Terms | None = None
) -> dict[str, Any]:
    """The quantization phase once: seconds, peaks, and the worst and mean error of linears on their own inputs."""
    plan, checkpoint = prepare(recipe, device)
    workdir = Workdir.open(work, {"bench": str(work)})
    release(device)
    reset_peak(device)
    with Watch() as host, exact_math(0), ExitStack() as stack:
        if terms:
            stack.enter_context(terms.running())
        start = time.perf_counter()
        calibrate.run(plan, checkpoint, workdir, inputs, device, ignore)
        synchronize(device)
        seconds = time.perf_counter() - start
    errors = [error for unit in plan.units for error in workdir.read_notes(unit)[0].values()]
    return {
        "seconds": seconds,
        "device_gib": peak_bytes(device)[0] / GIB,
        "device_predicted_gib": plan.memory.device_bytes / GIB,
        "host_gib": host.peak / GIB,
        "mean_error": sum(errors) / len(errors),
        "worst_error": max(errors),
    }


def inputs_of(recipe: Recipe, device: Device) -> tuple[Plan, list[dict[str, Tensor]]]:
    """The recipe's plan and calibration batches."""
    plan, checkpoint = prepare(recipe, device)
    samples = calibration_samples(plan, ())
    return plan, batches(load_processor(checkpoint.folder), plan.family, samples, recipe.calibration.batch)


def language_only(recipe: Recipe, group: int, range_: str) -> Recipe:
    """W4 in groups for the language model by GPTQ, with what the peer can do too."""
    rule = {"component": "language", "method": "gptq", "bits": 4, "group_size": group, "options": {"range": range_}}
    return Recipe.model_validate(recipe.model_dump() | {"quantize": [rule]})


def peer_run(python: str, model: Path, inputs: Sequence[dict[str, Tensor]], place: Path, options: list[str]) -> Any:
    """llm-compressor on the same folder and samples; its figures, and where its weights are."""
    flat = {f"{i}.{name}": tensor.contiguous() for i, batch in enumerate(inputs) for name, tensor in batch.items()}
    save_file(flat, place / "inputs.safetensors")
    script = Path(__file__).with_name("quantize_peer.py")
    command = [python, str(script), str(model), str(place / "inputs.safetensors"), str(place / "peer.safetensors")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the peer failed ({done.returncode}): {done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def judge(
    recipe: Recipe, sides: Mapping[str, Mapping[str, Tensor]], inputs: Sequence[dict[str, Tensor]], device: Device
) -> dict[str, dict[str, float]]:
    """Errors of several sets of weights, by live name: of linears' outputs and of the logits, relative sizes."""
    plan, checkpoint = prepare(recipe, device)
    dtype, place = device.compute_dtype(torch.float16), device.torch_device
    model = load_whole(plan.family, checkpoint.config, checkpoint.tensors, checkpoint.read, place, dtype)
    linears = {name: model.get_submodule(name) for name in next(iter(sides.values()))}
    lost = {side: dict.fromkeys(linears, 0.0) for side in sides}
    whole = dict.fromkeys(linears, 0.0)

    def see(name: str, x: Tensor) -> None:
        rows, weight = x.flatten(0, -2).float(), linears[name].weight.float()
        whole[name] += float((rows @ weight.T).square().sum())
        for side, weights in sides.items():
            lost[side][name] += float((rows @ (weights[name].to(place).float() - weight).T).square().sum())

    batch = {name: t.to(place, dtype if t.is_floating_point() else None) for name, t in inputs[0].items()}
    with torch.inference_mode():
        with watch_inputs(linears, see, stop=False):
            truth = model(**batch).logits.float()
        found = {}
        for side, weights in sides.items():
            for name, linear in linears.items():
                linear.weight.data = weights[name].to(place, dtype)
            real = batch["attention_mask"].bool()
            off = (model(**batch).logits.float() - truth)[real].norm() / truth[real].norm()
            shares = [(lost[side][name] / whole[name]) ** 0.5 for name in linears]
            found[side] = {"linears": sum(shares) / len(shares), "worst": max(shares), "logits": float(off)}
    return found


def beside_peer(python: str, recipe: Recipe, group: int, device: Device, scratch: Path) -> list[dict[str, Any]]:
    """Rows of figures for both, with each search of ranges."""
    rows = []
    for range_, observer in (("minmax", "memoryless_minmax"), ("mse", "memoryless_mse")):
        own = language_only(recipe, group, range_)
        plan, inputs = inputs_of(own, device)
        place = scratch / range_
        place.mkdir()
        done = phase(own, inputs, device, place / "work")
        workdir = Workdir.open(place / "work", {"bench": str(place / "work")})
        ours = {
            plan.family.live_name(name): linear.dequantize(torch.float16 if device.is_cuda else torch.float32).cpu()
            for unit in plan.units
            for name, linear in workdir.read(unit).linears.items()
        }
        release(device)
        model = MODELS.get(own.model.repo) or Path(own.model.repo)
        options = ["--group", str(group), "--observer", observer, "--device", device.torch_device.type]
        theirs = peer_run(python, model, inputs, place, options)
        weights = load_file(place / "peer.safetensors")
        errors = judge(own, {"mmq": ours, "llm-compressor": weights}, inputs, device)
        rows.append({"range": range_, "side": "mmq", **done, **errors["mmq"]})
        rows.append({"range": range_, "side": "llm-compressor", **theirs, **errors["llm-compressor"]})
    return rows


def report(found: dict[str, Any]) -> str:
    """Everything as text."""
    lines = []
    if "phase" in found:
        lines += [f"{name:22} {value:10.3f}" for name, value in found["phase"].items()]
        lines += ["seconds by term (each waited for, so their sum is more than the phase takes)"]
        lines += [f"  {name:22} {value:8.2f}" for name, value in sorted(found["terms"].items(), key=lambda i: -i[1])]
    for row in found.get("peer", []):
        named = ("seconds", "device_gib", "host_gib", "linears", "worst", "logits")
        figures = "  ".join(f"{name} {row[name]:.4f}" for name in named)
        lines.append(f"{row['range']:7} {row['side']:15} {figures}")
    for ours, theirs in zip(found.get("peer", [])[::2], found.get("peer", [])[1::2], strict=True):
        compared = [name for name in ("seconds", "device_gib", "host_gib", "linears", "logits") if theirs[name]]
        shares = "  ".join(f"{name} {ours[name] / theirs[name]:.3f}" for name in compared)
        lines.append(f"{ours['range']:7} mmq as a share: {shares}")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--header", help="true shapes with random weights: a name in tests/headers")
    parser.add_argument("--model", help="a folder, or an embedded model, instead of --header")
    parser.add_argument("--blocks", type=int, default=0, help="only the first blocks of each part")
    parser.add_argument("--recipe", default="bench/recipes/llava-w4-vit8-gptq.yaml")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--peer", help="Python of an environment with llm-compressor")
    parser.add_argument("--group", type=int, default=128, help="columns that share a scale beside the peer")
    parser.add_argument("--only-peer", action="store_true", help="leave the phase by term out")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    device = choose(options.device)
    found: dict[str, Any] = {"device": device.name, "torch": torch.__version__, "python": sys.version.split()[0]}
    with tempfile.TemporaryDirectory() as name:
        scratch, model = Path(name), options.model
        if not model:
            model = str(scratch / "model")
            write(options.header or "llava-hf--llava-1.5-7b-hf", Path(model), str(device.torch_device), options.blocks)
        recipe = load_recipe(options.recipe).adjusted(model={"repo": model}, calibration={"samples": options.samples})
        if not options.only_peer:
            _, inputs = inputs_of(recipe, device)
            found["phase"] = phase(recipe, inputs, device, scratch / "first")
            terms = Terms(device)
            phase(recipe, inputs, device, scratch / "second", terms)
            found["terms"] = terms.seconds
        if options.peer:
            found["peer"] = beside_peer(options.peer, recipe, options.group, device, scratch)
    print(json.dumps(found) if options.json else report(found))


if __name__ == "__main__":
    main()
