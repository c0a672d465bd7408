"""Tiny LLaVA configurations with the text models and towers that the family takes, and Gemmas, and inputs for them."""

from dataclasses import replace
from typing import Any

import torch

from exporter.model.families import FAMILIES, Component, Family
from tests.tiny_models import tiny_inputs


def _any_llava() -> Family:
    """LLaVA with any text model: the plan refuses Gemma, whose shapes nobody wrote down, calibration must not."""
    family = FAMILIES["llava"]

    def count(config: Any) -> int:
        return int(config["text_config"]["num_hidden_layers"])

    def free(part: Component) -> Component:
        return replace(part, used=count, stored=count) if part.name == "language" else part

    parts = tuple(map(free, family.components))
    return replace(family, components=parts, parts={}, fields=(), misfits=lambda _: [], shapes=lambda _: {})


ANY_LLAVA = _any_llava()
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
QWEN2 = {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 2}
SLIDING = {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
GEMMA3 = {
    "model_type": "gemma3_text",
    "head_dim": 16,
    "num_hidden_layers": 3,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 32,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,  # vLLM builds a feed-forward in 16 bits that is no multiple of 64 wide
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "vision_use_head": False,
}


def llava_config(
    text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """A config.json of LLaVA with another text model or tower; `text` changes Llama's values."""
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": {**LLAMA, **(text or {})},
        "vision_config": vision or CLIP,
        "image_token_index": 127,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "dtype": "float32",
        **more,
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "llama": llava_config(),
    "grouped-query": llava_config({"num_key_value_heads": 2}),
    "multi-query": llava_config({"num_key_value_heads": 1, "head_dim": 32}),
    "llama-bias": llava_config({"attention_bias": True, "mlp_bias": True}),
    "tied": llava_config({"tie_word_embeddings": True}, tie_word_embeddings=True),
    "mistral": llava_config({"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 8}),
    "qwen2": llava_config(QWEN2),
    "qwen2-sliding": llava_config({**QWEN2, **SLIDING}),
    "qwen3": llava_config({**QWEN2, "model_type": "qwen3", "head_dim": 16}),
    "qwen3-sliding": llava_config({**QWEN2, **SLIDING, "model_type": "qwen3", "head_dim": 16}),
    "gemma": llava_config({"model_type": "gemma", "head_dim": 16}, tie_word_embeddings=True),
    "gemma2": llava_config(
        {**GEMMA3, "model_type": "gemma2", "num_hidden_layers": 2, "layer_types": None}, tie_word_embeddings=True
    ),
    "gemma3": llava_config(GEMMA3, tie_word_embeddings=True),
    "siglip": llava_config(vision=SIGLIP, vision_feature_select_strategy="full"),
    "siglip-head": llava_config(vision={**SIGLIP, "vision_use_head": True}, vision_feature_select_strategy="full"),
    "layers-listed": llava_config(vision_feature_layer=[-2, -3]),
    "layers-out-of-order": llava_config(vision_feature_layer=[1, -1]),
    "last-layer": llava_config(vision_feature_layer=-1),
    "first-layer": llava_config(vision_feature_layer=1),
    "full-features": llava_config(vision_feature_select_strategy="full"),
    "image-token-id": {
        ("image_token_id" if key == "image_token_index" else key): value for key, value in llava_config().items()
    },
}


def inputs_for(config: dict[str, Any], batch: int, letters: int) -> dict[str, torch.Tensor]:
    """What the processor makes of pictures and texts longer than the windows; the last row is padded on the left."""
    return tiny_inputs(FAMILIES["llava"], batch, letters, config)
