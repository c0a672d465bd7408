"""Folders of tiny random BLIP-2 models with the words of the demo model, as exports read them."""

import json
from pathlib import Path
from typing import Any

import torch

from bench.random_checkpoint import write_blip2_processor
from exporter.files.shard_writer import ShardWriter
from exporter.model.embedded import MODELS
from exporter.model.families import Family
from tests.tiny_models import random_weights


def write_tiny_blip2(folder: Path, family: Family, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A BLIP-2 of the family's tiny configuration with the demo model's words, in one shard."""
    folder.mkdir(parents=True)
    demo = MODELS["demo-llava"]
    config = _with_words(dict(family.tiny_config()), json.loads((demo / "config.json").read_text()))
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_blip2_processor(folder, config)
    config = json.loads((folder / "config.json").read_text())
    writer = ShardWriter(folder, 10**9)
    for name, parameter in random_weights(family.skeleton(config)).named_parameters():
        writer.add(family.canonical_name(name), parameter.detach().to(dtype))
    writer.finish()
    return folder


def _with_words(config: dict[str, Any], demo: dict[str, Any]) -> dict[str, Any]:
    """The configuration with room for the demo tokenizer's words."""
    size = demo["text_config"]["vocab_size"]
    if "text_config" in config:
        config["text_config"] = config["text_config"] | {"vocab_size": size, "bos_token_id": 1, "eos_token_id": 2}
    config["qformer_config"] = config["qformer_config"] | {"vocab_size": size}
    return config
