"""Calibration on one GPU and shared by two: seconds of every step, memory, and how many codes differ.

    python -m bench.random_checkpoint llava-hf--llava-1.5-7b-hf MODEL --device cuda
    python -m bench.shared_calibration MODEL --recipe llava-w4-vit8 --devices cuda:0 cuda:0,cuda:1

Exports MODEL once per entry of --devices, in --rounds rounds, through the command that users run; the first export of
the first round also compiles kernels. Compares the artifacts of the last round with the one of the first entry.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench.export import run_export
from exporter.artifact.artifact import Artifact


def difference(one: Artifact, other: Artifact) -> dict[str, float]:
    """Shares of codes and of linears that differ, and the relative difference of the dequantized weights."""
    codes = changed = linears = 0
    distance = norm = 0.0
    for module in one.manifest.linears:
        first, second = one.linear(module), other.linear(module)
        unequal = int((first.codes != second.codes).sum())
        codes, changed, linears = codes + first.codes.numel(), changed + unequal, linears + bool(unequal)
        weight = first.dequantize()
        distance += float((weight - second.dequantize()).square().sum(dtype=torch.float64))
        norm += float(weight.square().sum(dtype=torch.float64))
    return {
        "codes": codes,
        "codes_changed": changed,
        "share_changed": changed / codes,
        "linears": len(one.manifest.linears),
        "linears_changed": linears,
        "relative_difference": (distance / norm) ** 0.5,
    }


def line(devices: str, result: Mapping[str, Any]) -> str:
    """Seconds and memory of one export."""
    steps = " ".join(f"{name} {step['seconds']:.1f}" for name, step in result["steps"].items())
    quantize = result["steps"]["quantize"]
    return (
        f"{devices:16} whole {result['wall_s']:.1f} s: {steps} | quantize: device {quantize['device_gib']:.2f} GiB, "
        f"host {quantize['host_gib']:.2f} GiB"
    )


def mean_error(artifact: Artifact) -> float:
    """Mean relative error of the linears, as the manifest has it."""
    errors = artifact.manifest.errors.values()
    return sum(errors) / len(errors)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--recipe", default="llava-w4-vit8")
    parser.add_argument("--devices", nargs="+", default=["cuda:0", "cuda:0,cuda:1"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    figures: dict[str, Any] = {"runs": []}
    with tempfile.TemporaryDirectory() as name:
        folders = {devices: Path(name) / str(i) for i, devices in enumerate(options.devices)}
        for _ in range(options.rounds):
            for devices, out in folders.items():
                shutil.rmtree(out, ignore_errors=True)
                result = run_export(options.model, options.recipe, devices, out, ["--skip-evaluation"])
                figures["runs"].append({"devices": devices, **result})
                print(line(devices, result), flush=True)
        first = Artifact.open(folders[options.devices[0]])
        print(f"{options.devices[0]:16} mean error of the linears {mean_error(first):.6f}")
        for devices in options.devices[1:]:
            other = Artifact.open(folders[devices])
            compared = difference(first, other)
            figures[devices] = compared | {"mean_error": mean_error(other)}
            print(
                f"{devices:16} mean error of the linears {mean_error(other):.6f}; {compared['codes_changed']} of "
                f"{compared['codes']} codes differ ({compared['share_changed']:.2%}), in {compared['linears_changed']} "
                f"of {compared['linears']} linears; weights differ by {compared['relative_difference']:.2%}"
            )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
