"""Methods and tools at few bits under one judge: how far are the next tokens from those at full precision?

    python -m bench.peers --model demo-llava --bits 3 2 --methods rtn gptq awq --draws 3
    python -m bench.peers --model demo-blip2 --component vision --bits 2 --methods gptq
    python -m bench.peers --model demo-llava --bits 2 --autoround PYTHON --llmcompressor PYTHON --json out.json
    python -m bench.peers --model demo-llava --artifact FOLDER
    python -m bench.peers --model demo-llava --caches fp8 int8_per_token_head
    python -m bench.peers --model FOLDER --data drawings --prompts smollm2 --prose Rdata.rdb --group 64

Quantizes one component with every method, for several draws of calibration samples, and measures on test samples: the
Kullback-Leibler divergence of the next token from the full-precision model, a mean over reply tokens, captions and
answers weighing the same, with its standard error over samples and its mean without the largest 1 %, and the share of
captions that greedy decoding returns exactly. Weights are first rounded to the checkpoint's 16 bits. PYTHON is the
interpreter of an environment that `bench/peers_environment.sh` builds; the tools quantize the language model only, on
the same samples (`bench/peers_tools.py`). --artifact judges a folder that `mmq export` wrote. --caches judges caches of
fewer bits, as on a GPU, with full weights. --prose also measures the perplexity of a novel
(`bench/smollm2_llava.py`).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.ideas import IDEAS
from bench.peers_figures import divergences, table
from bench.peers_inputs import write_language_model
from bench.quantize_phase import inputs_of
from bench.smollm2_model import perplexity
from bench.smollm2_rows import PROMPTS as SMOLLM2_PROMPTS
from bench.smollm2_rows import UNSEEN, novels, prose_rows
from exporter import data
from exporter.artifact.artifact import Artifact
from exporter.device import Device, choose, exact_math, synchronize
from exporter.events import ignore
from exporter.model.processors.processor import load_processor
from exporter.model.stream import load_whole
from exporter.numerics.activation_rounding import ServedRounding, round_as_served
from exporter.numerics.kv_caches import BY_FLAG
from exporter.pipeline.preparation import prepare
from exporter.pipeline.samples import test_sources
from exporter.planning.recipe import Recipe
from exporter.quantization import calibrate
from exporter.quantization.workdir import Workdir
from exporter.study import exam

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("captioning", "vqa")
PROSE_ROWS = 64  # of 512 tokens
Weights = Mapping[str, Tensor]  # by live name
METHODS: dict[str, dict[str, Any]] = {  # name in the table -> the rule's keys
    "rtn": {"method": "rtn"},
    "rtn-signed": {"method": "rtn", "options": {"range": "signed"}},
    "gptq": {"method": "gptq"},
    "gptq-signed": {"method": "gptq", "options": {"range": "signed"}},
    "gptq-signed-damped": {"method": "gptq", "options": {"range": "signed", "damping": 0.1}},
    "gptq-corrected": {"method": "gptq", "options": {"correct": True}},
    "gptq-signed-corrected": {"method": "gptq", "options": {"range": "signed", "correct": True}},
    "gptq-signed-corrected-damped": {
        "method": "gptq",
        "options": {"range": "signed", "correct": True, "damping": 0.1},
    },
    "gptq-learned": {"method": "gptq", "options": {"range": "signed", "steps": 200}},
    "gptq-learned-positive": {"method": "gptq", "options": {"steps": 200}},
    "awq": {"method": "awq"},
    "awq-clip": {"method": "awq", "options": {"range": "clip"}},
    "awq-mse": {"method": "awq", "options": {"range": "mse"}},
    "awq-noclip": {"method": "awq", "options": {"clip": False}},
    "gptq-folded": {"method": "gptq", "fold": "awq"},
    "gptq-signed-folded": {"method": "gptq", "fold": "awq", "options": {"range": "signed"}},
    "autoround": {"method": "autoround"},
    "autoround-folded": {"method": "autoround", "fold": "awq"},
    "autoround-600": {"method": "autoround", "options": {"steps": 600}},
    "autoround-1000": {"method": "autoround", "options": {"steps": 1000}},
    "gptq-asym": {"method": "gptq", "symmetric": False},
    "autoround-asym": {"method": "autoround", "symmetric": False},
    **{name: rule for name, (rule, _) in IDEAS.items()},
}


PROMPTS: dict[str, Mapping[str, str]] = {"family": {}, "smollm2": SMOLLM2_PROMPTS}  # by the name of an option


def recipe_of(options: argparse.Namespace, rule: Mapping[str, Any], seed: int, prompts: str) -> Recipe:
    """A recipe that quantizes one component of a demo model, or of a folder, and nothing else.

    prompts: a key of `PROMPTS`, those of calibration or of the judge.
    """
    calibration = {"tasks": list(TASKS), "samples": options.samples, "seed": seed}
    return Recipe.model_validate(
        {
            "name": "peers",
            "model": {"repo": options.model},
            "quantize": [{"component": options.component, **rule}],
            "calibration": {"data": options.data, **calibration},
            "evaluation": {"data": options.data},
            "prompts": PROMPTS[prompts],
        }
    )


class Judge:
    """The full-precision model, and test samples on which other weights are compared with it.

    stored: the dtype to which weights are rounded before they are judged. prose: a file of novels, for perplexity.
    split: of the samples; methods and their settings are chosen on "validation".
    """

    def __init__(
        self, recipe: Recipe, count: int, device: Device, prose: Path | None = None, split: str = "test"
    ) -> None:
        plan, checkpoint = prepare(recipe, device)
        places, processor = test_sources(recipe), load_processor(checkpoint.folder)
        # Questions of easy-VQA, which are half as many as those of scenes, are unlike the calibration samples.
        samples = {}
        for task in TASKS:
            mixed = data.samples_from(places, task, split, min(1000, 2 * count), 0)
            samples[task] = [sample for sample in mixed if not sample.identity.startswith("easy-vqa")][:count]
        self._place = device.torch_device
        self._exam = exam.prepare(processor, plan.family, samples, 50)
        names, config = checkpoint.tensors, checkpoint.config
        self.model = load_whole(plan.family, config, names, checkpoint.read, self._place, torch.float32)
        self.stored = next(row.tensor.dtype.torch for row in plan.rows if row.linear)
        self._full = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self._exam.learn(self.model, self._place)
        self._prose = prose_rows(novels(prose)[UNSEEN], processor.tokenizer, 512)[:PROSE_ROWS] if prose else None

    def __call__(self, weights: Weights) -> dict[str, float]:
        """Those of `divergences`, `captions`: the share of exact captions, and `perplexity` of the prose, if any."""
        rounded = {name: tensor.to(self.stored).to(self._place, torch.float32) for name, tensor in weights.items()}
        self.model.load_state_dict(rounded, strict=False)
        graded = {task: part.grade(self.model, self._place) for task, part in self._exam.tasks.items()}
        figures = divergences([metrics["kl"] for metrics in graded.values()])
        figures["captions"] = mean(graded["captioning"]["exact"])
        if self._prose is not None:
            figures["perplexity"] = perplexity(self.model, self._prose)
        self.model.load_state_dict(self._full)
        return figures


def own_weights(recipe: Recipe, inputs: Sequence[dict[str, Tensor]], device: Device) -> tuple[Weights, float]:
    """The weights that mmq quantizes, dequantized, by live name, and the seconds it took."""
    plan, checkpoint = prepare(recipe, device)
    with tempfile.TemporaryDirectory() as work:
        workdir = Workdir.open(Path(work), {"bench": work})
        start = time.perf_counter()
        with exact_math(recipe.calibration.seed):
            calibrate.run(plan, checkpoint, workdir, inputs, device, ignore)
        synchronize(device)
        seconds = time.perf_counter() - start
        weights: dict[str, Tensor] = {}
        for unit in plan.units:
            result = workdir.read(unit)
            weights |= {f"{name}.weight": linear.as_served() for name, linear in result.linears.items()}
            weights |= result.altered
    return {plan.family.live_name(name): tensor for name, tensor in weights.items()}, seconds


class ToolError(Exception):
    """Another tool failed on a model; the comparison goes on without it."""


def tool_weights(
    python: str, tool: str, rule: Mapping[str, Any], recipe: Recipe, inputs: Sequence[dict[str, Tensor]], device: Device
) -> tuple[Weights, float]:
    """The weights that another tool quantizes, dequantized, by live name, and its seconds; ToolError when it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_language_model(recipe, inputs, Path(scratch) / "model", device)
        out = Path(scratch) / "out.safetensors"
        command = [python, "-m", "bench.peers_tools", tool.removeprefix("tool-"), str(folder), str(out)]
        command += ["--bits", str(rule["bits"]), "--group", str(rule["group_size"])]
        command += ["--device", device.torch_device.type]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ToolError(f"{tool} failed ({done.returncode}): {done.stdout[-2000:]}{done.stderr[-4000:]}")
        weights = load_file(out)
        if any(not on_grid(weight, **rule) for name, weight in weights.items() if weight.ndim == 2):
            raise ToolError(f"{tool} left weights in full precision")
        return weights, float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def on_grid(weight: Tensor, bits: int, group_size: int, **rule: Any) -> bool:
    """Whether every group of the first 16 rows of a weight `[out, in]` has at most `2 ** bits` different values."""
    groups = weight[:16].unflatten(-1, (-1, group_size)).sort(-1).values
    return bool((groups.diff(dim=-1) != 0).sum(-1).max() < 2**bits)


