"""Quality of a demo model by bits: `python bench/demo_degradation.py --methods rtn,gptq --json out.json`.

Every setting is one export (symmetric, one scale per row or per 32 columns, calibrated on 128 samples of the train
split), read from its artifact. The figures are shares of exact greedy answers on test scenes and the embedded easy-VQA
pictures, or recall at 1. `--read out.json` prints the table of an earlier run.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from exporter.artifact.artifact import Artifact
from exporter.device import choose
from exporter.events import ignore
from exporter.model.embedded import MODELS
from exporter.model.families import Family
from exporter.model.source import open_source
from exporter.model.stream import load_whole
from exporter.numerics.quantized import GroupSize
from exporter.pipeline.export import export
from exporter.planning.recipe import Recipe
from tools.demo_training.blip2_packing import BLIP2
from tools.demo_training.packing import LLAVA
from tools.demo_training.score import by_kind, easy_exam, scene_exam, summary
from tools.demo_training.score_retrieval import exam, grade

ALL: dict[str, tuple[str, ...]] = {  # components of "all"; each except the projector is also quantized alone
    "llava": ("vision", "projector", "language"),
    "blip2": ("vision", "qformer", "language"),
    "blip2-itm": ("vision", "qformer"),
}
LAYOUTS = {"llava": LLAVA, "blip2": BLIP2}
Grade = Callable[[Any], dict[str, Any]]  # a model -> `summary` and `kinds`


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    method: str
    bits: int
    group: GroupSize
    where: str


def recipe(folder: Path, family: Family, setting: Setting) -> Recipe:
    """The recipe that quantizes the components of `setting` and keeps the rest."""
    named = ALL[family.name] if setting.where == "all" else (setting.where,)
    rules = []
    for part in family.components:
        rule = {"method": setting.method, "bits": setting.bits, "group_size": setting.group}
        rule |= {"store": "dequantized"} if part.unpackable else {}
        rules.append({"component": part.name, **(rule if part.name in named else {"bits": 16})})
    return Recipe.model_validate(
        {
            "name": "demo-degradation",
            "summary": "one row of a table",
            "model": {"repo": str(folder), "family": family.name},
            "quantize": rules,
            "calibration": {"data": "demo", "tasks": list(family.tasks)},
            "evaluation": {"data": "demo"},
            "gates": [],
            "evidence": [{"finding": "none", "figures": "none", "source": "bench/demo_degradation.py"}],
        }
    )


def quantized(folder: Path, family: Family, setting: Setting, device: torch.device) -> Any:
    """The model with the dequantized weights of the artifact."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "artifact"
        quantized_recipe = recipe(folder, family, setting)
        export(quantized_recipe, out=out, device=choose("cpu"), on_event=ignore, skip_evaluation=True)
        artifact = Artifact.open(out)
        return load_whole(
            family, artifact.source_config(), artifact.names(), artifact.read, device, torch.float32
        ).eval()


def grader(family: Family, scenes: int, device: torch.device) -> Grade:
    """A function that evaluates a model of the family on the first test scenes."""
    if family.name not in LAYOUTS:
        pairs = exam("test", scenes, device)
        return lambda model: {"summary": grade(model, pairs), "kinds": {}}
    layout = LAYOUTS[family.name]
    exams = [scene_exam("test", 0, scenes, device, layout), easy_exam(device, layout)]

    def answers(model: Any) -> dict[str, Any]:
        kinds = by_kind(model, exams)
        return {"summary": summary(kinds), "kinds": kinds}

    return answers


def settings(methods: list[str], bits: list[int], groups: list[GroupSize], parts: tuple[str, ...]) -> Iterator[Setting]:
    """Rows of the table, in order; single components only at the first group size and below 8 bits."""
    alone = [part for part in parts if part != "projector"]
    for method in methods:
        for width in bits:
            for group in groups:
                only_all = width == 8 or group != groups[0]
                yield from (
                    Setting(method, width, group, components) for components in [*([] if only_all else alone), "all"]
                )


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    figures = "  ".join(f"{name} {value:.3f}" for name, value in row["summary"].items())
    return f"{row['method']:<5} W{row['bits']:<2} {row['group']!s:>4} {row['where']:<9} {figures}"


def page(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    names = list(rows[0]["summary"])
    lines = [f"| method | bits, scale per | where | {' | '.join(names)} |", "|" + "---|" * (3 + len(names))]
    for row in rows:
        scale = "row" if row["group"] == "row" else f"{row['group']} columns"
        plain = row["method"] == "none"
        cells = (
            ["bf16 weights", "16", "-"] if plain else [row["method"].upper(), f"{row['bits']}, {scale}", row["where"]]
        )
        figures = [format(row["summary"][name], ".3f") for name in names]
        lines.append(f"| {' | '.join(cells + figures)} |")
    return "\n".join(lines)


def measured(model: Any, figures: Grade, setting: Setting) -> dict[str, Any]:
    """One row: the setting and its figures."""
    row = {**asdict(setting), **figures(model)}
    print(line(row), flush=True)
    return row


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="demo-llava", help=f"{', '.join(MODELS)} or a folder like theirs")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--methods", default="rtn,gptq")
    parser.add_argument("--bits", default="8,4,3,2")
    parser.add_argument("--groups", default="row,32")
    parser.add_argument("--device", default="cpu", help="device for answers; quantization always runs on the CPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--read", type=Path, help="only print the table of a JSON file")
    options = parser.parse_args()
    if options.read:
        return print(page(json.loads(options.read.read_text(encoding="utf-8"))["rows"]))
    device, folder = torch.device(options.device), MODELS.get(options.model, Path(options.model))
    checkpoint, family = open_source(str(folder), None)
    names, figures = list(checkpoint.tensors), grader(family, options.scenes, device)
    model = load_whole(family, checkpoint.config, names, checkpoint.read, device, torch.float32).eval()
    rows = [measured(model, figures, Setting("none", 16, "row", "all"))]
    groups: list[GroupSize] = ["row" if g == "row" else int(g) for g in options.groups.split(",")]
    bits = [int(b) for b in options.bits.split(",")]
    for setting in settings(options.methods.split(","), bits, groups, ALL[family.name]):
        rows.append(measured(quantized(folder, family, setting, device), figures, setting))
    if options.json:
        options.json.write_text(json.dumps({"scenes": options.scenes, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
