"""What `bench.attack` damages: each kind writes a damaged input into a folder, and tries it as mmq would."""

import io
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image

from bench.damage import damaged_bytes, damaged_json
from exporter import data
from exporter.demo import MODELS
from exporter.device import choose
from exporter.errors import DataError
from exporter.inference.encoding import encode
from exporter.model.adapter import SETTINGS, WEIGHTS
from exporter.model.processor import load_processor
from exporter.model.stream import load_whole
from exporter.pipeline.preparation import prepare
from exporter.planning.recipe_file import load_recipe
from exporter.tasks.sample import Sample

RECIPES = {"demo-llava": "llava-w8", "demo-blip2": "blip2-caption-w4", "demo-blip2-itm": "blip2-retrieval-w4"}
SNIPPETS = (
    *("{{", "}}", "{%", "%}", "{#", "{% if %}", "{% endfor %}", "{{ x.y }}", "{{ messages[9] }}", "{{ 1 // 0 }}"),
    *("{{ 'a' * 10**9 }}", "{{ ''.__class__ }}", "{{ '%999999999d' % 1 }}", "{{ raise_exception('x') }}"),
    *(
        "{% set a = messages %}",
        "{{ messages }}",
        "{% for m in messages %}",
        "{{ content | tojson }}",
        "{{ bos_token }}",
    ),
    *("{% for i in range(99999) %}x{% endfor %}", "<image>", "\0", "\ud7ff", "{% generation %}", "{{ x | upper }}"),
    *("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ bos_token }}"),
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
)
PICTURES = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    share: of all mutations. damage: writes a damaged input. attempt: what mmq does with it; it calls its second
    argument once the input counts as accepted.
    """

    share: float
    damage: Callable[[Path, Random], None]
    attempt: Callable[[Path, Callable[[], None]], None]


def copy_model(folder: Path, random: Random) -> Path:
    """A copy of one of the embedded models; the folder's name tells which."""
    name = random.choice(list(MODELS))
    return Path(shutil.copytree(MODELS[name], folder / name))


def change_json(path: Path, random: Random, keys: tuple[str, ...] = ()) -> None:
    """Damage one JSON file."""
    path.write_bytes(damaged_json(json.loads(path.read_text(encoding="utf-8")), random, keys))


def try_model(folder: Path, accepted: Callable[[], None]) -> None:
    """Plan, and when the plan is made, read everything and run the model on one sample."""
    (model,) = folder.iterdir()
    lora = str(folder.parent / "adapter") if (folder.parent / "adapter").exists() else None
    recipe = load_recipe(RECIPES[model.name]).adjusted(model={"repo": str(model), "adapter": lora})
    plan, checkpoint = prepare(recipe, choose("cpu"), headers_only=True)
    accepted()
    family = plan.family
    whole = load_whole(
        family, checkpoint.config, list(checkpoint.tensors), checkpoint.read, torch.device("cpu"), torch.float32
    )
    processor = load_processor(model)
    sample = Sample("s", lambda: Image.new("RGB", (40, 30), "red"), "which color is it?", ("red",))
    inputs = encode(processor, family, [sample], ["red"], "right")
    with torch.inference_mode():
        family.outputs(whole, inputs)


def _header(folder: Path, random: Random) -> None:
    path = copy_model(folder, random) / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, rest = raw[8 : 8 + length], raw[8 + length :]
    if random.random() < 0.2:
        whole = damaged_bytes(raw[: 8 + length], random) + rest
    else:
        made = damaged_json(json.loads(header), random, ("dtype", "shape", "data_offsets", "__metadata__"))
        whole = struct.pack("<Q", len(made)) + made + rest
    path.write_bytes(whole[: len(whole) - random.choice((0, 0, 0, 1, 999))])


