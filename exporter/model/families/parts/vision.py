"""Vision towers: CLIP, SigLIP, and the EVA ViT of BLIP-2. Their blocks differ little, their embeddings differ more."""

from exporter.model.families.config_fields import MAX_BLOCKS, Choice, Field, Flag, Fraction, Number, Values
from exporter.model.families.parts.part import ACTIVATIONS, Part, Shapes, blocks, heads_misfit, linear, norm


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


_CHANNELS = Number("num_channels", 3, most=64)

CLIP = Part((*_fields(768, 3072, 12, 12, 224, 32, "quick_gelu"), _CHANNELS), _clip, _misfits)
SIGLIP = Part(
    (*_fields(768, 3072, 12, 12, 224, 16, "gelu_pytorch_tanh"), _CHANNELS, Flag("vision_use_head", True)),
    _siglip,
    _misfits,
)
BLIP2 = Part((*_fields(1408, 6144, 39, 16, 224, 14, "gelu"), Flag("qkv_bias", True)), _blip2, _misfits)
