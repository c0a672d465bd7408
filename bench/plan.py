"""Time of the command `mmq plan` of a local model at its true size, beside the import of torch alone.

    python -m bench.plan [llava-hf--llava-1.5-7b-hf] [--runs 5]

The model is a file header with a hole for its weights, and the demo model's processor. "first" has an empty cache of
processors (MMQ_CACHE): a helper process then loads transformers. Processor seconds include those of the helper.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.random_checkpoint import write_processor
from tests.headers.read import header_config, write_sparse_checkpoint

Seconds = tuple[float, float]  # wall time, processor time


def timed(words: Sequence[str], environment: Mapping[str, str]) -> Seconds:
    """Run Python with these arguments."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, *words], env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)} failed")
    return time.monotonic() - started, usage.ru_utime + usage.ru_stime


def measure(folder: Path, cache: Path, runs: int) -> dict[str, list[Seconds]]:
    """Times of the import of torch, of the first plan of a folder, and of later ones."""
    plan = ["-m", "exporter", "plan", "--recipe", "llava-w4-vit8", "--model", str(folder), "--json"]
    seconds: dict[str, list[Seconds]] = {"import torch": [], "first": [], "again": []}
    timed(plan, os.environ | {"MMQ_CACHE": str(cache / "warm")})  # Python compiles modules, files enter the page cache
    for run in range(runs):
        environment = os.environ | {"MMQ_CACHE": str(cache / str(run))}
        seconds["import torch"].append(timed(["-c", "import torch"], environment))
        seconds["first"].append(timed(plan, environment))
        seconds["again"].append(timed(plan, environment))
    return seconds


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("header", nargs="?", default="llava-hf--llava-1.5-7b-hf")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mmq-plan-") as temporary:
        folder = write_sparse_checkpoint(Path(temporary) / "model", options.header)
        write_processor(folder, header_config(options.header))
        for name, seconds in measure(folder, Path(temporary), options.runs).items():
            wall, processor = (
                [round(statistics.median(part), 2), round(max(part), 2)] for part in zip(*seconds, strict=True)
            )
            print(json.dumps({"what": name, "wall median, max": wall, "processor median, max": processor}))


if __name__ == "__main__":
    main()