def _index(folder: Path, random: Random) -> None:
    model = copy_model(folder, random)
    raw = (model / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    names = [name for name in json.loads(raw[8 : 8 + length]) if name != "__metadata__"]
    index = {"metadata": {"total_size": len(raw)}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    made = damaged_json(index, random, ("weight_map", names[0], "model.bin"))
    (model / "model.safetensors.index.json").write_bytes(made)


def _config(folder: Path, random: Random) -> None:
    change_json(copy_model(folder, random) / "config.json", random, ("quantization_config", "dtype", "rope_parameters"))


def _processor(folder: Path, random: Random) -> None:
    name = random.choice(("preprocessor_config.json", "processor_config.json"))
    change_json(copy_model(folder, random) / name, random, ("size", "crop_size", "patch_size", "processor_class"))


def _tokenizer(folder: Path, random: Random) -> None:
    name = random.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"))
    change_json(copy_model(folder, random) / name, random, ("model", "normalizer", "added_tokens", "chat_template"))


def _template(folder: Path, random: Random) -> None:
    model = Path(shutil.copytree(MODELS["demo-llava"], folder / "demo-llava"))
    path = model / "chat_template.jinja"
    text = path.read_text(encoding="utf-8")
    for _ in range(random.choice((1, 1, 2, 3))):
        at, more = random.randrange(len(text)), random.randrange(1, 40)
        piece = random.choice((*SNIPPETS, text[at : at + more]))
        text = random.choice((text[:at] + piece + text[at:], text[:at] + text[at + more :], piece, text + piece)) or "x"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def _adapter(folder: Path, random: Random) -> None:
    from safetensors.torch import save_file

    place = folder.parent / "adapter"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    shutil.copytree(MODELS["demo-llava"], folder / "demo-llava")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "alpha_pattern": {}}
    (place / SETTINGS).write_text(json.dumps(settings))
    prefix = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    halves = {f"{prefix}.lora_A.weight": torch.ones(2, 128), f"{prefix}.lora_B.weight": torch.ones(128, 2)}
    save_file(halves, place / WEIGHTS)
    if random.random() < 0.6:
        return change_json(place / SETTINGS, random, ("use_dora", "use_rslora", "bias", "init_lora_weights"))
    raw = (place / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    made = damaged_json(json.loads(raw[8 : 8 + length]), random, ("dtype", "shape", f"{prefix}.lora_A.weight"))
    (place / WEIGHTS).write_bytes(struct.pack("<Q", len(made)) + made + raw[8 + length :])


def _rows(folder: Path, random: Random) -> None:
    place = folder / "train"
    place.mkdir(parents=True)
    Image.new("RGB", (20, 20), "red").save(place / "a.png")
    rows: list[dict[str, Any]] = [
        {"file_name": "a.png", "captions": ["a red square", "red"], "id": 1, "kind": "x"},
        {"file_name": "a.png", "question": "which color?", "answers": ["red"], "id": "2"},
        {"file_name": "a.png", "question": "<image>\nwhat?", "answer": "red", "caption": "red"},
    ]
    lines = [damaged_json(row, random, ("file_name", "caption", "answer")) for row in rows]
    whole = b"\n".join(lines) if random.random() < 0.9 else damaged_bytes(b"\n".join(lines), random)
    (place / "metadata.jsonl").write_bytes(whole)


def _try_rows(folder: Path, accepted: Callable[[], None]) -> None:
    problems = []
    for task in ("captioning", "vqa", "retrieval"):
        try:
            samples = data.samples("folder", folder, task, "train", 9, 0)
        except DataError as error:
            problems.append(error)
            continue
        for trace in data.traces(samples):
            json.dumps(trace.as_json()).encode()
        for sample in samples:
            f"{sample.identity}{sample.question}{sample.references}{sample.kind}".encode()
    if problems:
        raise problems[0]


def _picture(folder: Path, random: Random) -> None:
    place = folder / "train"
    place.mkdir(parents=True)
    kind = random.choice(PICTURES)
    image = Image.effect_noise((random.randrange(1, 60), random.randrange(1, 60)), 90)
    image = image.convert(random.choice(("L", "RGB")))
    file = io.BytesIO()
    image.save(file, kind)
    (place / "a.img").write_bytes(damaged_bytes(file.getvalue(), random))
    (place / "metadata.jsonl").write_text('{"file_name": "a.img", "caption": "c"}')


KINDS: dict[str, Kind] = {
    "header": Kind(0.16, _header, try_model),
    "index": Kind(0.08, _index, try_model),
    "config": Kind(0.22, _config, try_model),
    "processor": Kind(0.14, _processor, try_model),
    "tokenizer": Kind(0.12, _tokenizer, try_model),
    "template": Kind(0.06, _template, try_model),
    "adapter": Kind(0.06, _adapter, try_model),
    "rows": Kind(0.08, _rows, _try_rows),
    "picture": Kind(0.08, _picture, _try_rows),
}
