"""Serving speed of LLaVA-1.5-7B in vLLM by recipe, against 16 bits in the same run; true shapes, random weights.

    python -m bench.serve OUT [--python "env PYTHONPATH=/site python3"] [--only NAME ...] [--seconds 530]

Every variant has its own engine. All engines import in parallel, then run one at a time; with `--together` they also
start and compile in parallel, which needs GPU memory for all of them. Measures the time to the first token and the
decode time per token with one client; then, with 1, 8 and 64 clients that each send their own image (576 + 64 tokens)
and request 128 tokens, the tokens per second with prompts and while all clients decode; and images per second with one
requested token. The floor is the bytes read per decoded token (weights, cache) divided by the bandwidth of a copy.
`--compiled` uses vLLM's default compilation with Inductor; `--compilation` adds settings, `--kernels` reports the time
by kernel. NAME@tp2 splits every linear over two GPUs (tensor parallelism), NAME@dp2 runs a whole model on each of two
GPUs (data parallelism). `--smoke` is a short test on a CPU with the demo model.
"""

import argparse
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.random_checkpoint import write_processor
from bench.serve_engine import READY, TURN
from bench.serve_variants import VARIANTS, W4, ParallelVariant, Variant
from exporter.artifact.artifact_config import artifact_config
from exporter.device import Device
from exporter.model.embedded import MODELS
from exporter.model.source import open_source
from exporter.planning.plan import Plan, make_plan
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import load_recipe
from tests.headers.read import load_header, write_sparse_shard

HEADER = "llava-hf--llava-1.5-7b-hf"
H100 = Device("cuda:0", "H100", 78 * 2**30)
CHILD = Path(__file__).with_name("serve_engine.py")


def plan_of(variant: Variant, folder: Path) -> Plan:
    """The plan of a variant for the checkpoint whose header is in `folder`; for 16 bits it packs no tensor."""
    data = load_recipe(variant.recipe or "llava-w4").model_dump()
    if not variant.recipe:
        rules = variant.rules or [W4 | {"store": "dequantized"}]
        data |= {"quantize": [dict(rule) for rule in rules], "kv_cache": variant.kv_cache}
    checkpoint, family = open_source(str(folder), headers_only=True)
    return make_plan(Recipe.model_validate(data), checkpoint, family, H100)


def write_source(folder: Path, smoke: bool) -> dict[str, Any]:
    """Write the checkpoint's header, for planning, and its processor; for a smoke run, copy the demo model."""
    if smoke:
        shutil.copytree(MODELS["demo-llava"], folder)
        return dict(json.loads((folder / "config.json").read_text()))
    config, tensors = load_header(HEADER)
    folder.mkdir(parents=True)
    write_processor(folder, config)
    write_sparse_shard(folder / "model.safetensors", tensors)
    return dict(json.loads((folder / "config.json").read_text()))


def decode_bytes(plan: Plan, variant: Variant, config: Mapping[str, Any], context: int) -> int:
    """Bytes read per decoded token: the language model's weights without the embeddings, and the cache."""
    rows = [
        row for row in plan.rows if row.tensor.name.startswith("language_model.") and "embed" not in row.tensor.name
    ]
    head = next(row.bytes_after for row in rows if row.module.endswith("lm_head"))
    weights = sum(row.bytes_after for row in rows) - head * (16 - variant.head_bits) // 16
    text = config["text_config"]
    width = text.get("hidden_size", 4096) * text.get("num_hidden_layers", 32)
    return int(weights + context * 2 * width * (1 if plan.recipe.kv_cache else 2))


