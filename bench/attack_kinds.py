"""The kinds of inputs that `bench.attack` damages: how each is damaged, and how mmq uses it."""

import io
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image

from bench.attack_artifacts import damage_artifact, damage_manifest, damage_report, try_artifact
from bench.attack_files import (
    damage_answers,
    damage_layout,
    damage_recipe,
    damage_work,
    try_answers,
    try_layout,
    try_recipe,
    try_work,
)
from bench.damage import damaged_bytes, damaged_json
from exporter import data
from exporter.data.tasks.sample import Sample
from exporter.device import choose
from exporter.errors import DataError
from exporter.model.adapter import SETTINGS, WEIGHTS
from exporter.model.embedded import MODELS
from exporter.model.inference.encoding import encode
from exporter.model.inference.predict import Predictor
from exporter.model.processors.processor import load_processor
from exporter.model.stream import load_whole
from exporter.pipeline.preparation import prepare
from exporter.planning.recipe_file import load_recipe

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

    about: what is damaged. share: of all mutations. damage: writes a damaged input. attempt: uses the input as mmq
    does, and calls its second argument once mmq has accepted the input.
    """

    about: str
    share: float
    damage: Callable[[Path, Random], None]
    attempt: Callable[[Path, Callable[[], None]], None]


def copy_model(folder: Path, random: Random) -> Path:
    """Copy a random embedded model; the folder has its name."""
    name = random.choice(list(MODELS))
    return Path(shutil.copytree(MODELS[name], folder / name))


def change_json(path: Path, random: Random, keys: tuple[str, ...] = ()) -> None:
    """Damage one JSON file."""
    path.write_bytes(damaged_json(json.loads(path.read_text(encoding="utf-8")), random, keys))


def try_model(folder: Path, accepted: Callable[[], None]) -> None:
    """Make a plan, then read all weights and run the model on one sample."""
    (model,) = folder.iterdir()
    lora = str(folder.parent / "adapter") if (folder.parent / "adapter").exists() else None
    recipe = load_recipe(RECIPES[model.name]).adjusted(model={"repo": str(model), "adapter": lora})
    plan, checkpoint = prepare(recipe, choose("cpu"), headers_only=True)
    accepted()
    family = plan.family
    model_with_weights = load_whole(
        family, checkpoint.config, list(checkpoint.tensors), checkpoint.read, torch.device("cpu"), torch.float32
    )
    processor = load_processor(model)
    picture = partial(Image.new, "RGB", (40, 30), "red")
    short = Sample("s", picture, "which color is it?", ("red",))
    long = Sample("t", picture, "what does the \u6f22\U0001fae0 on the left of it look like?", ("a red square",))
    inputs = encode(processor, family, [short, long], ["red", "a red square"], "right")
    with torch.inference_mode():
        family.outputs(model_with_weights, inputs)
    if "vqa" in family.tasks:
        predictor = Predictor(model_with_weights, processor, family, torch.device("cpu"), 2)
        predictor.answer([short, long])
        predictor.log_likelihood([short, long])


def _header(folder: Path, random: Random) -> None:
    path = copy_model(folder, random) / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, rest = raw[8 : 8 + length], raw[8 + length :]
    if random.random() < 0.2:
        content = damaged_bytes(raw[: 8 + length], random) + rest
    else:
        damaged = damaged_json(json.loads(header), random, ("dtype", "shape", "data_offsets", "__metadata__"))
        content = struct.pack("<Q", len(damaged)) + damaged + rest
    path.write_bytes(content[: len(content) - random.choice((0, 0, 0, 1, 999))])


def _index(folder: Path, random: Random) -> None:
    model = copy_model(folder, random)
    raw = (model / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    names = [name for name in json.loads(raw[8 : 8 + length]) if name != "__metadata__"]
    index = {"metadata": {"total_size": len(raw)}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    damaged = damaged_json(index, random, ("weight_map", names[0], "model.bin"))
    (model / "model.safetensors.index.json").write_bytes(damaged)


def _config(folder: Path, random: Random) -> None:
    change_json(copy_model(folder, random) / "config.json", random, ("quantization_config", "dtype", "rope_parameters"))


def _processor(folder: Path, random: Random) -> None:
    name = random.choice(("preprocessor_config.json", "processor_config.json"))
    change_json(copy_model(folder, random) / name, random, ("size", "crop_size", "patch_size", "processor_class"))


def _tokenizer(folder: Path, random: Random) -> None:
    name = random.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"))
    change_json(copy_model(folder, random) / name, random, ("model", "normalizer", "added_tokens", "chat_template"))


def _other_tokenizer(folder: Path, random: Random) -> None:
    """The same words in a tokenizer of another kind, damaged too."""
    path = copy_model(folder, random) / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    words = content["model"]["vocab"]
    listed = [[word, -1.0] for word in sorted(words, key=words.__getitem__)]
    content["model"] = random.choice(
        (
            {"type": "BPE", "vocab": words, "merges": [], "unk_token": "<unk>"},
            {"type": "BPE", "vocab": words, "merges": [], "byte_fallback": True, "unk_token": None},
            {"type": "WordPiece", "vocab": words, "unk_token": "<unk>", "continuing_subword_prefix": "##"}
            | {"max_input_chars_per_word": 100},
            {"type": "Unigram", "vocab": listed, "unk_id": 0, "byte_fallback": False},
        )
    )
    more = ("unk_token", "unk_id", "merges", "byte_fallback", "padding", "truncation", "decoder")
    raw = content if random.random() < 0.3 else content["model"]  # most damage hits the part in which the kinds differ
    damaged = damaged_json(raw, random, more)
    path.write_bytes(damaged if raw is content else _with(content, damaged))


def _with(content: dict[str, Any], model: bytes) -> bytes:
    """A tokenizer.json with another `model`."""
    rest = json.dumps({key: value for key, value in content.items() if key != "model"}).encode()
    return rest[:-1] + b', "model": ' + model + b"}"


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

    adapter = folder.parent / "adapter"
    shutil.rmtree(adapter, ignore_errors=True)
    adapter.mkdir()
    shutil.copytree(MODELS["demo-llava"], folder / "demo-llava")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "alpha_pattern": {}}
    (adapter / SETTINGS).write_text(json.dumps(settings))
    prefix = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    halves = {f"{prefix}.lora_A.weight": torch.ones(2, 128), f"{prefix}.lora_B.weight": torch.ones(128, 2)}
    save_file(halves, adapter / WEIGHTS)
    if random.random() < 0.6:
        return change_json(adapter / SETTINGS, random, ("use_dora", "use_rslora", "bias", "init_lora_weights"))
    raw = (adapter / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    damaged = damaged_json(json.loads(raw[8 : 8 + length]), random, ("dtype", "shape", f"{prefix}.lora_A.weight"))
    (adapter / WEIGHTS).write_bytes(struct.pack("<Q", len(damaged)) + damaged + raw[8 + length :])


def _rows(folder: Path, random: Random) -> None:
    split = folder / "train"
    split.mkdir(parents=True)
    Image.new("RGB", (20, 20), "red").save(split / "a.png")
    rows: list[dict[str, Any]] = [
        {"file_name": "a.png", "captions": ["a red square", "red"], "id": 1, "kind": "x"},
        {"file_name": "a.png", "question": "which color?", "answers": ["red"], "id": "2"},
        {"file_name": "a.png", "question": "<image>\nwhat?", "answer": "red", "caption": "red"},
    ]
    first = random.randrange(len(rows))
    lines = [
        damaged_json(row, random, ("file_name", "caption", "answer"))
        if i == first or random.random() < 0.3
        else json.dumps(row).encode()
        for i, row in enumerate(rows)
    ]
    content = b"\n".join(lines) if random.random() < 0.9 else damaged_bytes(b"\n".join(lines), random)
    (split / "metadata.jsonl").write_bytes(content)


def _try_rows(folder: Path, accepted: Callable[[], None]) -> None:
    problems, tasks = [], ("captioning", "vqa", "retrieval")
    for task in tasks:
        try:
            samples = data.samples("folder", folder, task, "train", 9, 0)
        except DataError as error:
            problems.append(error)
            continue
        for trace in data.traces(samples):
            json.dumps(trace.as_json()).encode()
        for sample in samples:
            f"{sample.identity}{sample.question}{sample.references}{sample.kind}".encode()
    if len(problems) == len(tasks):
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
    "header": Kind("safetensors header, its length, the end of the file", 0.12, _header, try_model),
    "index": Kind("`model.safetensors.index.json`", 0.06, _index, try_model),
    "config": Kind("`config.json`", 0.17, _config, try_model),
    "processor": Kind("`preprocessor_config.json`, `processor_config.json`", 0.11, _processor, try_model),
    "tokenizer": Kind(
        "`tokenizer.json` (WordLevel), `tokenizer_config.json`, special tokens", 0.1, _tokenizer, try_model
    ),
    "other tokenizer": Kind("`tokenizer.json` of BPE, WordPiece and Unigram", 0.07, _other_tokenizer, try_model),
    "template": Kind("`chat_template.jinja`", 0.05, _template, try_model),
    "adapter": Kind("LoRA adapter: settings, header of its weights", 0.06, _adapter, try_model),
    "rows": Kind("`metadata.jsonl` of a data folder", 0.06, _rows, _try_rows),
    "picture": Kind(f"picture: {', '.join(PICTURES)}", 0.06, _picture, _try_rows),
    "artifact": Kind("artifact: weights, header, config, recipe, a missing file", 0.06, damage_artifact, try_artifact),
    "manifest": Kind("`mmq_manifest.json`", 0.04, damage_manifest, try_artifact),
    "report": Kind("`mmq_report.json`", 0.04, damage_report, try_artifact),
    "recipe": Kind("recipe (YAML), grid of a study", 0.06, damage_recipe, try_recipe),
    "layout": Kind("COCO, VQAv2, GQA, Flickr30k, LLaVA's JSON, `metadata.csv`", 0.05, damage_layout, try_layout),
    "answers": Kind("answers for `mmq score`", 0.02, damage_answers, try_answers),
    "work": Kind("finished blocks and `job.json` of a work folder", 0.03, damage_work, try_work),
}
