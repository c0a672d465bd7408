"""How the demo model degrades with bits: `python bench/demo_degradation.py --methods rtn,gptq --json out.json`.

Every setting is one export (symmetric, one scale a row or 32 columns, calibrated on 128 samples of the train split),
read back from its artifact. A figure is the share of exact greedy answers over test scenes and the embedded easy-VQA
pictures.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from exporter.artifact import Artifact
from exporter.demo import MODELS
from exporter.demo.score import Exam, by_kind, easy_exam, scene_exam, summary
from exporter.device import choose
from exporter.events import ignore
from exporter.export import export
from exporter.families.llava import live_name
from exporter.quantized import GroupSize
from exporter.recipe import Recipe

COMPONENTS = ("vision", "projector", "language")
WHERE: dict[str, tuple[str, ...]] = {"vision": ("vision",), "language": ("language",), "all": COMPONENTS}


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    method: str
    bits: int
    group: GroupSize
    where: str


def recipe(folder: Path, setting: Setting) -> Recipe:
    """The recipe that quantizes the components of `setting` and keeps the rest."""
    named = WHERE[setting.where]
    rule = {"method": setting.method, "bits": setting.bits, "group_size": setting.group}
    rules = [{"component": name, **(rule if name in named else {"bits": 16})} for name in COMPONENTS]
    return Recipe.model_validate(
        {
            "name": "demo-degradation",
            "summary": "one row of a table",
            "model": {"repo": str(folder), "family": "llava"},
            "quantize": rules,
            "gates": [],
            "evidence": [{"finding": "none", "figures": "none", "source": "bench/demo_degradation.py"}],
        }
    )


def weights(folder: Path, setting: Setting) -> dict[str, torch.Tensor]:
    """Every weight that a runtime would see, under its live name."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "artifact"
        export(recipe(folder, setting), out=out, device=choose("cpu"), on_event=ignore, skip_evaluation=True)
        artifact = Artifact.open(out)
        return {live_name(name): artifact.read(name) for name in artifact.names()}


def settings(methods: list[str], bits: list[int], groups: list[GroupSize]) -> Iterator[Setting]:
    """Rows of the table, in its order; one component alone only at the first group size, and not at 8 bits."""
    for method in methods:
        for width in bits:
            for group in groups:
                whole = width == 8 or group != groups[0]
                yield from (Setting(method, width, group, where) for where in (("all",) if whole else WHERE))


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    figures = "  ".join(f"{name} {value:.3f}" for name, value in row["summary"].items())
    return f"{row['method']:<5} W{row['bits']:<2} {row['group']!s:>4} {row['where']:<9} {figures}"


def measured(model: Any, exams: list[Exam], setting: Setting) -> dict[str, Any]:
    """A row: the setting and its figures."""
    kinds = by_kind(model, exams)
    row = {**asdict(setting), "summary": summary(kinds), "kinds": kinds}
    print(line(row), flush=True)
    return row


def main() -> None:
    """Command line."""
    from transformers import LlavaForConditionalGeneration

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, default=MODELS["demo-llava"])
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--methods", default="rtn,gptq")
    parser.add_argument("--bits", default="8,4,3,2")
    parser.add_argument("--groups", default="row,32")
    parser.add_argument("--device", default="cpu", help="where answers are made; quantization stays on the CPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    place = torch.device(options.device)
    model = LlavaForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32).to(place).eval()
    exams = [scene_exam("test", 0, options.scenes, place), easy_exam(place)]
    rows = [measured(model, exams, Setting("none", 16, "row", "all"))]
    groups: list[GroupSize] = ["row" if g == "row" else int(g) for g in options.groups.split(",")]
    for setting in settings(options.methods.split(","), [int(b) for b in options.bits.split(",")], groups):
        model.load_state_dict(weights(options.model, setting))
        rows.append(measured(model, exams, setting))
    if options.json:
        options.json.write_text(json.dumps({"scenes": options.scenes, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
