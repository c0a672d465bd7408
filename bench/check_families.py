"""Check tiny models of every family in a real vLLM: `python -m bench.check_families --vllm PROGRAM [--only NAME ...]`.

For every tower and text model that a family takes, the script writes a model with random weights
(`tests/tiny_models.py`, widened to what vLLM's CPU kernels need: heads of 32, sides that are multiples of 32), exports
it, and runs `mmq check` on the artifact. The default parts of a family are exported twice: with 4-bit weights (GPTQ,
groups of 32), whose check has a negative control, and with 8-bit weights and int8 activations. Models with another part
have 4 bits in attention and 8 bits in feed-forwards. Writes docs/measurements/checked-families.json after every model;
`docs/generate.py` makes the tables from it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from exporter.device import choose
from exporter.errors import MmqError
from exporter.events import ignore
from exporter.model.families import FAMILIES, Family
from exporter.pipeline.export import export
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import load_recipe
from tests.tiny_models import CONFIGS, TEMPLATE, words, write_tiny

RESULTS = Path(__file__).parent.parent / "docs" / "measurements" / "checked-families.json"
HEADS = {"num_attention_heads": 4, "head_dim": 32}
WIDER = {  # object of config.json -> its sizes
    "text_config": {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 2048},
    "vision_config": {"intermediate_size": 128},
}
OPT = {"ffn_dim": 256, "word_embed_proj_dim": 128, "num_attention_heads": 4}
W4 = {"method": "gptq", "bits": 4, "group_size": 32}
W8 = {"method": "rtn", "bits": 8, "group_size": "row", "activations": "int8"}
SCHEMES: dict[str, dict[str, dict[str, Any]]] = {  # name -> role -> scheme
    "w4": {"attention": W4, "mlp": W4},
    "w8a8": {"attention": W8, "mlp": W8},
    "mixed": {"attention": W4, "mlp": W8},
}
TASKS = ["captioning", "vqa"]


def served_config(config: dict[str, Any]) -> dict[str, Any]:
    """The tiny config with sizes that vLLM's CPU kernels take."""
    wide: dict[str, Any] = json.loads(json.dumps(config))
    for key, sizes in WIDER.items():
        wide[key] |= sizes
    text, vision = wide["text_config"], wide["vision_config"]
    text |= OPT if text["model_type"] == "opt" else HEADS
    if text.get("num_key_value_heads"):
        text["num_key_value_heads"] = 2
    if rope := text.get("rope_parameters"):
        rope["mrope_section"] = [4, 6, 6]
    if "out_hidden_size" in vision:
        vision["out_hidden_size"] = 128
    if "embed_dim" in vision:
        vision["hidden_size"] = 128
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


def recipe_for(family: Family, name: str, folder: Path) -> Recipe:
    """A recipe for all components that vLLM loads packed. name: of the schemes."""
    rules = [
        {"component": part.name, "role": role, **scheme}
        for part in family.components
        for role, scheme in SCHEMES[name].items()
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
    """What the tables need of a check."""
    if not result.get("compared"):
        return {"passed": False, "problems": result.get("problems") or [str(result.get("error"))]}
    kept = {key: result[key] for key in ("passed", "questions", "schemes", "engine", "build")}
    kept["mean"], kept["floor"] = (round(result["compared"][key]["mean"], 4) for key in ("distance", "floor"))
    if control := result["control"]:
        kept["control"] = {"component": control["component"], "moved": round(control["moved"]["mean"], 4)}
        kept["control"]["restored"] = round(control["restored"]["distance"]["mean"], 4)
    return kept | ({"problems": result["problems"]} if result["problems"] else {})


def export_model(name: str, schemes: str, scratch: Path) -> Path:
    """The artifact of a tiny model (a key of `CONFIGS`) with the schemes of a key of `SCHEMES`."""
    family, tiny = CONFIGS[name]
    config, folder, out = served_config(tiny), scratch / name, scratch / f"{name}-{schemes}"
    if not folder.exists():
        write_tiny(folder, family, config=config)
        if config["vision_config"].get("model_type") == "pixtral":
            write_pixtral_processor(folder, config)
    recipe = recipe_for(family.of(config), schemes, folder)
    export(recipe, out=out, device=choose("cpu"), on_event=ignore, skip_evaluation=True)
    return out


def check_model(name: str, vllm: str, scratch: Path, logs: Path, questions: int) -> dict[str, Any]:
    """Results by scheme."""
    results = {}
    for schemes in ["w4", "w8a8"] if name in FAMILIES else ["mixed"]:
        try:
            artifact = export_model(name, schemes, scratch)
        except MmqError as error:
            results[schemes] = {"passed": False, "problems": [str(error)]}
            continue
        options = ["--questions", str(questions), *(["--no-control"] if schemes != "w4" else [])]
        results[schemes] = summary(checked(artifact, vllm, options, logs / artifact.name))
    return results


def main() -> None:
    """Check the models and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", default=os.environ.get("MMQ_VLLM", "vllm"))
    served = sorted((name for name, (f, _) in CONFIGS.items() if not f.unserved), key=lambda name: name not in FAMILIES)
    parser.add_argument("--only", nargs="*", choices=served, default=served)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--logs", type=Path, default=Path("build/checked-families"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    for name in arguments.only:
        with tempfile.TemporaryDirectory(prefix="mmq-families-") as scratch:
            results[name] = check_model(name, arguments.vllm, Path(scratch), arguments.logs, arguments.questions)
        order = [known for known in CONFIGS if known in results]
        arguments.out.write_text(json.dumps({known: results[known] for known in order}, indent=1) + "\n")
        print(name, json.dumps(results[name]), flush=True)


if __name__ == "__main__":
    main()