def tools_of(options: argparse.Namespace) -> dict[str, str]:
    """Name of a run of another tool -> the interpreter of its environment."""
    tools = dict.fromkeys(options.autoround_runs, options.autoround) if options.autoround else {}
    return tools | (dict.fromkeys(options.llmcompressor_runs, options.llmcompressor) if options.llmcompressor else {})


def measure(options: argparse.Namespace, device: Device, judge: Judge) -> list[dict[str, Any]]:
    """A row of figures for every method or tool, bits and draw; each row is printed when it is measured."""
    rows: list[dict[str, Any]] = []
    group: int | str = int(options.group) if options.group.isdigit() else options.group
    about = {name: getattr(options, name) for name in ("component", "samples", "calibration_prompts")}
    about |= {"model": options.name, "group": group, "split": options.split}
    for draw in range(options.first_draw, options.first_draw + options.draws):
        prompts = options.calibration_prompts
        plain = recipe_of(options, {"method": "gptq", "bits": 4}, draw, prompts)
        _, inputs = inputs_of(plain, device)
        for bits in options.bits:
            for name in [*options.methods, *tools_of(options)]:
                rule = {**METHODS.get(name, {}), "bits": bits, "group_size": group}
                try:
                    if name in METHODS:
                        with IDEAS[name][1]() if name in IDEAS else nullcontext():
                            weights, seconds = own_weights(recipe_of(options, rule, draw, prompts), inputs, device)
                    else:
                        weights, seconds = tool_weights(tools_of(options)[name], name, rule, plain, inputs, device)
                except ToolError as error:
                    print(error, file=sys.stderr, flush=True)
                    continue
                rows.append({**about, "bits": bits, "method": name, "draw": draw, **judge(weights), "seconds": seconds})
                record(rows[-1], options.lines)
    return rows


