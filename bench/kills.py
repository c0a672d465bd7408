"""Kill an export at random times and resume it: the artifact must be byte-identical to an undisturbed run.

    OMP_NUM_THREADS=1 python -m bench.kills --kills 40 --seed 0 [--recipe llava-w4-vit4] [--samples 24]

Half of the trials replace another artifact (`--overwrite`). After every kill, the output must be absent, the complete
older artifact, or the complete new one; after the last run, only the artifact and the cached answers may remain. The
exit code is 1 otherwise. Kill times are uniform over the duration of the undisturbed run, so they depend on the speed
of the machine. Every export is a fork of this process, which has imported all libraries, so that no kill hits imports.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from exporter.device import choose
from exporter.events import Event
from exporter.pipeline.export import export
from exporter.planning.recipe_file import load_recipe

OLDER = "llava-w8"  # recipe of the replaced artifact
ENDED = "ended before its kill"


def contents(folder: Path) -> dict[str, str]:
    """File name -> sha256; empty if the folder does not exist."""
    if not folder.is_dir():
        return {}
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def run(recipe: str, out: Path, samples: int, overwrite: bool = False, seconds: float = 600.0) -> str:
    """Export in a child process and kill it after `seconds`; returns its stage, or ENDED."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os._exit(_export(recipe, out, samples, overwrite, write))
    os.close(write)
    deadline = time.monotonic() + seconds
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.005)
    if ended[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with os.fdopen(read, "rb") as events:
        stages = events.read().decode().split()
    if ended[0] and ended[1]:
        raise SystemExit("the export failed without a kill")
    return ENDED if ended[0] else (stages or ["start"])[-1]


def _export(recipe: str, out: Path, samples: int, overwrite: bool, events: int) -> int:
    """Run the export in the child; returns the exit code. events: file descriptor for the stages."""

    def listen(event: Event) -> None:
        os.write(events, f"{event.stage.replace(' ', '-')} ".encode())

    try:
        adjusted = load_recipe(recipe).adjusted(
            model={"repo": "demo-llava"}, calibration={"samples": samples}, evaluation={"samples": 4}
        )
        export(adjusted, out=out, device=choose("cpu"), on_event=listen, overwrite=overwrite)
    except BaseException:  # noqa: BLE001 (the child ends here)
        traceback.print_exc()
        return 1
    return 0


def trial(folder: Path, options: argparse.Namespace, rng: random.Random, states: list[dict[str, str]]) -> list[str]:
    """Kill one export once or more, then let it finish; returns the stages at the kills.

    states: contents of the finished artifact without report, with report, and of the replaced older artifact, if any.
    """
    out, overwrite = folder / "out", len(states) > 2
    stages: list[str] = []
    if overwrite:
        shutil.copytree(options.older, out)
    while not stages or (rng.random() < 0.5 and stages[-1] != ENDED):
        seconds = rng.uniform(0.02, 1.0) * options.seconds
        stages.append(run(options.recipe, out, options.samples, overwrite, seconds))
        state = contents(out)
        if state and state not in states:
            raise SystemExit(f"killed at '{stages[-1]}', {out} is neither the older artifact nor the new one")
    run(options.recipe, out, options.samples, overwrite)
    if contents(out) != states[1]:
        raise SystemExit(f"killed at {stages}, the artifact has other bytes than an undisturbed run's: {out}")
    leftover = {path.name for path in folder.iterdir()} - {"out", ".mmq-answers"}
    if leftover:
        raise SystemExit(f"killed at {stages}, it left {sorted(leftover)} behind")
    return [stage for stage in stages if stage != ENDED]


def main() -> None:
    """Command line: run trials until `--kills` exports were killed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", default="llava-w4-vit4")
    parser.add_argument("--samples", type=int, default=24)
    options = parser.parse_args()
    rng, stages = random.Random(options.seed), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="mmq-kills-") as scratch:
        root = Path(scratch)
        start = time.monotonic()
        run(options.recipe, root / "whole", options.samples)
        options.seconds = time.monotonic() - start
        options.older = root / "older"
        run(OLDER, options.older, options.samples)
        shutil.rmtree(root / ".mmq-answers")
        complete, older = contents(root / "whole"), contents(options.older)
        unmeasured = {name: hashed for name, hashed in complete.items() if name != "mmq_report.json"}
        for number in range(10 * options.kills):
            folder = root / f"trial-{number}"
            folder.mkdir()
            states = [unmeasured, complete, *([older] if number % 2 else [])]
            stages.update(trial(folder, options, rng, states))
            shutil.rmtree(folder)
            print(f"{stages.total()} of {options.kills} kills", file=sys.stderr, flush=True)
            if stages.total() >= options.kills:
                break
    result = {"kills": stages.total(), "trials": number + 1, "seed": options.seed, "identical": True}
    print(json.dumps(result | {"seconds_undisturbed": round(options.seconds, 1), "killed_while": dict(stages)}))


if __name__ == "__main__":
    main()
