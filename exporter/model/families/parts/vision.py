"""Vision towers with a fixed grid of patches: CLIP, SigLIP, Idefics 3's SigLIP, BLIP-2's EVA ViT; and Pixtral's.

Their blocks differ little, their embeddings differ more.
"""

from exporter.model.families.config_fields import MAX_BLOCKS, Choice, Field, Flag, Fraction, Number, Values
from exporter.model.families.parts.part import (
    ACTIVATIONS,
    Part,
    Shapes,
    Smoothing,
    Stack,
    blocks,
    heads_misfit,
    linear,
    norm,
)

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ENCODER = Stack(
    path="encoder.layers.{i}",
    phases=(_QKV, ("self_attn.out_proj",), ("mlp.fc1",), ("mlp.fc2",)),
    attention=(*_QKV, "self_attn.out_proj"),
    row_parallel=("self_attn.out_proj", "mlp.fc2"),
    smoothings=(  # fc1 -> fc2 cannot be folded, because GELU is not homogeneous
        Smoothing("layer_norm1", _QKV),
        Smoothing("self_attn.v_proj", ("self_attn.out_proj",)),
        Smoothing("layer_norm2", ("mlp.fc1",)),
    ),
    fused={"self_attn.qkv_proj": _QKV},
)
_EVA = Stack(
    path="encoder.layers.{i}",
    phases=(("self_attn.qkv",), ("self_attn.projection",), ("mlp.fc1",), ("mlp.fc2",)),
    attention=("self_attn.qkv", "self_attn.projection"),
    row_parallel=("self_attn.projection", "mlp.fc2"),
    smoothings=(  # fc1 -> fc2 cannot be folded, because GELU is not homogeneous
        Smoothing("layer_norm1", ("self_attn.qkv",)),
        Smoothing("self_attn.qkv", ("self_attn.projection",), rows=(2, 3)),
        Smoothing("layer_norm2", ("mlp.fc1",)),
    ),
)
_PIXTRAL_QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
_GATE_UP = ("feed_forward.gate_proj", "feed_forward.up_proj")
_PIXTRAL = Stack(
    path="transformer.layers.{i}",
    phases=(_PIXTRAL_QKV, ("attention.o_proj",), _GATE_UP, ("feed_forward.down_proj",)),
    attention=(*_PIXTRAL_QKV, "attention.o_proj"),
    row_parallel=("attention.o_proj", "feed_forward.down_proj"),
    smoothings=(
        Smoothing("attention_norm", _PIXTRAL_QKV),
        Smoothing("attention.v_proj", ("attention.o_proj",)),
        Smoothing("ffn_norm", _GATE_UP),
        Smoothing("feed_forward.up_proj", ("feed_forward.down_proj",)),  # its gate, not its values, has the activation
    ),
    fused={"attention.qkv_proj": _PIXTRAL_QKV, "feed_forward.gate_up_proj": _GATE_UP},
)
_TINY = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 2}
_TINY |= {"image_size": 32, "patch_size": 8}


def patches(values: Values) -> int:
    """Number of patches of one picture."""
    return int((values["image_size"] // values["patch_size"]) ** 2)


def _misfits(values: Values) -> list[str]:
    side, patch = values["image_size"], values["patch_size"]
    small = [f"patch_size: {patch} is larger than image_size {side}"] if patch > side else []
    return small + heads_misfit(values)


def _fields(width: int, feeds: int, count: int, heads: int, side: int, patch: int, act: str) -> tuple[Field, ...]:
    """Fields of every tower, with the defaults of one class."""
    return (
        Number("hidden_size", width),
        Number("intermediate_size", feeds),
        Number("num_hidden_layers", count, most=MAX_BLOCKS),
        Number("num_attention_heads", heads),
        Number("image_size", side, most=2**14),
        Number("patch_size", patch, most=2**14),
        Choice("hidden_act", act, ACTIVATIONS),
        Fraction("attention_dropout", 0.0),
    )


def _encoder(values: Values) -> Shapes:
    """Shapes of CLIP's and SigLIP's blocks and the norm after them."""
    width, feeds = values["hidden_size"], values["intermediate_size"]
    block: Shapes = {}
    for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
        block |= linear(f"self_attn.{name}", width, width)
    block |= norm("layer_norm1", width) | linear("mlp.fc1", feeds, width)
    block |= linear("mlp.fc2", width, feeds) | norm("layer_norm2", width)
    return blocks("encoder.layers", values["num_hidden_layers"], block) | norm("post_layernorm", width)


def _clip(values: Values) -> Shapes:
    width, patch = values["hidden_size"], values["patch_size"]
    embeddings: Shapes = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, values["num_channels"], patch, patch),
        "embeddings.position_embedding.weight": (patches(values) + 1, width),
    }
    return embeddings | norm("pre_layrnorm", width) | _encoder(values)


