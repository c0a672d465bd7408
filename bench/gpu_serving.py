"""Check of every format and scheme that mmq writes with a real vLLM on one GPU, in about two GPU minutes.

    python -m bench.gpu_serving prepare FOLDER      exports, doubled copies and questions, on any machine
    python bench/gpu_replies.py FOLDER NAME ...    answers, on the GPU; one process for several cases
    python -m bench.gpu_serving compare FOLDER      comparison with the reference, on any machine

The comparison of `mmq check` in three steps, so that the GPU runs only engines. Scheme and kernel of every linear come
from the engine's model instead of its log.
"""

import argparse
import json
import shutil
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.serve_variants import HUMMING, LANGUAGE_FP8, MARLIN, VIT8, VIT_FP8, VIT_INT8, W4, XQA
from exporter.artifact.artifact import Artifact
from exporter.data.tasks.sample import Sample, task_of
from exporter.device import choose
from exporter.model.inference.openai_client import png
from exporter.model.inference.predict import prompt_inputs
from exporter.model.processors.processor import load_processor
from exporter.pipeline.export import export
from exporter.pipeline.serving_check import questions
from exporter.planning.recipe import Recipe
from exporter.serving import vllm_blip2
from exporter.serving.check import scheme_problems
from exporter.serving.comparison import CheckSettings, DoubledRun, judge
from exporter.serving.launch import Program
from exporter.serving.negative_control import disturbed_component, double_scales
from exporter.serving.reference import BOUND, Distance
from exporter.serving.vllm_engine import Reply

QUESTIONS = 16
W4A8 = W4 | {"activations": "fp8"}
HEAD8 = {"component": "head", "method": "rtn", "bits": 8, "group_size": 128}
FP8_ALL = [VIT_FP8, LANGUAGE_FP8]
BLOCKS = {"method": "rtn", "bits": 8, "group_size": "block", "number": "fp8"}
NVFP4 = {"method": "gptq", "bits": 4, "group_size": 16, "number": "nvfp4"}
MXFP4 = {"method": "gptq", "bits": 4, "group_size": 32, "number": "mxfp4"}
MXFP8 = {"method": "rtn", "bits": 8, "group_size": 32, "number": "mxfp8"}


@dataclass(frozen=True)
class Case:
    """One artifact. rules, kv_cache: of the recipe. disturb: component whose scales are doubled in the control.

    engine: additional arguments of vLLM.
    """

    rules: Sequence[Mapping[str, Any]]
    format: str = "compressed_tensors"
    model: str = "demo-llava"
    disturb: str | None = None
    kv_cache: str | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)


