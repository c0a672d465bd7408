"""Shapes computed from a config.json equal those of the model that transformers builds from it."""

import copy
from typing import Any

import pytest
import torch

from exporter.model.families import FAMILIES, Family
from tests.conftest import header, header_config
from tests.headers.read import HEADER_NAMES, SMALLEST
from tests.slow import some
from tests.tiny_models import CONFIGS

# every tiny configuration of every family, and: family, changes of its tiny configuration (`object.key`: value)
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llava", {"text_config.tie_word_embeddings": True}),
    ("llava", {"tie_word_embeddings": True}),
    ("llava", {"text_config.num_key_value_heads": 1, "text_config.head_dim": 16}),
    ("llava", {"text_config.num_key_value_heads": None, "text_config.head_dim": None}),
    ("llava", {"text_config.attention_bias": True, "text_config.mlp_bias": True}),
    ("llava", {"text_config.model_type": "mistral"}),
    ("llava", {"text_config.model_type": "qwen2"}),
    ("llava", {"text_config.model_type": "qwen3", "text_config.attention_bias": True}),
    ("llava", {"text_config.model_type": "qwen3", "text_config.head_dim": 48}),
    ("llava", {"vision_config.model_type": "siglip_vision_model"}),
    ("llava", {"vision_config.model_type": "siglip_vision_model", "vision_config.vision_use_head": False}),
    ("llava", {"vision_config.num_channels": 1, "vision_config.image_size": 33}),
    ("llava", {"vision_feature_layer": [-2, 1], "multimodal_projector_bias": False}),
    ("blip2", {"text_config.enable_bias": False}),
    ("blip2", {"text_config.layer_norm_elementwise_affine": False, "vision_config.qkv_bias": False}),
    ("blip2", {"text_config.tie_word_embeddings": False, "qformer_config.encoder_hidden_size": 7}),
    ("blip2", {"qformer_config.use_qformer_text_input": True, "qformer_config.cross_attention_frequency": 3}),
    ("blip2-itm", {"qformer_config.max_position_embeddings": 99, "image_text_hidden_size": 5}),
]


def variant(family: Family, changes: dict[str, Any]) -> dict[str, Any]:
    """The family's tiny configuration with some keys changed."""
    config = copy.deepcopy(dict(family.tiny_config()))
    for path, value in changes.items():
        place, _, key = path.rpartition(".")
        (config[place] if place else config)[key] = value
    return config


def built(family: Family, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Checkpoint name -> shape of the model that transformers builds; tied heads are counted once."""
    with torch.device("meta"):
        model = family.skeleton(copy.deepcopy(config))
    model.tie_weights()
    return {family.canonical_name(name): tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=[f"{name} {changes}" for name, changes in VARIANTS])
def test_shapes_of_variants(name: str, changes: dict[str, Any]) -> None:
    config = variant(FAMILIES[name], changes)
    family = FAMILIES[name].of(config)
    sizes, problems = family.read(config)
    assert problems == []
    assert family.shapes(sizes) == built(family, config)


@pytest.mark.parametrize(("family", "config"), CONFIGS.values(), ids=CONFIGS)
def test_shapes_of_every_part(family: Family, config: dict[str, Any]) -> None:
    sizes, problems = family.read(config)
    assert problems == []
    assert family.shapes(sizes) == built(family, config)


@pytest.mark.parametrize("name", some(HEADER_NAMES, SMALLEST))
def test_shapes_of_real_headers(name: str) -> None:
    config = header_config(name)
    family = next(f for f in FAMILIES.values() if set(config["architectures"]) & set(f.architectures))
    sizes, problems = family.read(config)
    assert problems == []
    assert family.shapes(sizes) == {tensor: shape for tensor, (_, shape) in header(name).items()}


# transformers computes these from other keys, or replaces null
COMPUTED = ("encoder_hidden_size", "layer_types", "sliding_window", "pad_token_id")
COMPUTED += ("rope_parameters", "rope_scaling", "rope_theta")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_defaults_are_those_of_transformers(family: Family) -> None:
    """Every field that a config may leave out counts as transformers counts it."""
    config = family.tiny_config()
    for key, known in family.parts.items():
        for name in known:
            short = {**config, key: {"model_type": name}}
            with torch.device("meta"):
                theirs = getattr(family.skeleton(copy.deepcopy(short)).config, key)
            sizes, _ = family.read(short)
            for field in known[name].fields:
                if hasattr(theirs, field.key) and field.key not in COMPUTED:
                    default = getattr(theirs, field.key)
                    default = list(default) if isinstance(default, tuple) else default
                    assert sizes[key][field.key] == default, (name, field.key)
