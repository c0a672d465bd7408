"""Write a checkpoint of random weights at a real model's true shapes, in hub-style shards.

    python -m bench.random_checkpoint llava-hf--llava-1.5-7b-hf OUT [--device cuda]
    python -m bench.random_checkpoint Salesforce--blip2-opt-2.7b OUT [--device cuda]

For measurements of time and memory without real weights. Shapes, names and dtypes come from `tests/headers/`, tokenizer
and chat template from the embedded demo model, the image size from the config.
"""

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from exporter.dtypes import DTYPES
from exporter.files.shard_writer import ShardWriter
from exporter.model.embedded import MODELS
from exporter.model.families import FAMILIES, Family
from tests.headers.read import Header, load_header
from tests.tiny_models import write_processor as write_tiny_processor


def first_blocks(config: dict[str, Any], tensors: Header, blocks: int) -> tuple[dict[str, Any], Header]:
    """The model cut down to its first blocks (one more in LLaVA's vision tower, whose last block is not used)."""
    is_blip2 = "qformer_config" in config
    counts = {"text_config": blocks, "vision_config": blocks + (not is_blip2), "qformer_config": blocks}
    counts = {part: count for part, count in counts.items() if part in config}
    config = config | {part: config[part] | {"num_hidden_layers": count} for part, count in counts.items()}
    limits = {"language_model": blocks, "vision_tower": blocks + 1, "vision_model": blocks, "qformer": blocks}
    matches = {name: re.search(r"\.layers?\.(\d+)\.", name) for name in tensors}
    return config, {
        name: entry
        for name, entry in tensors.items()
        if not (match := matches[name]) or int(match[1]) < limits[name.partition(".")[0]]
    }


def write(header_name: str, out: Path, device: str, blocks: int = 0, shard_bytes: int = 5 * 10**9) -> int:
    """Write the folder, with all blocks or only the first ones; returns the number of parameters."""
    config, tensors = load_header(header_name)
    if blocks:
        config, tensors = first_blocks(config, tensors, blocks)
    out.mkdir(parents=True)
    generator = torch.Generator(device).manual_seed(0)
    writer, parameters = ShardWriter(out, shard_bytes), 0
    for name, (dtype, shape) in tensors.items():
        if len(shape) == 1 and name.endswith("weight"):
            tensor = torch.ones(shape, device=device)
        else:
            tensor = torch.randn(shape, generator=generator, device=device) * 0.02
        writer.add(name, tensor.to(DTYPES[dtype].torch).cpu())
        parameters += tensor.numel()
    writer.finish()
    write_processor(out, config)
    name_all_tokens(out, family_of(config).vocabulary(config))
    return parameters


def write_with_random_language(source: Path, out: Path) -> None:
    """A copy of a folder with normally distributed language weights of the same standard deviation."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    generator = torch.Generator().manual_seed(0)
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if tensor.ndim == 2 and "layers." in name and name.startswith("language_model."):
                random_weights = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
                tensors[name] = random_weights.to(tensor.dtype)
        save_file(tensors, out / file.name, metadata={"format": "pt"})


def family_of(config: dict[str, Any]) -> Family:
    """The family of a config.json."""
    architecture = config["architectures"][0]
    return next(family for family in FAMILIES.values() if architecture in family.architectures).of(config)


def write_processor(out: Path, config: dict[str, Any]) -> None:
    """The demo's processor with this model's image size; its token ids are valid in any larger vocabulary."""
    if "qformer_config" in config:
        return write_blip2_processor(out, config)
    if config["model_type"].startswith("qwen"):
        return write_qwen_processor(out, config)
    demo = MODELS["demo-llava"]
    for path in demo.iterdir():
        if path.suffix in (".json", ".jinja") and not path.name.startswith("model"):
            shutil.copyfile(path, out / path.name)
    side, patch = config["vision_config"]["image_size"], config["vision_config"]["patch_size"]
    preprocessor = json.loads((demo / "preprocessor_config.json").read_text())
    preprocessor["size"], preprocessor["crop_size"] = {"shortest_edge": side}, {"height": side, "width": side}
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    processor = json.loads((demo / "processor_config.json").read_text())
    processor |= {"patch_size": patch, "vision_feature_select_strategy": "default"}
    if "image_processor" in processor:
        processor["image_processor"] |= {"size": preprocessor["size"], "crop_size": preprocessor["crop_size"]}
    (out / "processor_config.json").write_text(json.dumps(processor))
    demo_config = json.loads((demo / "config.json").read_text())
    config = config | {"image_token_index": demo_config["image_token_index"]}
    (out / "config.json").write_text(json.dumps(config, indent=2))


def write_blip2_processor(out: Path, config: dict[str, Any]) -> None:
    """The demo's tokenizer with a BLIP-2 processor, and config.json with its image token."""
    demo, side = MODELS["demo-llava"], config["vision_config"]["image_size"]
    for name in ("tokenizer.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copyfile(demo / name, out / name)
    pictures = json.loads((demo / "preprocessor_config.json").read_text())
    pictures = {name: pictures[name] for name in ("image_mean", "image_std", "do_rescale", "do_normalize", "resample")}
    pictures |= {"image_processor_type": "BlipImageProcessor", "size": {"height": side, "width": side}}
    words = json.loads((demo / "tokenizer_config.json").read_text())
    del words["image_token"]  # the processor adds this token itself and fails on this entry
    has_placeholder = config["image_token_index"] is not None
    texts = {
        "preprocessor_config": pictures,
        "processor_config": {"num_query_tokens": config["num_query_tokens"] if has_placeholder else None},
        "tokenizer_config": words,
    }
    for file, content in texts.items():
        (out / f"{file}.json").write_text(json.dumps(content | {"processor_class": "Blip2Processor"}))
    if has_placeholder:
        config = config | {"image_token_index": json.loads((demo / "config.json").read_text())["image_token_index"]}
    (out / "config.json").write_text(json.dumps(config, indent=2))


def name_all_tokens(out: Path, rows: int) -> None:
    """Add names to the tokenizer for all ids below `rows`, because random weights answer with any of them."""
    path = out / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    words |= {f"<filler {i}>": i for i in range(1 + max(words.values()), rows)}
    path.write_text(json.dumps(tokenizer))


def write_qwen_processor(out: Path, config: dict[str, Any]) -> None:
    """The tests' processor with this model's patches, and config.json with the token ids of its tokenizer."""
    family = family_of(config)
    tiny, rows = family.tiny_config(), family.vocabulary(config)
    ids = {name: rows - family.vocabulary(tiny) + tiny[name] for name in tiny if name.endswith("_token_id")}
    config = config | ids
    write_tiny_processor(out, family, config)
    vision, path = config["vision_config"], out / "preprocessor_config.json"
    square = vision["patch_size"] * vision.get("spatial_merge_size", 2)
    settings = {"patch_size": vision["patch_size"], "merge_size": vision.get("spatial_merge_size", 2)}
    settings |= {"size": {"shortest_edge": (4 * square) ** 2, "longest_edge": (32 * square) ** 2}}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("header")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--blocks", type=int, default=0, help="only the first blocks, enough to measure memory")
    arguments = parser.parse_args()
    count = write(arguments.header, arguments.out, arguments.device, arguments.blocks)
    print(json.dumps({"parameters": count, "folder": str(arguments.out)}))


if __name__ == "__main__":
    main()
