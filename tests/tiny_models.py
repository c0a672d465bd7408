"""Folders of tiny random models of every family, complete with a processor, as exports read them."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from exporter.checkpoint import ShardWriter
from exporter.demo import MODELS
from exporter.families import Family
from tests.test_families import random_weights

TEXTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def write_tiny(folder: Path, family: Family, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A BLIP-2 of the family's tiny configuration with the demo model's words, in one shard."""
    folder.mkdir(parents=True)
    demo = MODELS["demo-llava"]
    for name in TEXTS:
        shutil.copyfile(demo / name, folder / name)
    config = _with_words(dict(family.tiny_config()), json.loads((demo / "config.json").read_text()))
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config))
    side = config["vision_config"]["image_size"]
    pictures = json.loads((demo / "preprocessor_config.json").read_text())
    pictures = {"image_mean": pictures["image_mean"], "image_std": pictures["image_std"], "do_rescale": True}
    pictures |= {"image_processor_type": "BlipImageProcessor", "size": {"height": side, "width": side}}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures | {"processor_class": "Blip2Processor"}))
    queries = config["num_query_tokens"] if config["image_token_index"] is not None else None
    processor = {"processor_class": "Blip2Processor", "num_query_tokens": queries}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    words = json.loads((folder / "tokenizer_config.json").read_text())
    del words["image_token"]  # the processor adds it by itself, and trips over one that is there
    (folder / "tokenizer_config.json").write_text(json.dumps(words | {"processor_class": "Blip2Processor"}))
    writer = ShardWriter(folder, 10**9)
    for name, parameter in random_weights(family.skeleton(config)).named_parameters():
        writer.add(family.canonical_name(name), parameter.detach().to(dtype))
    writer.finish()
    return folder


def _with_words(config: dict[str, Any], demo: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the demo tokenizer's vocabulary and image token."""
    size = demo["text_config"]["vocab_size"]
    if "text_config" in config:
        config["text_config"] = config["text_config"] | {"vocab_size": size, "bos_token_id": 1, "eos_token_id": 2}
    config["qformer_config"] = config["qformer_config"] | {"vocab_size": size}
    if config["image_token_index"] is not None:
        config["image_token_index"] = demo["image_token_index"]
    return config