def record(row: Mapping[str, Any], lines: Path | None) -> None:
    """Print one row of figures, and append it to the file `lines`, which several processes may share."""
    print(json.dumps(row), flush=True)
    if lines:
        with lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-llava", help="an embedded model or a folder")
    parser.add_argument("--name", help="of the model in the rows of figures; default: --model")
    parser.add_argument("--component", default="language")
    parser.add_argument("--bits", type=int, nargs="+", default=[3])
    parser.add_argument("--group", default="32", help="columns that share a scale, or `row`")
    parser.add_argument("--methods", nargs="*", default=[], choices=METHODS)
    parser.add_argument("--data", default="demo", choices=("demo", "drawings"))
    parser.add_argument("--prompts", default="family", choices=PROMPTS, help="of the judge")
    parser.add_argument("--calibration-prompts", choices=PROMPTS, help="default: those of the judge")
    parser.add_argument("--prose", type=Path, help="Rdata.rdb of r-cran-janeaustenr")
    parser.add_argument("--draws", type=int, default=3, help="draws of calibration samples")
    parser.add_argument("--first-draw", type=int, default=0)
    parser.add_argument("--samples", type=int, default=128, help="calibration samples")
    parser.add_argument("--split", default="test", choices=("test", "validation"), help="the judge's samples")
    parser.add_argument("--test-samples", type=int, default=300, help="test samples of each task")
    parser.add_argument("--autoround", help="Python of an environment with AutoRound")
    parser.add_argument("--autoround-runs", nargs="*", default=["tool-autoround-200", "tool-autoround-1000"])
    parser.add_argument("--llmcompressor", help="Python of an environment with llm-compressor")
    parser.add_argument(
        "--llmcompressor-runs", nargs="*", default=["tool-llmcompressor-gptq", "tool-llmcompressor-awq"]
    )
    parser.add_argument("--artifact", type=Path, help="judge this artifact of --model instead")
    parser.add_argument("--caches", nargs="*", default=[], choices=["fp8", *BY_FLAG])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--lines", type=Path, help="append each row of figures to this file")
    options = parser.parse_args()
    options.calibration_prompts = options.calibration_prompts or options.prompts
    options.name = options.name or options.model
    device = choose(options.device)
    plain = recipe_of(options, {"method": "rtn", "bits": 8}, 0, options.prompts)
    judge = Judge(plain, options.test_samples, device, options.prose, options.split)
    record({"model": options.name, "method": "full precision", "split": options.split, **judge({})}, options.lines)
    if options.artifact:
        artifact, family = Artifact.open(options.artifact), prepare(plain, device)[0].family
        print(json.dumps(judge({family.live_name(name): artifact.read(name) for name in artifact.names()})))
        return
    for cache in options.caches:
        round_as_served(judge.model, ServedRounding(kv_cache=cache), gpu=True)
        record({"model": options.name, "method": f"cache {cache}", **judge({})}, options.lines)
    if options.caches:
        return
    rows = measure(options, device, judge)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
