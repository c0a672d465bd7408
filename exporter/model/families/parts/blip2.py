"""BLIP-2's config.json: its parts and fields, counts derived from them, and the shapes of all tensors."""

from collections.abc import Mapping
from typing import Any

from exporter.model.families.config_fields import MAX_ROWS, Flag, Number, Values
from exporter.model.families.parts import opt, qformer, vision
from exporter.model.families.parts.part import Shapes, below, linear, size_of

PARTS = {
    "vision_config": {"blip_2_vision_model": vision.BLIP2},
    "qformer_config": {"blip_2_qformer": qformer.QFORMER},
    "text_config": {"opt": opt.OPT},
}
FIELDS = (
    Number("num_query_tokens", 32, most=1024),
    Number("image_token_index", 0, least=0, most=MAX_ROWS, null=lambda values: 0),
    Flag("use_decoder_only_language_model", True),
)


def _vision_and_qformer_shapes(sizes: Mapping[str, Values]) -> Shapes:
    """Shapes of the ViT and the Q-Former.

    The Q-Former's input width is the ViT's; that of its own config is not used.
    """
    former = {**sizes["qformer_config"], "encoder_hidden_size": sizes["vision_config"]["hidden_size"]}
    tensors: Shapes = {"query_tokens": (1, sizes[""]["num_query_tokens"], former["hidden_size"])}
    tensors |= below("vision_model", vision.BLIP2.shapes(sizes["vision_config"]))
    return tensors | below("qformer", qformer.QFORMER.shapes(former))


def shapes(sizes: Mapping[str, Values]) -> Shapes:
    """Shapes of all tensors of a checkpoint with a language model."""
    words, width = sizes["text_config"], sizes["qformer_config"]["hidden_size"]
    tensors = _vision_and_qformer_shapes(sizes) | linear("language_projection", words["hidden_size"], width)
    tensors |= below("language_model.model.decoder", opt.OPT.shapes(words))
    if not words["tie_word_embeddings"]:
        tensors["language_model.lm_head.weight"] = (words["vocab_size"], words["word_embed_proj_dim"])
    return tensors


def retrieval_shapes(sizes: Mapping[str, Values]) -> Shapes:
    """Shapes of all tensors of a checkpoint with contrastive and matching heads."""
    former, joint = sizes["qformer_config"], sizes[""]["image_text_hidden_size"]
    width = former["hidden_size"]
    tensors = (
        _vision_and_qformer_shapes(sizes)
        | linear("vision_projection", joint, width)
        | linear("text_projection", joint, width)
    )
    tensors["embeddings.word_embeddings.weight"] = (former["vocab_size"], width)
    tensors["embeddings.position_embeddings.weight"] = (former["max_position_embeddings"], width)
    return tensors | linear("itm_head", 2, width)


def image_positions(config: Mapping[str, Any]) -> int:
    """Number of patches and the class token."""
    return int((picture_side(config) // size_of(PARTS, config, "vision_config", "patch_size")) ** 2) + 1


def picture_side(config: Mapping[str, Any]) -> int:
    """Width and height of the ViT's input pictures, in pixels."""
    return int(size_of(PARTS, config, "vision_config", "image_size"))


def pixels(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Height and width of the ViT's input pictures."""
    return picture_side(config), picture_side(config)


def former_positions(config: Mapping[str, Any]) -> int:
    """Number of positions of the Q-Former, plus the picture's tokens."""
    return int(size_of(PARTS, config, "qformer_config", "max_position_embeddings")) + image_tokens(config)


def queries(config: Mapping[str, Any]) -> int:
    """Number of query vectors of the Q-Former per picture."""
    return int(config.get("num_query_tokens", 32))


def image_tokens(config: Mapping[str, Any]) -> int:
    """Number of image tokens in a prompt.

    0 for retrieval checkpoints without an image token, because the model itself puts the queries before the text.
    """
    return queries(config) if config.get("image_token_index") is not None else 0


def former_has(config: Mapping[str, Any], i: int, linear: str) -> bool:
    """Whether block `i` of the Q-Former has a linear.

    Every `cross_attention_frequency`-th block attends to the picture; only retrieval has a feed-forward for text.
    """
    if linear.startswith("crossattention."):
        return bool(i % size_of(PARTS, config, "qformer_config", "cross_attention_frequency") == 0)
    if linear.startswith(("intermediate.", "output.")):
        return bool(size_of(PARTS, config, "qformer_config", "use_qformer_text_input"))
    return True


def cross_attention_values(config: Mapping[str, Any]) -> int:
    """Number of values that cross-attention reads per picture."""
    return image_positions(config) * int(size_of(PARTS, config, "vision_config", "hidden_size"))
