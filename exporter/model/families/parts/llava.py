"""What LLaVA's config.json says: its parts and fields, counts that follow from them, and the tensors it asks for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.files.strict_json import kind
from exporter.model.families.config_fields import MOST_ROWS, Choice, Flag, Number, Values
from exporter.model.families.parts import text as texts
from exporter.model.families.parts import vision as towers
from exporter.model.families.parts.part import ACTIVATIONS, Shapes, below, linear, size_of


@dataclass(frozen=True)
class Layers:
    """The key that says which ViT layers' outputs are taken: a number, or a list of numbers."""

    key: str = "vision_feature_layer"
    default: int = -2

    def of(self, values: Mapping[str, Any]) -> Any:
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
FIELDS = (
    _LAYERS,
    _STRATEGY,
    _TIED,
    Number("image_token_index", 32000, least=0, most=MOST_ROWS),
    Flag("multimodal_projector_bias", True),
    Choice("projector_hidden_act", "gelu", ACTIVATIONS),
)
PARTS = {
    "vision_config": {"clip_vision_model": towers.CLIP, "siglip_vision_model": towers.SIGLIP},
    "text_config": {"llama": texts.LLAMA, "mistral": texts.MISTRAL, "qwen2": texts.QWEN2, "qwen3": texts.QWEN3},
}


def misfits(sizes: Mapping[str, Values]) -> list[str]:
    """Feature layers that the tower does not have."""
    stored, layers = sizes["vision_config"]["num_hidden_layers"], feature_layers(sizes[""])
    wrong = [layer for layer in layers if not -stored - 1 <= layer <= stored]
    return [f"vision_feature_layer: {wrong[0]}, and the vision tower has {stored} blocks"] if wrong else []


def shapes(sizes: Mapping[str, Values]) -> Shapes:
    """Every tensor of a checkpoint, by the hub's names."""
    vision, text, own = sizes["vision_config"], sizes["text_config"], sizes[""]
    tower, words = PARTS["vision_config"][vision["model_type"]], PARTS["text_config"][text["model_type"]]
    seen, width = vision["hidden_size"] * len(feature_layers(own)), text["hidden_size"]
    bias = own["multimodal_projector_bias"]
    whole = below("vision_tower.vision_model", tower.shapes(vision))
    whole |= below(
        "multi_modal_projector", linear("linear_1", width, seen, bias) | linear("linear_2", width, width, bias)
    )
    whole |= below("language_model.model", words.shapes(text))
    if not (own["tie_word_embeddings"] or text["tie_word_embeddings"]):
        whole["language_model.lm_head.weight"] = (text["vocab_size"], width)
    return whole


def blocks_stored(config: Mapping[str, Any]) -> int:
    """Blocks of the tower."""
    return int(size_of(PARTS, config, "vision_config", "num_hidden_layers"))


def feature_layers(config: Mapping[str, Any]) -> list[int]:
    """The layers whose outputs are taken, as a list."""
    layers = _LAYERS.of(config)
    return layers if isinstance(layers, list) else [layers]


def blocks_used(config: Mapping[str, Any]) -> int:
    """ViT blocks that run: `vision_feature_layer` counts from the end when negative (-1 uses them all)."""
    stored = blocks_stored(config)
    return max(stored + layer + 1 if layer < 0 else layer for layer in feature_layers(config))


def image_tokens(config: Mapping[str, Any]) -> int:
    """Vectors that the tower makes of one picture; `default` leaves out the first, which is CLIP's class token."""
    patches = (picture_side(config) // patch(config)) ** 2
    return patches + class_tokens(config) - int(_STRATEGY.of(config) == "default")


def picture_side(config: Mapping[str, Any]) -> int:
    """Width and height of the pictures that the tower takes, in pixels."""
    return int(size_of(PARTS, config, "vision_config", "image_size"))


def patch(config: Mapping[str, Any]) -> int:
    """Width and height of a patch, in pixels."""
    return int(size_of(PARTS, config, "vision_config", "patch_size"))


def class_tokens(config: Mapping[str, Any]) -> int:
    """Vectors beside the patches: one in CLIP."""
    return int(config["vision_config"].get("model_type", "clip_vision_model") == "clip_vision_model")


def processor_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' processor computes the number of image tokens from."""
    return {
        "patch_size": patch(config),
        "num_additional_image_tokens": class_tokens(config),
        "vision_feature_select_strategy": _STRATEGY.of(config),
    }


def positions(config: Mapping[str, Any]) -> int:
    """Tokens that the text model was trained to take."""
    return int(size_of(PARTS, config, "text_config", "max_position_embeddings"))


def vocabulary(config: Mapping[str, Any]) -> int:
    """Tokens that the text model has embeddings of."""
    return int(size_of(PARTS, config, "text_config", "vocab_size"))


def text_blocks(config: Mapping[str, Any]) -> int:
    """Blocks of the text model."""
    return int(size_of(PARTS, config, "text_config", "num_hidden_layers"))


def has_head(config: Mapping[str, Any]) -> int:
    """One, unless the output head is the embedding: transformers ties them when either object says so."""
    tied = _TIED.of(config) or size_of(PARTS, config, "text_config", "tie_word_embeddings")
    return int(not tied)
