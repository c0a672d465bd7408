"""Check tiny models of every family in a real vLLM: `python -m bench.check_families --vllm PROGRAM [--only NAME ...]`.

For every tower and text model that a family takes, the script writes a model with random weights
(`tests/tiny_models.py`, widened to what vLLM's kernels need), exports it, and runs `mmq check` on the artifact. A
preset has the sizes and schemes of one kind of machine (`PRESETS`). The default parts of a family are exported twice;
models with another part have one scheme in attention and another one in feed-forwards. `--jobs` checks run at the same
time. Writes the preset's file in docs/measurements/, or `--out`, after every check, for the tables of
`docs/generate.py`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from exporter.device import choose
from exporter.events import ignore
from exporter.model.families import FAMILIES, Family
from exporter.pipeline.export import export
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import load_recipe
from tests.tiny_models import CONFIGS, TEMPLATE, words, write_tiny

MEASUREMENTS = Path(__file__).parent.parent / "docs" / "measurements"
TASKS = ["captioning", "vqa"]
ENVIRONMENT = "in vLLM's environment"  # the hint of `mmq check` about a package that is missing there
Scheme = Mapping[str, Any]  # keys of a recipe's rule


def gptq(group: int) -> Scheme:
    """4-bit weights in groups."""
    return {"method": "gptq", "bits": 4, "group_size": group}


W8 = {"method": "rtn", "bits": 8, "group_size": 128}
INT8 = {"method": "rtn", "bits": 8, "group_size": "row", "activations": "int8"}


@dataclass(frozen=True)
class Preset:
    """Sizes and schemes for one kind of machine.

    head: width of an attention head of the text model, which has four. rotary: how many of its frequencies time, row
    and column of a picture get. text, feeds: width and feed-forward of the text model. vision, vision_feeds: of the
    tower. schemes: name -> role -> scheme. twice: those of a family's default parts; of other parts, `mixed`. control:
    those with a negative control. flags: of vLLM.
    """

    results: Path
    head: int
    rotary: tuple[int, int, int]
    text: int
    feeds: int
    vision: int
    vision_feeds: int
    schemes: Mapping[str, Mapping[str, Scheme]]
    twice: tuple[str, str]
    control: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


PRESETS = {
    "cpu": Preset(  # its kernels take sides that are multiples of 32, and no 8-bit weights with 16-bit inputs
        MEASUREMENTS / "checked-families.json",
        *(32, (4, 6, 6), 128, 256, 64, 128),
        schemes={
            "w4": {"attention": gptq(32), "mlp": gptq(32)},
            "w8a8": {"attention": INT8, "mlp": INT8},
            "mixed": {"attention": gptq(32), "mlp": INT8},
        },
        twice=("w4", "w8a8"),
        control=("w4",),
    ),
    "gpu": Preset(  # Machete and Marlin take inputs and outputs that are multiples of 128
        MEASUREMENTS / "checked-families-gpu.json",
        *(64, (12, 10, 10), 256, 512, 128, 256),
        schemes={
            "w4": {"attention": gptq(128), "mlp": gptq(64)},
            "w8": {"attention": W8, "mlp": INT8},
            "mixed": {"attention": gptq(32), "mlp": INT8},
        },
        twice=("w4", "w8"),
        flags=("--enforce-eager", "--gpu-memory-utilization", "0.05", "--kv-cache-memory-bytes", str(2**28)),
    ),
}
CPU = PRESETS["cpu"]


def served_config(config: dict[str, Any], preset: Preset = CPU) -> dict[str, Any]:
    """The tiny config with the sizes of a preset."""
    wide: dict[str, Any] = json.loads(json.dumps(config))
    text, vision = wide["text_config"], wide["vision_config"]
    text |= {"hidden_size": preset.text, "num_attention_heads": 4, "max_position_embeddings": 2048}
    if text["model_type"] == "opt":
        text |= {"ffn_dim": preset.feeds, "word_embed_proj_dim": preset.text}
    else:
        text |= {"intermediate_size": preset.feeds, "head_dim": preset.head}
    if text.get("num_key_value_heads"):
        text["num_key_value_heads"] = 2
    if rope := text.get("rope_parameters"):
        rope["mrope_section"] = list(preset.rotary)
    vision["intermediate_size"] = preset.vision_feeds
    vision["embed_dim" if "embed_dim" in vision else "hidden_size"] = preset.vision
    for key in ("out_hidden_size", *["hidden_size"] * ("embed_dim" in vision)):
        if key in vision:
            vision[key] = preset.text
    if queries := wide.get("qformer_config"):
        queries["encoder_hidden_size"] = preset.vision
    return wide


def write_pixtral_processor(folder: Path, config: dict[str, Any]) -> None:
    """Pixtral's own processor, which vLLM needs; mmq loads it where torchvision is installed."""
    marks = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    words(config["text_config"]["vocab_size"], marks, named=False).save_pretrained(folder)
    patch, side = config["vision_config"]["patch_size"], config["vision_config"]["image_size"]
    pictures = {"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": side}}
    pictures |= {"patch_size": {"height": patch, "width": patch}}
    processor = {"processor_class": "PixtralProcessor", "patch_size": patch, "image_token": marks[0]}
    processor |= {"image_break_token": marks[1], "image_end_token": marks[2]}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("PICTURE", marks[0]))