CASES = {  # most informative first, in case the time runs out
    "w4-vit8": Case([VIT8, W4]),
    "w4-vit8a8": Case([VIT_INT8, W4]),
    "fp8": Case(FP8_ALL),
    "w3": Case([W4 | {"bits": 3}]),
    "gptq-4": Case([W4], "gptq"),
    "awq": Case([W4 | {"method": "awq", "symmetric": False}], "awq"),
    "16-bit": Case([W4 | {"store": "dequantized"}]),
    "w4-asym": Case([W4 | {"symmetric": False}]),
    "w4-head8": Case([VIT_INT8, W4, HEAD8]),
    "w8": Case([VIT8, VIT8 | {"component": "language", "group_size": 128}]),
    "w8a8": Case([VIT_INT8, VIT_INT8 | {"component": "language"}]),
    "w4-vit-fp8": Case([VIT_FP8, W4]),
    "gptq-8": Case([W4 | {"bits": 8}], "gptq"),
    "blip2-qformer": Case(
        [
            VIT_INT8,
            *(VIT8 | {"component": name, "store": "plugin"} for name in ("qformer", "projector")),
            W4,
        ],
        model="demo-blip2",
        disturb="qformer",
    ),
    "w2": Case([W4 | {"bits": 2, "group_size": 32}]),
    "w6": Case([W4 | {"bits": 6}]),
    "w4a8-fp8": Case([VIT_FP8, W4A8]),
    "w4-cache8": Case([VIT8, W4], kv_cache="fp8"),
    "w4a8-cache8": Case([VIT_FP8, W4A8], kv_cache="fp8"),
    "fp8-cache8": Case(FP8_ALL, kv_cache="fp8"),
    "w4-cache-int8": Case([VIT8, W4], kv_cache="int8_per_token_head"),
    "w4-cache-fp8-heads": Case([VIT8, W4], kv_cache="fp8_per_token_head"),
    "nvfp4": Case([{"component": part, **NVFP4} for part in ("vision", "language")]),
    "mxfp4": Case([{"component": part, **MXFP4} for part in ("vision", "language")]),
    "mxfp8": Case([{"component": part, **MXFP8} for part in ("vision", "language")]),
    "fp8-block": Case([{"component": part, **BLOCKS, "activations": "fp8"} for part in ("vision", "language")]),
    **{f"w{n}a8": Case([W4 | {"bits": n, "activations": "int8"}]) for n in (2, 3, 5, 6, 7)},
    "w3-vit-nvfp4": Case([{"component": "vision", **NVFP4}, W4 | {"bits": 3, "activations": "int8"}]),
    "awq-signed": Case([W4 | {"method": "awq"}]),
    "w3-signed": Case([W4 | {"bits": 3, "options": {"range": "signed"}}]),
    "w2-signed": Case([W4 | {"bits": 2, "group_size": 32, "options": {"range": "signed"}}]),
    "w4-marlin": Case([VIT8, W4], engine=MARLIN),
    "w4-humming": Case([VIT8, W4], engine=HUMMING),
    "w4-humming-cache8-xqa": Case([VIT8, W4], kv_cache="fp8", engine=HUMMING | XQA),
    "fp8-cache8-xqa": Case(FP8_ALL, kv_cache="fp8", engine=XQA),
    "fp8-vit16-cache8-xqa": Case([LANGUAGE_FP8], kv_cache="fp8", engine=XQA),
    "fp8-vit8a8-cache8-xqa": Case([VIT_INT8, LANGUAGE_FP8], kv_cache="fp8", engine=XQA),
}


def recipe(name: str) -> Recipe:
    """The recipe of a case."""
    case = CASES[name]
    data = {
        "name": name,
        "summary": "a case of bench/gpu_serving.py",
        "model": {"repo": case.model, "family": case.model.removeprefix("demo-")},
        "quantize": [dict(rule) for rule in case.rules],
        "calibration": {"data": "demo", "tasks": ["captioning", "vqa"], "samples": 16, "batch": 8, "seed": 0},
        "format": case.format,
        "kv_cache": case.kv_cache,
        "evidence": [{"finding": "a case of a bench", "figures": "its table", "source": "bench/gpu_serving.py"}],
        "gates": [],
    }
    return Recipe.model_validate(data)


def prepare(folder: Path, name: str) -> str:
    """Write the artifact of a case, its copy with doubled scales, and the questions as token ids and pictures."""
    out = folder / name / "artifact"
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(vllm_blip2.__file__, folder / "mmq_vllm_blip2.py")
    export(recipe(name), out=out, device=choose("cpu"), on_event=lambda event: None, skip_evaluation=True)
    artifact = Artifact.open(out)
    component = disturbed_component(artifact, CASES[name].disturb)
    if component:
        double_scales(artifact, out, component, folder / name / "doubled")
        for path in (folder / name / "doubled").iterdir():
            if path.is_symlink():  # the folder is copied to another machine
                target = path.resolve().read_bytes()
                path.unlink()
                path.write_bytes(target)
    processor, question_list = load_processor(out), []
    for sample in questions(out, (), QUESTIONS):
        longest = artifact.family.max_new_tokens[task_of(sample)]
        question_list.append({"ids": ids_of(artifact, processor, sample), "png": picture(sample), "longest": longest})
    (folder / name / "questions.json").write_text(json.dumps(question_list))
    (folder / name / "engine.json").write_text(json.dumps(dict(CASES[name].engine)))
    return name


def picture(sample: Sample) -> str:
    """The picture as base64 text."""
    return b64encode(png(sample.image())).decode()


