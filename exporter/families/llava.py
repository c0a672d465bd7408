"""LLaVA-1.5 (Liu et al., arXiv 2310.03744): CLIP ViT -> two-linear projector -> Llama.

Checkpoint names are those of `llava-hf/llava-1.5-7b-hf`. vLLM (models/llava.py) builds the tower only up to
`vision_feature_layer` and fuses q/k/v and gate/up.
"""

from dataclasses import dataclass
from typing import Any

from exporter.families.config_fields import MOST_ROWS, Choice, Flag, Number
from exporter.families.family import Component, Config, Family, Pass, Sizes, Smoothing
from exporter.families.parts import ACTIVATIONS, TEXTS, TOWERS, Shapes, below, linear, size_of
from exporter.strict_json import kind

_CANONICAL = (  # what newer savers write -> the hub's names (transformers 4.52 and 5.x)
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
    """The hub's name of a tensor that a newer transformers saved under another one."""
    for new, hub in _CANONICAL:
        if name.startswith(new):
            name = hub + name.removeprefix(new)
            break
    tower = "vision_tower."
    if name.startswith(tower) and not name.startswith(tower + "vision_model."):
        name = tower + "vision_model." + name.removeprefix(tower)  # vLLM refuses the tower without it
    return name


def live_name(name: str) -> str:
    """Name inside transformers' `LlavaForConditionalGeneration` (5.16-5.19)."""
    for hub, live in _LIVE:
        if name.startswith(hub):
            return live + name.removeprefix(hub)
    return name


def runtime_name(name: str) -> str:
    """Name inside vLLM's `LlavaForConditionalGeneration`: the hub's own."""
    return name


def skeleton(config: Config) -> Any:
    """The transformers model for a config.json, uninitialized weights."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    return LlavaForConditionalGeneration(LlavaConfig.from_dict(dict(config)))


@dataclass(frozen=True)
class Layers:
    """The key that says which ViT layers' outputs are taken: a number, or a list of numbers."""

    key: str = "vision_feature_layer"
    default: int = -2

    def of(self, values: Config) -> Any:
        """What is written in `values`, or the default."""
        return values.get(self.key, self.default)

    def problem(self, value: Any) -> str | None:
        """Why `value` names no layers, or None."""
        listed = value if isinstance(value, list) else [value]
        if listed and all(type(layer) is int for layer in listed):
            return None
        return f"expected a whole number or a list of them, it is {kind(value)}"


_LAYERS = Layers()
_STRATEGY = Choice("vision_feature_select_strategy", "default", ("default", "full"))
_TIED = Flag("tie_word_embeddings", False)
_FIELDS = (
    _LAYERS,
    _STRATEGY,
    _TIED,
    Number("image_token_index", 32000, least=0, most=MOST_ROWS),
    Flag("multimodal_projector_bias", True),
    Choice("projector_hidden_act", "gelu", ACTIVATIONS),
)
_PARTS = {
    "vision_config": {name: TOWERS[name] for name in ("clip_vision_model", "siglip_vision_model")},
    "text_config": {name: TEXTS[name] for name in ("llama", "mistral", "qwen2", "qwen3")},
}


def _misfits(sizes: Sizes) -> list[str]:
    """Feature layers that the tower does not have."""
    stored, layers = sizes["vision_config"]["num_hidden_layers"], _feature_layers(sizes[""])
    wrong = [layer for layer in layers if not -stored - 1 <= layer <= stored]
    return [f"vision_feature_layer: {wrong[0]}, and the vision tower has {stored} blocks"] if wrong else []


def shapes(sizes: Sizes) -> Shapes:
    """Every tensor of a checkpoint, by the hub's names."""
    vision, text, own = sizes["vision_config"], sizes["text_config"], sizes[""]
    tower, words = _PARTS["vision_config"][vision["model_type"]], _PARTS["text_config"][text["model_type"]]
    seen, width = vision["hidden_size"] * len(_feature_layers(own)), text["hidden_size"]
    bias = own["multimodal_projector_bias"]
    whole = below("vision_tower.vision_model", tower.shapes(vision))
    whole |= below(
        "multi_modal_projector", linear("linear_1", width, seen, bias) | linear("linear_2", width, width, bias)
    )
    whole |= below("language_model.model", words.shapes(text))
    if not (own["tie_word_embeddings"] or text["tie_word_embeddings"]):
        whole["language_model.lm_head.weight"] = (text["vocab_size"], width)
    return whole


def _blocks_stored(config: Config) -> int:
    return int(size_of(_PARTS, config, "vision_config", "num_hidden_layers"))


def _feature_layers(config: Config) -> list[int]:
    layers = _LAYERS.of(config)
    return layers if isinstance(layers, list) else [layers]


def _blocks_used(config: Config) -> int:
    """ViT blocks that run: `vision_feature_layer` counts from the end when negative (-1 uses them all)."""
    stored = _blocks_stored(config)
    return max(stored + layer + 1 if layer < 0 else layer for layer in _feature_layers(config))


def _image_tokens(config: Config) -> int:
    """Vectors that the tower makes of one picture; `default` leaves out the first, which is CLIP's class token."""
    vision = config["vision_config"]
    side, patch = (size_of(_PARTS, config, "vision_config", key) for key in ("image_size", "patch_size"))
    classes = vision.get("model_type", "clip_vision_model") == "clip_vision_model"
    return int((side // patch) ** 2) + int(classes) - int(_STRATEGY.of(config) == "default")


def _text_blocks(config: Config) -> int:
    return int(size_of(_PARTS, config, "text_config", "num_hidden_layers"))


def _has_head(config: Config) -> int:
    """One, unless the output head is the embedding: transformers ties them when either object says so."""
    tied = _TIED.of(config) or size_of(_PARTS, config, "text_config", "tie_word_embeddings")
    return int(not tied)


def tiny_config() -> Config:
    """Two blocks each, odd sizes: in != out, 96 is no multiple of 64."""
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
    used=_blocks_used,
    stored=_blocks_stored,
    target=r".*vision_tower\.(?:vision_model\.)?encoder\.layers\.{i}",
    tokens=lambda config: _image_tokens(config) + 1,
    unused="this block never runs: vision_feature_layer takes the features before it",
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
    smoothings=(  # fc1 -> fc2 is none: GELU is not homogeneous
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
    tokens=_image_tokens,
)

LANGUAGE = Component(
    name="language",
    blocks="language_model.model.layers.{i}",
    used=_text_blocks,
    stored=_text_blocks,
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
    tokens=lambda config: _image_tokens(config) + 64,  # prompt and reply are short beside the image
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
    used=_has_head,
    stored=_has_head,
    phases=(("language_model.lm_head",),),
    roles={"language_model.lm_head": "mlp"},
    target=r".*lm_head",
    tokens=lambda config: 0,
    formats=("compressed_tensors",),  # vLLM's readers of the others ask for one switch for the whole file
    without_data="its inputs are the outputs of the whole model; use rtn, whose 8 bits lose nothing measurable",
)

FAMILY = Family(
    name="llava",
    architectures=("LlavaForConditionalGeneration",),
    components=(VISION, PROJECTOR, LANGUAGE, HEAD),
    kept=(),
    canonical_name=canonical_name,
    live_name=live_name,
    runtime_name=runtime_name,
    skeleton=skeleton,
    tiny_config=tiny_config,
    question_prompt="{question}\nAnswer the question using a single word or phrase.",
    caption_prompt="Provide a one-sentence caption for the provided image.",
    fallback_prompt="USER: <image>\n{text} ASSISTANT:",
    max_new_tokens={"vqa": 10, "captioning": 64},
    tasks=("vqa", "captioning"),
    image_tokens=_image_tokens,
    parts=_PARTS,
    fields=_FIELDS,
    misfits=_misfits,
    shapes=shapes,
    tied={"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"},
)
