"""Time and memory of the quantization phase by term, and its error compared with llm-compressor's.

    python -m bench.quantize --header llava-hf--llava-1.5-7b-hf --recipe bench/recipes/llava-w4-vit8-gptq.yaml
    python -m bench.quantize --header Salesforce--blip2-opt-2.7b --recipe blip2-caption-w8-vit4 --blocks 4
    python -m bench.quantize --model demo-llava --peer /path/to/python --group 32 --seeds 5 --only-peer

A header gives true shapes with random weights (--blocks: only the first of each part); --model takes a folder or an
embedded model. The phase runs twice: the first run measures time and memory, including one-time work (compiling
kernels, loading CUDA's libraries); the second run measures each term. --no-terms skips the second run. With --peer,
both quantize the language model with equal settings (`bench/quantize_beside.py`). --at-once makes mmq calibrate on the
same inputs as the peer; --random replaces the language model's weights with random ones.
"""

import argparse
import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from bench.quantize_beside import Setting, at_once, beside_peer, summary
from bench.quantize_phase import Terms, inputs_of, phase
from bench.random_checkpoint import write, write_with_random_language
from exporter.device import choose
from exporter.model.embedded import MODELS
from exporter.planning.recipe_file import load_recipe


def report(results: dict[str, Any]) -> str:
    """The results as text."""
    lines = []
    if "phase" in results:
        lines += [f"{name:22} {value:10.3f}" for name, value in results["phase"].items()]
    if "terms" in results:
        total = sum(results["terms"].values())
        lines += [f"seconds by term of a second run, {total:.2f} in total (synchronized, so slower)"]
        lines += [f"  {name:22} {value:8.2f}" for name, value in sorted(results["terms"].items(), key=lambda i: -i[1])]
    if "peer" in results:
        lines.append(summary(results["peer"]))
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--header", help="true shapes with random weights: a name in tests/headers")
    parser.add_argument("--model", help="folder or embedded model, instead of --header")
    parser.add_argument("--blocks", type=int, default=0, help="only the first blocks of each part")
    parser.add_argument("--recipe", default="bench/recipes/llava-w4-vit8-gptq.yaml")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--peer", help="Python of an environment with llm-compressor")
    parser.add_argument("--group", type=int, default=128, help="columns that share a scale, with --peer")
    parser.add_argument("--seeds", type=int, default=5, help="draws of calibration samples, with --peer")
    parser.add_argument("--test-samples", type=int, default=64, help="samples of the test split for the comparison")
    parser.add_argument("--cache", type=Path, help="folder for the peer's results")
    parser.add_argument("--at-once", action="store_true", help="calibrate all linears of a block before quantizing any")
    parser.add_argument("--random", action="store_true", help="random language weights instead of --model's")
    parser.add_argument("--only-peer", action="store_true", help="skip the measurement of the phase")
    parser.add_argument("--no-terms", action="store_true", help="only the first run of the phase")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    device = choose(options.device)
    results: dict[str, Any] = {"device": device.name, "torch": torch.__version__, "python": sys.version.split()[0]}
    with tempfile.TemporaryDirectory() as name:
        scratch, model = Path(name), options.model
        if not model:
            model = str(scratch / "model")
            write(options.header or "llava-hf--llava-1.5-7b-hf", Path(model), str(device.torch_device), options.blocks)
        if options.random:
            write_with_random_language(MODELS.get(model) or Path(model), scratch / "random")
            model = str(scratch / "random")
        recipe = load_recipe(options.recipe).adjusted(model={"repo": model}, calibration={"samples": options.samples})
        if not options.only_peer:
            _, inputs = inputs_of(recipe, device)
            results["phase"] = phase(recipe, inputs, device, scratch / "first")
        if not (options.only_peer or options.no_terms):
            terms = Terms(device)
            phase(recipe, inputs, device, scratch / "second", terms)
            results["terms"] = terms.seconds
        if options.peer:
            setting = Setting(options.peer, options.group, options.seeds, options.test_samples, options.cache)
            with at_once() if options.at_once else nullcontext():
                results["peer"] = beside_peer(recipe, setting, device, scratch)
    print(json.dumps(results) if options.json else report(results))


if __name__ == "__main__":
    main()
