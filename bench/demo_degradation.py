"""How the demo model degrades with bits: `python bench/demo_degradation.py --json out.json`.

Round-to-nearest, symmetric, on the linears of one component or of all, at one scale a row or a group of columns; every
figure is the share of exact greedy answers over test scenes and the embedded easy-VQA pictures.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporter.demo.score import Exam, by_kind, easy_exam, scene_exam, summary
from exporter.families.llava import FAMILY, live_name
from exporter.quantized import GroupSize, Scheme, spread

DEMO = Path(__file__).parents[1] / "exporter" / "demo" / "demo-llava"
GROUPS: tuple[GroupSize, ...] = ("row", 32)
WHERE = {name: (name,) for name in ("vision", "language")} | {"all": ("vision", "projector", "language")}


def rounded(weight: Tensor, scheme: Scheme) -> Tensor:
    """Round-to-nearest of `weight` `[out, in]`, the scale such that the largest value of a group just fits."""
    columns = weight.shape[1]
    width = scheme.columns_per_group(columns)
    peaks = torch.stack([part.abs().amax(1) for part in weight.float().split(width, dim=1)], dim=1)
    scale = spread((peaks * 2 / scheme.levels).to(torch.bfloat16).float(), columns, scheme)
    codes = (weight.float() / scale).nan_to_num().round().clamp(-scheme.middle, scheme.middle - 1)
    return (codes * scale).to(weight.dtype)


def linears(config: dict[str, Any], components: tuple[str, ...]) -> list[str]:
    """Live names of the linears of `components`."""
    blocks = [(part, part.block(i)) for part in map(FAMILY.component, components) for i in range(part.used(config))]
    return [live_name(f"{block}.{linear}") for part, block in blocks for linear in part.linears]


def measure(model: Any, config: dict[str, Any], exams: list[Exam], bits: list[int]) -> list[dict[str, Any]]:
    """One row for the untouched model, then one for every bits x group x component."""
    kinds = by_kind(model, exams)
    rows = [{"bits": 16, "group": "-", "where": "-", "summary": summary(kinds), "kinds": kinds}]
    for width in bits:
        for group in GROUPS:
            for where, components in WHERE.items():
                modules = [model.get_submodule(name) for name in linears(config, components)]
                saved = [module.weight.detach().clone() for module in modules]
                for module in modules:
                    module.weight.data = rounded(module.weight.data, Scheme(width, group))
                kinds = by_kind(model, exams)
                rows.append({"bits": width, "group": group, "where": where, "summary": summary(kinds), "kinds": kinds})
                for module, weight in zip(modules, saved, strict=True):
                    module.weight.data = weight
                print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    figures = "  ".join(f"{name} {value:.3f}" for name, value in row["summary"].items())
    return f"W{row['bits']:<2} {row['group']!s:>4} {row['where']:<9} {figures}"


def main() -> None:
    """Command line."""
    from transformers import LlavaForConditionalGeneration

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--bits", default="8,4,3,2")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = LlavaForConditionalGeneration.from_pretrained(options.model, dtype=dtype).to(device)
    config = json.loads((options.model / "config.json").read_text(encoding="utf-8"))
    exams = [scene_exam("test", 0, options.scenes, device), easy_exam(device)]
    rows = measure(model, config, exams, [int(b) for b in options.bits.split(",")])
    print(line(rows[0]))
    if options.json:
        options.json.write_text(json.dumps({"scenes": options.scenes, "dtype": str(dtype), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