def prepare(
    case: ParallelVariant, out: Path, source: Path, config: dict[str, Any], options: argparse.Namespace
) -> Path:
    """The folder and the spec of one case."""
    variant, folder = VARIANTS[case.variant], out / case.label.replace(" ", "-")
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    plan = plan_of(variant, source)
    artifact_settings = artifact_config(plan, config)
    quantization = artifact_settings.get("quantization_config")
    if quantization:
        for change in variant.change:
            change(quantization)
        if len({group.get("format", quantization["format"]) for group in quantization["config_groups"].values()}) > 1:
            quantization["format"] = "mixed-precision"
        (folder / "config.json").write_text(json.dumps(artifact_settings, indent=1))
    engine: dict[str, Any] = {
        "model": str(folder),
        "load_format": "dummy",
        "max_model_len": 512 if options.smoke else 1024,
        "limit_mm_per_prompt": {"image": 1},
        "enable_prefix_caching": False,
        "mm_processor_cache_gb": 0,
        "disable_log_stats": True,
        "renderer_num_workers": options.renderers,
    }
    parallel = {"tensor_parallel_size": case.tensor_parallel, "data_parallel_size": case.data_parallel}
    engine |= {name: number for name, number in parallel.items() if number > 1}
    if case.label in options.kernels:
        trace = {"profiler": "torch", "torch_profiler_dir": str(folder.resolve() / "trace")}
        engine["profiler_config"] = trace | {"torch_profiler_with_stack": False, "ignore_frontend": True}
    counts = [1, 2, 4, *(8 * i for i in range(1, max(options.clients) // 8 + 1))]
    graphs: dict[str, Any] = {"cudagraph_capture_sizes": counts}
    if options.graphs:  # vLLM's default sizes up to this one
        graphs = {"max_cudagraph_capture_size": options.graphs}
    if not options.compiled:  # no Inductor: a start takes seconds; decoding runs from whole CUDA graphs either way
        graphs |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    graphs |= json.loads(options.compilation)
    sizes = {"max_num_seqs": max(options.clients), "compilation_config": graphs}
    sizes |= {"max_num_batched_tokens": options.batched_tokens}
    cache = (14 if plan.recipe.kv_cache else 27) * 10**9 // case.tensor_parallel  # for 64 concurrent requests
    sizes |= {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": cache, "skip_mm_profiling": True}
    engine |= {"enforce_eager": True, "max_num_seqs": 4, "gpu_memory_utilization": 0.2} if options.smoke else sizes
    spec = {
        "engine": engine | dict(variant.engine),
        "environment": dict(variant.environment),
        "out": str(folder / "result.json"),
        "image_token": config["image_token_index"],
        "side": config["vision_config"]["image_size"],
        "images": 2 * max(options.clients),
        "text_tokens": 63,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "clients": options.clients,
        "settle_s": {count: 0.2 + count / 64 for count in options.clients},
        "blocks": config["text_config"].get("num_hidden_layers", 32),
        "decode_bytes": decode_bytes(plan, variant, config, 640 + options.tokens // 2) // case.tensor_parallel,
    }
    if options.together:
        spec["turn"] = str(folder.resolve() / "turn")
    (folder / "spec.json").write_text(json.dumps(spec, indent=1))
    return folder


def start(options: argparse.Namespace, folder: Path) -> "subprocess.Popen[bytes]":
    """Start the child that measures one variant in its turn; its output goes to engine.log next to its spec.

    torch uses one CPU thread, because more would compete with the image threads of --renderers.
    """
    spec = json.loads((folder / "spec.json").read_text())
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    quiet |= {"OMP_NUM_THREADS": "1"} | ({} if options.together else {TURN: str(folder.resolve() / "turn")})
    with (folder / "engine.log").open("wb") as log:
        return subprocess.Popen(
            [*shlex.split(options.python), str(CHILD), str(folder / "spec.json")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **quiet, **spec["environment"]},
            start_new_session=True,
        )


def bandwidth(options: argparse.Namespace) -> float | None:
    """Bytes per second of a copy on the GPU, None without a GPU."""
    file = options.out.resolve() / "bandwidth.json"
    subprocess.run([*shlex.split(options.python), str(CHILD), "--bandwidth", str(file)], check=True)
    speed: float | None = json.loads(file.read_text())["bandwidth"]
    return speed


def wait(name: str, folder: Path, child: "subprocess.Popen[bytes]", end: float) -> dict[str, Any]:
    """The result of a variant after its engine has ended, or an error."""
    try:
        child.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return {"name": name, "error": f"not done in time: see {folder / 'engine.log'}"}
    if not (folder / "result.json").exists():
        return {"name": name, "error": f"ended with code {child.returncode}: see {folder / 'engine.log'}"}
    spec = json.loads((folder / "spec.json").read_text())
    result = json.loads((folder / "result.json").read_text())
    return {"name": name, **result, "decode_bytes": spec["decode_bytes"]}


def stop(children: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Kill whole process groups, because an engine that outlives its parent would keep GPU memory."""
    for child in children:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def row(result: Mapping[str, Any], bandwidth: float | None, first: Mapping[str, Any] | None) -> str:
    """One line of the table."""
    if "error" in result:
        return f"{result['name']:22} {result['error']}"
    floor = f"{1000 * result['decode_bytes'] / bandwidth:5.2f}" if bandwidth else "    -"
    names = [name for name in result if name.startswith("clients_")]
    rates = " ".join(f"{result[name]['tokens_per_s']:7.0f}" for name in names)
    alone = [result[name.replace("clients", "decoding")] for name in names]
    decoding = " ".join(f"{rate:7.0f}" if rate else "      -" for rate in alone)
    images = " ".join(f"{result[name.replace('clients', 'prefill')]['images_per_s']:6.1f}" for name in names)
    gains = ""
    if first and "error" not in first:
        last = names[-1]
        gains = f"  {first['decode_ms'] / result['decode_ms']:.2f}x decode, "
        gains += f"{result[last]['tokens_per_s'] / first[last]['tokens_per_s']:.2f}x tokens/s"
        before = first[last.replace("clients", "decoding")]
        gains += f", {alone[-1] / before:.2f}x while all decode" if alone[-1] and before else ""
    times = f"{result['first_token_ms']:7.1f} {result['decode_ms']:7.2f} {floor}"
    seconds = f"({result['startup_s']:.0f}+{result['measured_s']:.0f} s)"
    return f"{result['name']:22} {times} | {rates} | {decoding} | {images} |{gains} {seconds}"


def hold(folder: Path) -> int:
    """Take the lock that a variant waits for; closing the descriptor starts its turn."""
    lock = os.open(folder / "turn", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def ready(folder: Path, child: "subprocess.Popen[bytes]") -> bool:
    """Whether a variant waits for its turn, or has ended."""
    return child.poll() is not None or READY in (folder / "engine.log").read_text(errors="replace")


def measure_all(options: argparse.Namespace, folders: Mapping[str, Path], speed: float | None) -> None:
    """Start all variants, wait until they are ready, then run and print one after the other."""
    end = time.monotonic() + options.seconds
    locks = {name: hold(folder) for name, folder in folders.items()}
    children = {name: start(options, folder) for name, folder in folders.items()}
    results: list[dict[str, Any]] = []
    try:
        while time.monotonic() < end and not all(ready(folders[name], children[name]) for name in children):
            time.sleep(0.2)
        for name, child in children.items():
            os.close(locks[name])
            results.append(wait(name, folders[name], child, end))
            stop([child])
            print(row(results[-1], speed, results[0]), flush=True)
            (options.out / "speed.json").write_text(json.dumps({"bandwidth": speed, "results": results}, indent=1))
    finally:
        stop(list(children.values()))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--python", default="python3", help="command of the interpreter that has vllm")
    parser.add_argument(
        "--only",
        nargs="+",
        type=ParallelVariant.parse,
        metavar="NAME",
        default=list(map(ParallelVariant.parse, list(VARIANTS)[:8])),
    )
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="consecutive requests per client")
    parser.add_argument("--batched-tokens", type=int, default=16384, help="most tokens per step")
    parser.add_argument("--renderers", type=int, default=4, help="threads that prepare images")
    parser.add_argument("--together", action="store_true", help="start all engines before measuring the first")
    parser.add_argument("--compiled", action="store_true", help="with Inductor, vLLM's default")
    parser.add_argument("--graphs", type=int, help="tokens of the largest CUDA graph; 704 covers one prompt")
    parser.add_argument(
        "--compilation", default="{}", metavar="JSON", help="additional entries of vLLM's compilation_config"
    )
    parser.add_argument(
        "--kernels", nargs="+", default=[], help="variants whose time by kernel is written to speed.json"
    )
    parser.add_argument("--seconds", type=float, default=530, help="time limit for all variants")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    config = write_source(options.out / "source", options.smoke)
    folders = {case.label: prepare(case, options.out, options.out / "source", config, options) for case in options.only}
    speed = bandwidth(options)
    print(f"bandwidth of a copy on the GPU: {speed / 1e12:.2f} TB/s" if speed else "no GPU")
    clients = "/".join(map(str, options.clients))
    print(
        f"{'variant':22} {'1st ms':>7} {'ms/tok':>7} floor | tokens/s at {clients} clients | while all decode"
        " | images/s, one token",
        flush=True,
    )
    measure_all(options, folders, speed)


if __name__ == "__main__":
    main()