def _siglip(values: Values) -> Shapes:
    width, feeds, patch = values["hidden_size"], values["intermediate_size"], values["patch_size"]
    embeddings: Shapes = {
        "embeddings.patch_embedding.weight": (width, values["num_channels"], patch, patch),
        "embeddings.patch_embedding.bias": (width,),
        "embeddings.position_embedding.weight": (patches(values), width),
    }
    tensors = embeddings | _encoder(values)
    if values["vision_use_head"]:
        tensors |= {"head.probe": (1, 1, width), "head.attention.in_proj_weight": (3 * width, width)}
        tensors |= {"head.attention.in_proj_bias": (3 * width,)} | linear("head.attention.out_proj", width, width)
        tensors |= norm("head.layernorm", width) | linear("head.mlp.fc1", feeds, width)
        tensors |= linear("head.mlp.fc2", width, feeds)
    return tensors


def _blip2(values: Values) -> Shapes:
    width, feeds, patch = values["hidden_size"], values["intermediate_size"], values["patch_size"]
    embeddings: Shapes = {
        "embeddings.class_embedding": (1, 1, width),
        "embeddings.position_embedding": (1, patches(values) + 1, width),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.patch_embedding.bias": (width,),
    }
    block = linear("self_attn.qkv", 3 * width, width, values["qkv_bias"]) | linear("self_attn.projection", width, width)
    block |= norm("layer_norm1", width) | linear("mlp.fc1", feeds, width)
    block |= linear("mlp.fc2", width, feeds) | norm("layer_norm2", width)
    encoder = blocks("encoder.layers", values["num_hidden_layers"], block)
    return embeddings | encoder | norm("post_layernorm", width)


def _pixtral_misfits(values: Values) -> list[str]:
    """`_misfits`, and a problem when a head has no values to rotate with both row and column."""
    width = values["hidden_size"] // values["num_attention_heads"]
    odd = f"num_attention_heads: heads of {width} values, but the width must be even and at least 4"
    return _misfits(values) or ([odd] if width < 4 or width % 2 else [])


_CHANNELS = Number("num_channels", 3, most=64)


def _pixtral(values: Values) -> Shapes:
    width, feeds, patch = values["hidden_size"], values["intermediate_size"], values["patch_size"]
    block: Shapes = {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        block |= linear(f"attention.{name}", width, width, False)
    block |= linear("feed_forward.gate_proj", feeds, width, False) | linear("feed_forward.up_proj", feeds, width, False)
    block |= linear("feed_forward.down_proj", width, feeds, False)
    block |= norm("attention_norm", width, False) | norm("ffn_norm", width, False)
    tensors: Shapes = {"patch_conv.weight": (width, values["num_channels"], patch, patch)}
    tensors |= norm("ln_pre", width, False)
    return tensors | blocks("transformer.layers", values["num_hidden_layers"], block)


CLIP = Part(
    (*_fields(768, 3072, 12, 12, 224, 32, "quick_gelu"), _CHANNELS),
    _clip,
    _ENCODER,
    _misfits,
    {"model_type": "clip_vision_model", **_TINY, "projection_dim": 64},
    inner="vision_model",
)
SIGLIP = Part(
    (*_fields(768, 3072, 12, 12, 224, 16, "gelu_pytorch_tanh"), _CHANNELS, Flag("vision_use_head", True)),
    _siglip,
    _ENCODER,
    _misfits,
    {"model_type": "siglip_vision_model", **_TINY, "intermediate_size": 128, "vision_use_head": False},
    {"vision_feature_select_strategy": "full"},  # it has no class token to drop
    inner="vision_model",
)
IDEFICS3 = Part(
    (*_fields(1152, 3072, 12, 16, 224, 32, "gelu_pytorch_tanh"), _CHANNELS),
    lambda values: _siglip({**values, "vision_use_head": False}),
    _ENCODER,
    _misfits,
    _TINY,
)
BLIP2 = Part(
    (*_fields(1408, 6144, 39, 16, 224, 14, "gelu"), Flag("qkv_bias", True)),
    _blip2,
    _EVA,
    _misfits,
    {
        "model_type": "blip_2_vision_model",
        **_TINY,
        "num_hidden_layers": 2,
        "qkv_bias": True,
        "initializer_range": 0.02,  # transformers' default makes the outputs almost zero
    },
)
PIXTRAL = Part(
    (*_fields(1024, 4096, 24, 16, 1024, 16, "gelu"), _CHANNELS),
    _pixtral,
    _PIXTRAL,
    _pixtral_misfits,
    {"model_type": "pixtral", **_TINY, "hidden_act": "gelu"},
    {"vision_feature_select_strategy": "full", "vision_feature_layer": -1},
)
