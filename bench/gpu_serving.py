"""Every format and scheme that mmq writes, served by a real vLLM on one GPU and checked, in a few minutes.

    python -m bench.gpu_serving OUT [--vllm "env PYTHONPATH=/site python3 -m vllm.entrypoints.cli.main"] [--only NAME]

Exports the embedded model by every case below and runs `mmq check` on each, several at a time on the one GPU, each
with its own processes, log folder and time limit. Prints one line a case; OUT/results.json has everything.
On a CPU (`--device cpu --jobs 1`) the cases without a kernel there are refused, which is what the table then says.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VISION8 = {"component": "vision", "method": "rtn", "bits": 8, "group_size": "row"}
VISION8A8 = VISION8 | {"activations": "int8"}
FP8 = {"method": "rtn", "bits": 8, "group_size": "row", "number": "fp8", "activations": "fp8"}
LANGUAGE4 = {"component": "language", "method": "gptq", "bits": 4, "group_size": 128}


@dataclass(frozen=True)
class Case:
    """One artifact. rules: of the recipe; what none names stays in 16 bits."""

    rules: Sequence[Mapping[str, Any]]
    format: str = "compressed_tensors"


CASES = {  # the most telling first, should the time run out
    "w4-vit8": Case([VISION8, LANGUAGE4]),
    "w4-vit8a8": Case([VISION8A8, LANGUAGE4]),
    "fp8": Case([FP8 | {"component": "vision"}, FP8 | {"component": "language"}]),
    "w3": Case([LANGUAGE4 | {"bits": 3}]),
    "gptq-4": Case([LANGUAGE4], "gptq"),
    "awq": Case([LANGUAGE4 | {"method": "awq", "symmetric": False}], "awq"),
    "16-bit": Case([LANGUAGE4 | {"store": "dequantized"}]),
    "w4-asym": Case([LANGUAGE4 | {"symmetric": False}]),
    "w8": Case([VISION8, VISION8 | {"component": "language", "group_size": 128}]),
    "w8a8": Case([VISION8A8, VISION8A8 | {"component": "language"}]),
    "w4-vit-fp8": Case([FP8 | {"component": "vision"}, LANGUAGE4]),
    "gptq-8": Case([LANGUAGE4 | {"bits": 8}], "gptq"),
    "w2": Case([LANGUAGE4 | {"bits": 2, "group_size": 32}]),
    "w6": Case([LANGUAGE4 | {"bits": 6}]),
}


HEAD = (
    f"{'case':10} {'verdict':9} {'engine':15} {'16-bit floor':15} {'doubled':15} {'doubled on both':15} (largest/mean)"
)


def recipe(case: Case) -> dict[str, Any]:
    """The recipe of a case, as `mmq` reads it (JSON is YAML)."""
    return {
        "summary": "a case of bench/gpu_serving.py",
        "model": {"repo": "demo-llava", "family": "llava"},
        "quantize": [dict(rule) for rule in case.rules],
        "calibration": {"data": "demo", "tasks": ["captioning", "vqa"], "samples": 16, "batch": 8, "seed": 0},
        "format": case.format,
        "evidence": [{"finding": "a case of a bench", "figures": "its table", "source": "bench/gpu_serving.py"}],
        "gates": [],
    }


def call(command: Sequence[str], log: Path, seconds: float) -> tuple[int, str]:
    """Exit code (124: it took too long) and output of a command; what it says on stderr goes to `log`."""
    with log.open("wb") as said:
        if seconds <= 0:
            return 124, ""
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said)
        try:
            output, _ = process.communicate(timeout=seconds)
            return process.returncode, output.decode(errors="replace")
        except subprocess.TimeoutExpired:
            process.terminate()  # mmq ends the engine; were it killed, the kernel ends the engine
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
            return 124, ""


def run_case(name: str, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Export and check one case; what went wrong is said in the result, never raised."""
    folder = out / name
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(json.dumps(recipe(CASES[name])))
    artifact, begun = folder / f"demo-llava-{name}", time.monotonic()
    mmq = [sys.executable, "-m", "exporter"]
    export = [*mmq, "export", "--recipe", str(folder / "recipe.yaml"), "--out", str(artifact), "--device", "cpu"]
    code, said = call([*export, "--skip-evaluation", "--json"], folder / "export.log", options.deadline - begun)
    result = {"case": name, "logs": str(folder), "export_s": round(time.monotonic() - begun, 1)}
    if code:
        return result | {"verdict": "no export", "why": reason(said, folder / "export.log")}
    check = [*mmq, "check", str(artifact), "--json", "--questions", str(options.questions), "--device", options.device]
    check += ["--vllm", options.vllm] if options.vllm else []
    check += ["--logs", str(folder), "--", *options.flags]
    left = min(options.seconds, options.deadline - time.monotonic())
    code, said = call(check, folder / "check.log", left)
    result["check_s"] = round(time.monotonic() - begun - result["export_s"], 1)
    found = first_line(said)
    if "compared" not in found:
        why = reason(said, folder / "check.log")
        verdict = "refused" if "cannot serve this artifact" in why else "too slow" if code == 124 else "failed"
        return result | {"verdict": verdict, "why": why}
    why = "; ".join(found["problems"])
    return result | {"verdict": "passed" if code == 0 else "differs", "why": why, "checked": found}


