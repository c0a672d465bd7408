"""LLaVA's config.json: its parts and fields, counts derived from them, and the shapes of all tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.files.strict_json import kind
from exporter.model.families.config_fields import MAX_ROWS, Choice, Flag, Number, Values
from exporter.model.families.parts import text as texts
from exporter.model.families.parts import vision as towers
from exporter.model.families.parts.part import ACTIVATIONS, Shapes, below, linear, size_of


@dataclass(frozen=True)
class Layers:
    """The key that selects the ViT layers whose outputs are used: an integer, or a list of integers."""

    key: str = "vision_feature_layer"
    default: int = -2

    def of(self, values: Mapping[str, Any]) -> Any:
        """The value in `values`, or the default."""
        return values.get(self.key, self.default)

    def problem(self, value: Any) -> str | None:
        """Why `value` does not select layers, or None."""
        listed = value if isinstance(value, list) else [value]
        if listed and all(type(layer) is int for layer in listed):
            return None
        return f"expected an integer or a list of integers, got {kind(value)}"


_LAYERS = Layers()
_STRATEGY = Choice("vision_feature_select_strategy", "default", ("default", "full"))
_TIED = Flag("tie_word_embeddings", False)
FIELDS = (
    _LAYERS,
    _STRATEGY,
    _TIED,
    Number("image_token_index", 32000, least=0, most=MAX_ROWS),
    Flag("multimodal_projector_bias", True),
    Choice("projector_hidden_act", "gelu", ACTIVATIONS),
)
PARTS = {
    "vision_config": {"clip_vision_model": towers.CLIP, "siglip_vision_model": towers.SIGLIP},
    "text_config": {"llama": texts.LLAMA, "mistral": texts.MISTRAL, "qwen2": texts.QWEN2, "qwen3": texts.QWEN3},
}


def misfits(sizes: Mapping[str, Values]) -> list[str]:
    """A problem for a feature layer that the tower does not have."""
    stored, layers = sizes["vision_config"]["num_hidden_layers"], feature_layers(sizes[""])
    wrong = [layer for layer in layers if not -stored - 1 <= layer <= stored]
    return [f"vision_feature_layer: {wrong[0]}, but the vision tower has {stored} blocks"] if wrong else []


def shapes(sizes: Mapping[str, Values]) -> Shapes:
    """Shapes of all tensors of a checkpoint, by the hub's names."""
    vision, text, top = sizes["vision_config"], sizes["text_config"], sizes[""]
    tower, words = PARTS["vision_config"][vision["model_type"]], PARTS["text_config"][text["model_type"]]
    features, width = vision["hidden_size"] * len(feature_layers(top)), text["hidden_size"]
    bias = top["multimodal_projector_bias"]
    tensors = below("vision_tower.vision_model", tower.shapes(vision))
    tensors |= below(
        "multi_modal_projector", linear("linear_1", width, features, bias) | linear("linear_2", width, width, bias)
    )
    tensors |= below("language_model.model", words.shapes(text))
    if not (top["tie_word_embeddings"] or text["tie_word_embeddings"]):
        tensors["language_model.lm_head.weight"] = (text["vocab_size"], width)
    return tensors


def blocks_stored(config: Mapping[str, Any]) -> int:
    """Number of blocks of the tower."""
    return int(size_of(PARTS, config, "vision_config", "num_hidden_layers"))


def feature_layers(config: Mapping[str, Any]) -> list[int]:
    """The layers whose outputs are used, as a list."""
    layers = _LAYERS.of(config)
    return layers if isinstance(layers, list) else [layers]


def blocks_used(config: Mapping[str, Any]) -> int:
    """Number of ViT blocks that run. Negative `vision_feature_layer` counts from the end (-1 runs all blocks)."""
    stored = blocks_stored(config)
    return max(stored + layer + 1 if layer < 0 else layer for layer in feature_layers(config))


def image_tokens(config: Mapping[str, Any]) -> int:
    """Number of image tokens per picture; the strategy `default` drops the first vector, CLIP's class token."""
    patches = (picture_side(config) // patch(config)) ** 2
    return patches + class_tokens(config) - int(_STRATEGY.of(config) == "default")


def picture_side(config: Mapping[str, Any]) -> int:
    """Width and height of the tower's input pictures, in pixels."""
    return int(size_of(PARTS, config, "vision_config", "image_size"))


def patch(config: Mapping[str, Any]) -> int:
    """Width and height of a patch, in pixels."""
    return int(size_of(PARTS, config, "vision_config", "patch_size"))


def class_tokens(config: Mapping[str, Any]) -> int:
    """Number of vectors besides the patches: 1 for CLIP, 0 for SigLIP."""
    return int(config["vision_config"].get("model_type", "clip_vision_model") == "clip_vision_model")


def processor_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from which transformers' processor computes the number of image tokens."""
    return {
        "patch_size": patch(config),
        "num_additional_image_tokens": class_tokens(config),
        "vision_feature_select_strategy": _STRATEGY.of(config),
    }


def positions(config: Mapping[str, Any]) -> int:
    """Number of positions of the text model."""
    return int(size_of(PARTS, config, "text_config", "max_position_embeddings"))


def vocabulary(config: Mapping[str, Any]) -> int:
    """Tokens that the text model has embeddings of."""
    return int(size_of(PARTS, config, "text_config", "vocab_size"))


def text_blocks(config: Mapping[str, Any]) -> int:
    """Number of blocks of the text model."""
    return int(size_of(PARTS, config, "text_config", "num_hidden_layers"))


def has_head(config: Mapping[str, Any]) -> int:
    """Number of output heads that are stored: 0 when the head shares the embedding's tensor, else 1.

    transformers ties them when either object of the config says so.
    """
    tied = _TIED.of(config) or size_of(PARTS, config, "text_config", "tie_word_embeddings")
    return int(not tied)