def recipe_for(family: Family, name: str, folder: Path, preset: Preset) -> Recipe:
    """A recipe for all components that vLLM loads packed. name: of the schemes."""
    rules = [
        {"component": part.name, "role": role, **scheme}
        for part in family.components
        for role, scheme in preset.schemes[name].items()
        if role in part.roles.values() and not (part.unpackable or part.without_data)
    ]
    data = load_recipe("llava-w4").model_dump() | {
        "name": name,
        "quantize": rules,
        "model": {"repo": str(folder)},
        "calibration": {"data": "demo", "tasks": TASKS, "samples": 16, "batch": 4},
        "gates": ({"task": "vqa", "metric": "accuracy", "max_drop": 0.9},),
    }
    return Recipe.model_validate(data)


def checked(artifact: Path, vllm: str, options: list[str], logs: Path) -> dict[str, Any]:
    """The result of `mmq check`, or its error."""
    command = [sys.executable, "-m", "exporter", "check", str(artifact), "--vllm", vllm, "--json", "--logs", str(logs)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    lines: list[str] = done.stdout.splitlines()
    result: dict[str, Any] = json.loads(lines[-1]) if lines else {"error": done.stderr[-2000:]}
    return result


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """What the tables need of a check; `not run` with the reason where vLLM's environment lacks a package."""
    if ENVIRONMENT in str(result.get("hint")):
        return {"not run": str(result["hint"]).partition(",")[0]}
    if not result.get("compared"):
        return {"passed": False, "problems": result.get("problems") or [str(result.get("error"))]}
    kept = {key: result[key] for key in ("passed", "questions", "schemes", "engine", "build")}
    if result["build"] != "cpu":
        kept["kernels"] = result["kernels"]
    kept["mean"], kept["floor"] = (round(result["compared"][key]["mean"], 4) for key in ("distance", "floor"))
    if control := result["control"]:
        kept["control"] = {"component": control["component"], "moved": round(control["moved"]["mean"], 4)}
        kept["control"]["restored"] = round(control["restored"]["distance"]["mean"], 4)
    return kept | ({"problems": result["problems"]} if result["problems"] else {})


def export_model(name: str, schemes: str, scratch: Path, preset: Preset = CPU) -> Path:
    """The artifact of a tiny model (a key of `CONFIGS`) with the schemes of a key of the preset's."""
    family, tiny = CONFIGS[name]
    config, folder, out = served_config(tiny, preset), scratch / name, scratch / f"{name}-{schemes}"
    if not folder.exists():
        write_tiny(folder, family, config=config)
        if config["vision_config"].get("model_type") == "pixtral":
            write_pixtral_processor(folder, config)
    recipe = recipe_for(family.of(config), schemes, folder, preset)
    export(recipe, out=out, device=choose("cpu"), on_event=ignore, skip_evaluation=True)
    return out


def check_model(name: str, schemes: str, settings: argparse.Namespace) -> dict[str, Any]:
    """Export a model and check the artifact."""
    preset = PRESETS[settings.preset]
    with tempfile.TemporaryDirectory(prefix="mmq-families-") as scratch:
        try:
            artifact = export_model(name, schemes, Path(scratch), preset)
        except Exception as error:  # noqa: BLE001 (the next model is checked nevertheless)
            return {"passed": False, "problems": [f"{type(error).__name__}: {error}"]}
        options = ["--questions", str(settings.questions), "--device", "cpu"]
        options += [] if schemes in preset.control else ["--no-control"]
        options += ["--", *preset.flags] if preset.flags else []
        return summary(checked(artifact, settings.vllm, options, settings.logs / artifact.name))


def main() -> None:
    """Check the models and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", default=os.environ.get("MMQ_VLLM", "vllm"))
    served = sorted((name for name, (f, _) in CONFIGS.items() if not f.unserved), key=lambda name: name not in FAMILIES)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--only", nargs="*", choices=served, default=served)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--logs", type=Path, default=Path("build/checked-families"))
    parser.add_argument("--out", type=Path)
    settings = parser.parse_args()
    preset = PRESETS[settings.preset]
    out = settings.out or preset.results
    results: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    with ProcessPoolExecutor(settings.jobs, get_context("spawn")) as pool:
        cases = [(name, s) for name in settings.only for s in (preset.twice if name in FAMILIES else ("mixed",))]
        waiting = {pool.submit(check_model, name, schemes, settings): (name, schemes) for name, schemes in cases}
        for done in as_completed(waiting):
            name, schemes = waiting[done]
            results.setdefault(name, {})[schemes] = done.result()
            order = [known for known in CONFIGS if known in results]
            out.write_text(
                json.dumps({known: dict(sorted(results[known].items())) for known in order}, indent=1) + "\n"
            )
            print(name, schemes, json.dumps(results[name][schemes]), flush=True)


if __name__ == "__main__":
    main()
