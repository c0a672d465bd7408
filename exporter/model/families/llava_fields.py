"""Fields of a LLaVA's config.json: the features that its tower gives, and how pictures are cut into tiles."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.files.strict_json import kind
from exporter.model.families.config_fields import MAX_BLOCKS, MAX_ROWS, MAX_WIDTH, Choice, Field, Flag, Number
from exporter.model.families.parts.part import ACTIVATIONS


@dataclass(frozen=True)
class Layers:
    """The key that selects the ViT layers whose outputs are used: an integer, or a list of integers."""

    default: int = -2
    key: str = "vision_feature_layer"

    def of(self, values: Mapping[str, Any]) -> Any:
        """The value in `values`, or the default."""
        return values.get(self.key, self.default)

    def problem(self, value: Any) -> str | None:
        """Why `value` does not select layers, or None."""
        listed = value if isinstance(value, list) else [value]
        if listed and all(type(layer) is int for layer in listed):
            return None
        return f"expected an integer or a list of integers, got {kind(value)}"


@dataclass(frozen=True)
class TileSizes:
    """The key with the sizes, as (height, width), to which a picture is scaled before it is cut into tiles.

    default: also the value of null.
    """

    default: tuple[tuple[int, int], ...]
    key: str = "image_grid_pinpoints"

    def of(self, values: Mapping[str, Any]) -> Any:
        """The sizes in `values`, or the default, as lists."""
        stored = values.get(self.key)
        return [list(size) for size in self.default] if stored is None else stored

    def problem(self, value: Any) -> str | None:
        """Why `value` is not a list of sizes, or None."""
        listed = isinstance(value, list) and 0 < len(value) <= MAX_BLOCKS
        if listed and all(isinstance(size, list) and len(size) == 2 and all(map(_is_side, size)) for size in value):
            return None
        return f"expected a list of [height, width] in pixels, got {kind(value)}"


def _is_side(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_WIDTH


@dataclass(frozen=True)
class TileLimit:
    """The key that limits the features of a picture to those of a number of tiles, such as `anyres_max_9`."""

    key: str = "vision_aspect_ratio"

    def of(self, values: Mapping[str, Any]) -> Any:
        """The text in `values`, or transformers' default."""
        return values.get(self.key, "anyres_max_9")

    def problem(self, value: Any) -> str | None:
        """Why `value` is not such a text, or None."""
        if isinstance(value, str) and re.fullmatch(r"anyres_max_[1-9][0-9]{0,3}", value):
            return None
        return f"expected anyres_max_N, where N is from 1 to 9999, got {kind(value)}"


def fields(layer: int, strategy: str, image_token: int) -> tuple[Field, ...]:
    """Fields of config.json's top level, with the defaults of one class."""
    return (
        Layers(layer),
        Choice("vision_feature_select_strategy", strategy, ("default", "full")),
        Flag("tie_word_embeddings", False),
        Number("image_token_index", image_token, least=0, most=MAX_ROWS),
        Flag("multimodal_projector_bias", True),
        Choice("projector_hidden_act", "gelu", ACTIVATIONS),
    )