def ids_of(artifact: Artifact, processor: Any, sample: Sample) -> list[int]:
    """The prompt's ids for vLLM: one id for the picture, or none if vLLM inserts it (BLIP-2)."""
    config = artifact.checkpoint.config
    image = config.get("image_token_index", config.get("image_token_id"))
    ids = prompt_inputs(processor, artifact.family, sample)["input_ids"][0].tolist()
    first = ids.index(image) if image in ids else 0
    placeholder = [image] if artifact.family.name == "llava" else []
    return [*ids[:first], *placeholder, *(token for token in ids[first:] if token != image)]


def read_replies(content: Mapping[str, Any]) -> list[Reply]:
    """Replies of `gpu_replies.py`."""
    return [
        Reply(
            reply["text"],
            tuple(reply["prompt"]),
            tuple(reply["tokens"]),
            tuple(reply["logprobs"]),
            tuple({int(token): value for token, value in step.items()} for step in reply["top"]),
        )
        for reply in content["replies"]
    ]


def compare(folder: Path, name: str, bound: float) -> dict[str, Any]:
    """One row of the table."""
    case = folder / name
    if not (case / "replies.json").exists():
        error = json.loads((case / "error.json").read_text())["error"] if (case / "error.json").exists() else "not run"
        return {"case": name, "verdict": "failed", "why": error.strip().splitlines()[-1][:300]}
    content = json.loads((case / "replies.json").read_text())
    artifact, processor = Artifact.open(case / "artifact"), load_processor(case / "artifact")
    samples = questions(case / "artifact", (), QUESTIONS)
    session = CheckSettings(Program("", content["vllm"], False), choose("cpu"), lambda event: None, bound=bound)
    doubled, component = None, disturbed_component(artifact, CASES[name].disturb)
    if component and "doubled" in content:
        doubled = DoubledRun(component, case / "doubled", read_replies(content["doubled"]))
    linears = content["plain"]["linears"]
    has_schemes = artifact.manifest.format == "compressed_tensors"
    problems = scheme_problems(artifact, {n: pair[0] for n, pair in linears.items()}) if has_schemes else []
    compared, control, more = judge(artifact, samples, read_replies(content["plain"]), doubled, processor, session)
    row: dict[str, Any] = {"case": name, "verdict": "differs" if problems + more else "passed"}
    row |= {"why": "; ".join(problems + more), "vllm": content["vllm"], "startup_s": content["plain"]["startup_s"]}
    if compared:
        row |= {"engine": pair_of(compared.distance), "floor": pair_of(compared.floor)}
    if control:
        row |= {"doubled": pair_of(control.moved), "on both": pair_of(control.restored.distance)}
        row["floor on both"] = pair_of(control.restored.floor)
        row["control"] = control.component
    kinds = Counter(f"{scheme.removeprefix('CompressedTensors')} {kernel}" for scheme, kernel in linears.values())
    return row | {"kernels": dict(kinds)}


def pair_of(distance: Distance) -> str:
    """Mean and largest difference as text."""
    return f"{distance.mean:.4f}/{distance.largest:.3f}"


def line(row: Mapping[str, Any]) -> str:
    """One line of the table."""
    parts = [f"{row.get(key, '-'):15}" for key in ("engine", "floor", "doubled", "on both", "floor on both")]
    kernels = ", ".join(f"{count} {kernel}" for kernel, count in row.get("kernels", {}).items())
    return f"{row['case']:11} {row['verdict']:8} {' '.join(parts)} [{kernels}] {row.get('why', '')[:300]}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["prepare", "compare"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--bound", type=float, default=BOUND)
    options = parser.parse_args()
    with ProcessPoolExecutor(options.jobs) as pool:
        if options.step == "prepare":
            for name in pool.map(prepare, [options.folder] * len(options.only), options.only):
                print(f"prepared {name}", flush=True)
            return
        print(
            line({name: name for name in ("case", "verdict", "engine", "floor", "doubled", "on both", "floor on both")})
        )
        count = len(options.only)
        rows = []
        for row in pool.map(compare, [options.folder] * count, options.only, [options.bound] * count):
            rows.append(row)
            print(line(row), flush=True)
        (options.folder / "results.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