def first_line(said: str) -> dict[str, Any]:
    """The result that a command of mmq printed; empty when it printed none."""
    try:
        return dict(json.loads(said.splitlines()[0]))
    except (IndexError, ValueError):
        return {}


def reason(said: str, log: Path) -> str:
    """Why a command ended without a result: its error, else the end of what it said on stderr."""
    error = first_line(said).get("error") or "".join(log.read_text(errors="replace").splitlines()[-3:])
    return " ".join(str(error).split()) or "nothing said"


def row(result: Mapping[str, Any]) -> str:
    """One line of the table."""
    checked = result.get("checked")
    head = f"{result['case']:10} {result['verdict']:9}"
    if not checked or not checked["compared"]:
        return f"{head} {result['why'][:300]}"
    compared, control = checked["compared"], checked["control"]
    moved, same = ("-", "-") if not control else (pair(control["moved"]), pair(control["restored"]["distance"]))
    found = f"{pair(compared['distance']):15} {pair(compared['floor']):15} {moved:15} {same:15}"
    schemes = [f"{count} {name.removeprefix('CompressedTensors')}" for name, count in checked["schemes"].items()]
    kernels = [kernel.replace("LinearKernel", "").replace("CompressedTensors", "") for kernel in checked["kernels"]]
    seconds = f"{checked['startup_seconds']:.0f} of {result['check_s']:.0f} s"
    return f"{head} {found} {seconds} [{', '.join(schemes)}] [{', '.join(kernels)}] {result['why'][:160]}"


def pair(distance: Mapping[str, float]) -> str:
    """Largest and mean difference."""
    return f"{distance['largest']:.3f}/{distance['mean']:.4f}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--vllm")
    parser.add_argument("--only", action="append", choices=CASES)
    parser.add_argument("--device", default="cuda", help="of the reference; a GPU needs less of the cores")
    parser.add_argument("--jobs", type=int, default=7)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=240, help="limit of one check: two starts and the answers")
    parser.add_argument("--total", type=float, default=510, help="seconds after which nothing goes on")
    parser.add_argument("--flags", help="for `vllm serve`, in one word: --flags='--dtype float16'")
    options = parser.parse_args()
    small = [] if options.device == "cpu" else gpu_flags()
    options.flags = small if options.flags is None else shlex.split(options.flags)
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    options.out.mkdir(parents=True, exist_ok=True)
    options.deadline = time.monotonic() + options.total
    print(HEAD)
    results = []
    with ThreadPoolExecutor(options.jobs) as pool:
        running = [pool.submit(run_case, name, options.out, options) for name in options.only or CASES]
        for done in as_completed(running):
            results.append(done.result())
            print(row(results[-1]), flush=True)
            (options.out / "results.json").write_text(json.dumps(results, indent=1))
    sys.exit(0 if all(result["verdict"] == "passed" for result in results) else 1)


def gpu_flags() -> list[str]:
    """Small engines side by side: a cache of fixed size, because what neighbors allocate would disturb measuring it."""
    flags = {"--gpu-memory-utilization": "0.05", "--kv-cache-memory-bytes": str(2**28), "--max-num-seqs": "8"}
    return ["--enforce-eager", *(word for pair in flags.items() for word in pair)]


if __name__ == "__main__":
    main()
