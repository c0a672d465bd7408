"""Time and memory of a whole export at a real model's true shapes, on random weights.

    python -m bench.export --recipe llava-w4-vit8 --device cuda [--model FOLDER] [--json]
    python -m bench.export --header Salesforce--blip2-opt-2.7b --recipe blip2-caption-w4 --device cuda [--json]
    python -m bench.export --device cuda --evaluate --eval-samples 100

Prints the seconds and memory peaks of every step next to the predictions of `mmq plan`.

Without --model a random model of the header's shapes is written first (LLaVA 7B 14 GB, 13B 27 GB, 34B 70 GB; BLIP-2
OPT-2.7b 15 GB in float32, as on the hub). The export runs as its own process, through the same command that users run;
its anonymous memory (without the page cache) is sampled while it runs.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from exporter.pipeline.step_clock import anonymous_bytes

GIB = 2**30
DEFAULTS = {  # header -> recipe
    "llava-hf--llava-1.5-7b-hf": "llava-w4-vit8",
    "llava-hf--llava-1.5-13b-hf": "llava-w4-vit8",
    "llava-1.5-shapes-34b": "llava-w4-vit8",
    "Salesforce--blip2-opt-2.7b": "blip2-caption-w4",
    "Salesforce--blip2-itm-vit-g-coco": "blip2-retrieval-w4",
}


def watch_memory(process: subprocess.Popen[str], peak: dict[str, int]) -> None:
    """Record the largest anonymous memory of a running process, in bytes, in `peak`."""
    while process.poll() is None:
        peak["anonymous"] = max(peak.get("anonymous", 0), anonymous_bytes(process.pid))
        time.sleep(0.1)


def run_export(model: Path, recipe: str, device: str, out: Path, more: list[str]) -> dict[str, Any]:
    """Run one export; returns its JSON result, wall time and memory."""
    command = [sys.executable, "-m", "exporter", "export", "--recipe", recipe]
    command += ["--model", str(model), "--device", device, "--out", str(out), "--json", *more]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak: dict[str, int] = {}
    watcher = threading.Thread(target=watch_memory, args=(process, peak))
    watcher.start()
    output, events = process.communicate()
    watcher.join()
    if process.returncode not in (0, 3):  # 3: a gate failed, which random weights may cause
        raise SystemExit(f"export failed ({process.returncode}): {output[-2000:]}{events[-4000:]}")
    result: dict[str, Any] = json.loads(output.splitlines()[0])
    return {
        "recipe": recipe,
        "wall_s": round(time.monotonic() - start, 1),
        "host_peak_gib": round(peak.get("anonymous", 0) / GIB, 2),
        "steps": beside(result["measured"], result["plan"]["steps"]),
        "artifact_gb": round(result["plan"]["bytes_after"] / 1e9, 2),
        "verified_linears": result["verified"]["linears"],
        "verified_blocks": result["verified"]["blocks"],
    }


def beside(measured: list[dict[str, Any]], predicted: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Step -> measured and predicted seconds and peaks in GiB."""
    expected = {step["name"]: step for step in predicted}
    return {
        step["name"]: {
            "seconds": round(step["seconds"], 1),
            "seconds_predicted": round(expected[step["name"]]["seconds"], 1),
            **{
                f"{where}_gib{suffix}": round(source[f"{where}_bytes"] / GIB, 2)
                for where in ("device", "host")
                for suffix, source in (("", step), ("_predicted", expected[step["name"]]))
            },
        }
        for step in measured
    }


def as_text(result: dict[str, Any]) -> str:
    """The result as text, one line per step."""
    lines = [f"{key:22} {value}" for key, value in result.items() if key != "steps"]
    for name, step in result["steps"].items():
        lines.append(f"{name:22} " + "  ".join(f"{key} {value}" for key, value in step.items()))
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--header", choices=DEFAULTS, default=next(iter(DEFAULTS)))
    parser.add_argument("--recipe", action="append", default=[])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--evaluate", action="store_true", help="also evaluate the tasks")
    parser.add_argument("--eval-samples", type=int, default=100, help="samples of each task, with --evaluate")
    parser.add_argument("--eval-batch", type=int, help="largest batch of test samples")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    more = ["--samples", str(arguments.samples)] if arguments.samples else []
    more += ["--eval-samples", str(arguments.eval_samples)] if arguments.evaluate else ["--skip-evaluation"]
    more += ["--eval-batch", str(arguments.eval_batch)] if arguments.eval_batch else []
    with tempfile.TemporaryDirectory() as scratch:
        model = arguments.model or Path(scratch) / f"{arguments.header}-random"
        if not arguments.model:
            device = "cuda" if arguments.device in ("auto", "cuda") and shutil.which("nvidia-smi") else "cpu"
            command = [sys.executable, "-m", "bench.random_checkpoint", arguments.header, str(model)]
            command += ["--device", device]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for i, recipe in enumerate(arguments.recipe or [DEFAULTS[arguments.header]]):
            out = Path(scratch) / f"out{i}"
            result = run_export(model, recipe, arguments.device, out, more)
            shutil.rmtree(out)
            if arguments.json:
                print(json.dumps(result), flush=True)
            else:
                print(as_text(result), flush=True)


if __name__ == "__main__":
    main()
