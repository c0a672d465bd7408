"""The LLaVA-1.5 family (Liu et al., arXiv 2310.03744): CLIP ViT -> two-linear projector -> Llama.

Checkpoint names are those of `llava-hf/llava-1.5-7b-hf`. vLLM (models/llava.py) builds the tower only up to
`vision_feature_layer`, and fuses q/k/v and gate/up.
"""

from typing import Any

import exporter.model.families.parts.llava as sizes
from exporter.model.families.family import Component, Config, Family, Pass, Smoothing

_CANONICAL = (  # names that transformers 4.52 and 5.x save -> the hub's names
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
_LIVE = (
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("multi_modal_projector", "model.multi_modal_projector"),
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head", "lm_head"),
)


def canonical_name(name: str) -> str:
    """The hub's name of a tensor that a newer transformers version saved under another name."""
    for new, hub in _CANONICAL:
        if name.startswith(new):
            name = hub + name.removeprefix(new)
            break
    tower = "vision_tower."
    if name.startswith(tower) and not name.startswith(tower + "vision_model."):
        name = tower + "vision_model." + name.removeprefix(tower)  # vLLM requires this prefix
    return name


def live_name(name: str) -> str:
    """Name inside transformers' `LlavaForConditionalGeneration` (5.16-5.19)."""
    for hub, live in _LIVE:
        if name.startswith(hub):
            return live + name.removeprefix(hub)
    return name


def runtime_name(name: str) -> str:
    """Name inside vLLM's `LlavaForConditionalGeneration`, which is the hub's name."""
    return name


def skeleton(config: Config) -> Any:
    """The transformers model for a config.json, with uninitialized weights."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    return LlavaForConditionalGeneration(LlavaConfig.from_dict(dict(config)))


def tiny_config() -> Config:
    """Two or three blocks per component, odd sizes: in != out, and 96 is not a multiple of 64."""
    text = {"model_type": "llama", "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 3, "num_key_value_heads": 3, "vocab_size": 128, "max_position_embeddings": 256}
    vision = {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8, "projection_dim": 64}
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": text,
        "vision_config": vision,
        "image_token_index": 127,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


VISION = Component(
    name="vision",
    blocks="vision_tower.vision_model.encoder.layers.{i}",
    used=sizes.blocks_used,
    stored=sizes.blocks_stored,
    target=r".*vision_tower\.(?:vision_model\.)?encoder\.layers\.{i}",
    tokens=lambda config: sizes.image_tokens(config) + 1,
    unused="this block never runs: vision_feature_layer selects the output of an earlier block",
    phases=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("mlp.fc1",),
        ("mlp.fc2",),
    ),
    roles={
        "self_attn.q_proj": "attention",
        "self_attn.k_proj": "attention",
        "self_attn.v_proj": "attention",
        "self_attn.out_proj": "attention",
        "mlp.fc1": "mlp",
        "mlp.fc2": "mlp",
    },
    smoothings=(  # fc1 -> fc2 cannot be folded, because GELU is not homogeneous
        Smoothing("layer_norm1", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Smoothing("self_attn.v_proj", ("self_attn.out_proj",)),
        Smoothing("layer_norm2", ("mlp.fc1",)),
    ),
    fused={"self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")},
)

PROJECTOR = Component(
    name="projector",
    blocks="multi_modal_projector",
    used=lambda config: 1,
    stored=lambda config: 1,
    phases=(("linear_1",), ("linear_2",)),
    roles={"linear_1": "mlp", "linear_2": "mlp"},
    target=r".*multi_modal_projector",
    tokens=sizes.image_tokens,
)

LANGUAGE = Component(
    name="language",
    blocks="language_model.model.layers.{i}",
    used=sizes.text_blocks,
    stored=sizes.text_blocks,
    phases=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    roles={
        "self_attn.q_proj": "attention",
        "self_attn.k_proj": "attention",
        "self_attn.v_proj": "attention",
        "self_attn.o_proj": "attention",
        "mlp.gate_proj": "mlp",
        "mlp.up_proj": "mlp",
        "mlp.down_proj": "mlp",
    },
    target=r".*language_model\.(?:model\.)?layers\.{i}",
    tokens=lambda config: sizes.image_tokens(config) + 64,  # prompt and reply are short relative to the image
    passes=(Pass(padded=True),),
    smoothings=(
        Smoothing("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Smoothing("self_attn.v_proj", ("self_attn.o_proj",)),
        Smoothing("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        Smoothing("mlp.up_proj", ("mlp.down_proj",)),
    ),
    fused={
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
)

HEAD = Component(
    name="head",
    blocks="language_model.lm_head",
    used=sizes.has_head,
    stored=sizes.has_head,
    phases=(("language_model.lm_head",),),
    roles={"language_model.lm_head": "mlp"},
    target=r".*lm_head",
    tokens=lambda config: 0,
    formats=("compressed_tensors",),  # vLLM's other loaders have one setting for the whole file
    without_data="its inputs are the outputs of the whole model; use rtn, which has no measurable loss at 8 bits",
)

FAMILY = Family(
    name="llava",
    architectures=("LlavaForConditionalGeneration",),
    components=(VISION, PROJECTOR, LANGUAGE, HEAD),
    kept=(),
    canonical_name=canonical_name,
    live_name=live_name,
    runtime_name=runtime_name,
    config_class="LlavaConfig",
    skeleton=skeleton,
    tiny_config=tiny_config,
    question_prompt="{question}\nAnswer the question using a single word or phrase.",
    caption_prompt="Provide a one-sentence caption for the provided image.",
    fallback_prompt="USER: <image>\n{text} ASSISTANT:",
    max_new_tokens={"vqa": 10, "captioning": 64},
    tasks=("vqa", "captioning"),
    image_tokens=sizes.image_tokens,
    positions=sizes.positions,
    vocabulary=sizes.vocabulary,
    picture_side=sizes.picture_side,
    processor_fields=sizes.processor_fields,
    parts=sizes.PARTS,
    fields=sizes.FIELDS,
    misfits=sizes.misfits,
    shapes=sizes.shapes,
    tied={"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"},
)
