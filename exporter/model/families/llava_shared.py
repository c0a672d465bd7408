"""What the LLaVA models share: config.json's fields, counts derived from them, shapes of all tensors, and names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

from exporter.model.families.component import Component, Pass, head, single, stack
from exporter.model.families.config_fields import Field, Values
from exporter.model.families.family import AtMost, Family
from exporter.model.families.llava_fields import TileSizes
from exporter.model.families.names import Names
from exporter.model.families.parts import text as texts
from exporter.model.families.parts import vision as towers
from exporter.model.families.parts.part import (
    Parts,
    Shapes,
    TinyProcessor,
    below,
    field_of,
    ignored_tie,
    linear,
    part_of,
    size_of,
)

TOWERS = {
    "clip_vision_model": towers.CLIP,
    "siglip_vision_model": towers.SIGLIP,
    "pixtral": towers.PIXTRAL,
}
TEXTS = {"llama": texts.LLAMA, "mistral": texts.MISTRAL, "qwen2": texts.QWEN2, "qwen3": texts.QWEN3}
TYPICAL = (480, 640)  # height and width in pixels of a picture for which memory is predicted
WIDTH_STEP = 64  # vLLM's siglip.py builds a feed-forward in 16 bits unless this divides both of its widths


@dataclass(frozen=True)
class Tower:
    """A LLaVA's vision tower, and the tensors around it.

    parts: of the family, the default tower first. fields: of its top level. pinpoints: the default sizes, as (height,
    width), to which a picture is scaled before it is cut into tiles of the tower's size; their rows end with a learned
    `image_newline`. None: a picture is one tile. text_ties: whether the text model's flag alone ties the output head.
    """

    parts: Parts
    fields: tuple[Field, ...]
    pinpoints: tuple[tuple[int, int], ...] | None = None
    text_ties: bool = True

    def family(self, **declared: Any) -> Family:
        """A family with this tower and LLaVA's prompts. declared: its other fields, and those with other values."""
        shared: dict[str, Any] = {
            "parts": self.parts,
            "assemble": self.components,
            "names": lambda config: Names(self.rows(config), self.also(config)),
            "shapes": self.shapes,
            "fields": (*self.fields, *((TileSizes(self.pinpoints),) if self.pinpoints else ())),
            "misfits": self.misfits,
            "question_prompt": "{question}\nAnswer the question using a single word or phrase.",
            "caption_prompt": "Provide a one-sentence caption for the provided image.",
            "max_new_tokens": {"vqa": 10, "captioning": 64},
            "tasks": ("vqa", "captioning"),
            "image_tokens": self.image_tokens,
            "positions": field_of(self.parts, "text_config", "max_position_embeddings"),
            "vocabulary": field_of(self.parts, "text_config", "vocab_size"),
            "pixels": self.pixels,
            "processor_fields": self.processor_fields,
            "shared_settings": self.shared_settings,
            "tied": {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"},
        }
        return Family(**(shared | declared))

    def top(self, config: Mapping[str, Any], key: str) -> Any:
        """A field of config.json's top level, or transformers' default."""
        return {field.key: field for field in self.fields}[key].of(config)

    def misfits(self, sizes: Mapping[str, Values]) -> list[str]:
        """Problems: a feature layer that the tower lacks; tiles without their class token's place; an ignored flag."""
        stored, layers = sizes["vision_config"]["num_hidden_layers"], _listed(sizes[""]["vision_feature_layer"])
        wrong = [layer for layer in layers if not -stored - 1 <= layer <= stored]
        absent = [f"vision_feature_layer: {wrong[0]}, but the vision tower has {stored} blocks"] if wrong else []
        values = {"vision_config": sizes["vision_config"], **sizes[""]}
        if self.pinpoints and self.features(values) != self.patches(values):
            absent.append("vision_feature_select_strategy: it must leave exactly the patches of a tile")
        side = sizes["vision_config"]["image_size"]
        for size in sizes[""][TileSizes.key] if self.pinpoints else ():
            if size[0] % side or size[1] % side:
                absent.append(f"{TileSizes.key}: {size}, but tiles of {side} pixels do not fill it")
        return absent + ([] if self.text_ties else ignored_tie(sizes))

    def shapes(self, sizes: Mapping[str, Values]) -> Shapes:
        """Shapes of all tensors of a checkpoint, by the hub's names."""
        vision, text, top = sizes["vision_config"], sizes["text_config"], sizes[""]
        tower = self.parts["vision_config"][vision["model_type"]]
        words = self.parts["text_config"][text["model_type"]]
        features, width = vision["hidden_size"] * len(_listed(top["vision_feature_layer"])), text["hidden_size"]
        bias = top["multimodal_projector_bias"]
        tensors = below(self.prefix({"vision_config": vision}), tower.shapes(vision))
        tensors |= below(
            "multi_modal_projector", linear("linear_1", width, features, bias) | linear("linear_2", width, width, bias)
        )
        tensors |= below("language_model.model", words.shapes(text))
        if self.pinpoints:
            tensors["image_newline"] = (width,)
        if not (top["tie_word_embeddings"] or text["tie_word_embeddings"]):
            tensors["language_model.lm_head.weight"] = (text["vocab_size"], width)
        return tensors

    def prefix(self, config: Mapping[str, Any]) -> str:
        """Prefix of the tower's tensors in checkpoints."""
        return f"vision_tower.{part_of(self.parts, config, 'vision_config').inner}".rstrip(".")

    def size(self, config: Mapping[str, Any], name: str) -> int:
        """A field of the tower."""
        return int(size_of(self.parts, config, "vision_config", name))

    def stored(self, config: Mapping[str, Any]) -> int:
        """Number of blocks of the tower."""
        return self.size(config, "num_hidden_layers")

    def used(self, config: Mapping[str, Any]) -> int:
        """Number of ViT blocks that run. Negative `vision_feature_layer` counts from the end (-1 runs all blocks)."""
        count, layers = self.stored(config), _listed(self.top(config, "vision_feature_layer"))
        return max(count + layer + 1 if layer < 0 else layer for layer in layers)

    def class_tokens(self, config: Mapping[str, Any]) -> int:
        """Number of vectors besides the patches: 1 for CLIP, 0 for the others."""
        return int(part_of(self.parts, config, "vision_config") is towers.CLIP)

    def patches(self, config: Mapping[str, Any]) -> int:
        """Number of patches of one picture of the tower; of `TYPICAL` size for Pixtral, which takes any."""
        side, patch = self.size(config, "image_size"), self.size(config, "patch_size")
        height, width = (min(side, length) if self.any_size(config) else side for length in TYPICAL)
        return int(height // patch) * int(width // patch)

    def any_size(self, config: Mapping[str, Any]) -> bool:
        """Whether the tower takes pictures of any size."""
        return part_of(self.parts, config, "vision_config") is towers.PIXTRAL

    def features(self, config: Mapping[str, Any]) -> int:
        """Features of one picture; the strategy `default` drops the first vector, CLIP's class token."""
        dropped = self.top(config, "vision_feature_select_strategy") == "default"
        return self.patches(config) + self.class_tokens(config) - int(dropped)

    def positions(self, config: Mapping[str, Any]) -> int:
        """Vectors of one picture inside the tower."""
        return self.patches(config) + self.class_tokens(config)

    def tiles(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Rows and columns of tiles of a picture of `TYPICAL` size, without the whole picture; (0, 0) without tiles.

        The size among the pinpoints that keeps most of the picture's pixels, and of those the smallest.
        """
        if not self.pinpoints:
            return 0, 0
        (height, width), side = TYPICAL, self.size(config, "image_size")

        def kept(point: Sequence[int]) -> tuple[int, int]:
            scale = min(point[0] / height, point[1] / width)
            area = min(int(height * scale) * int(width * scale), height * width)
            return area, -(point[0] * point[1] - area)

        rows, columns = max(TileSizes(self.pinpoints).of(config), key=kept)
        return max(1, rows // side), max(1, columns // side)

    def image_tokens(self, config: Mapping[str, Any]) -> int:
        """Tokens of a picture in a prompt: of `TYPICAL` size where the number varies."""
        rows, columns = self.tiles(config)
        if not rows:
            return self.features(config)
        edge = isqrt(self.patches(config))
        high, wide = rows * edge, columns * edge
        scale = min(high / TYPICAL[0], wide / TYPICAL[1])  # the padding around the picture is removed
        high, wide = min(high, round(TYPICAL[0] * scale)), min(wide, round(TYPICAL[1] * scale))
        return self.features(config) + high * (wide + 1)

    def components(self, config: Mapping[str, Any], unpackable: str | None = None) -> tuple[Component, ...]:
        """The components for a config.json. unpackable: why vLLM cannot load the projector packed, or None."""
        tower = part_of(self.parts, config, "vision_config")
        inner = rf"(?:{tower.inner}\.)?" if tower.inner else ""
        rows, columns = self.tiles(config)
        pictures = rows * columns + 1
        vision = stack(
            "vision",
            self.parts,
            "vision_config",
            self.prefix(config),
            config,
            used=self.used,
            target=rf".*vision_tower\.{inner}" + tower.stack.path.replace(".", r"\."),
            tokens=lambda config: pictures * self.positions(config),
            plain=self.plain,
            unused="this block never runs: vision_feature_layer selects the output of an earlier block",
        )
        projector = single(
            "projector",
            "multi_modal_projector",
            ("linear_1", "linear_2"),
            target=r".*multi_modal_projector",
            tokens=lambda config: pictures * self.features(config),
            row_parallel=("linear_2",),
            unpackable=unpackable,
        )
        language = stack(
            "language",
            self.parts,
            "text_config",
            "language_model.model",
            config,
            target=r".*language_model\.(?:model\.)?layers\.{i}",
            tokens=lambda config: self.image_tokens(config) + 64,  # prompt and reply are short relative to the picture
            passes=(Pass(padded=True),),
        )
        return vision, projector, language, head("language_model.lm_head", self.has_head)

    def pixels(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """Height and width of the tower's pictures; nothing for Pixtral, which takes any."""
        side = self.size(config, "image_size")
        return () if self.any_size(config) else (side, side)

    def processor_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Settings from which transformers' processor computes the number of image tokens."""
        if self.any_size(config):
            return {"patch_size": self.size(config, "patch_size")}
        return {
            "patch_size": self.size(config, "patch_size"),
            "num_additional_image_tokens": self.class_tokens(config),
            "vision_feature_select_strategy": self.top(config, "vision_feature_select_strategy"),
        }

    def shared_settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of the processor that decide the vectors of one picture of any size."""
        if self.any_size(config):  # the tower has no positions for larger pictures
            sides = (f"image_processor.size.{name}" for name in ("longest_edge", "height", "width"))
            return dict.fromkeys(sides, AtMost(self.size(config, "image_size"))) | {"spatial_merge_size": 1}
        return {f"image_processor.{TileSizes.key}": TileSizes(self.pinpoints).of(config)} if self.pinpoints else {}

    def tiny_processor(self, config: Mapping[str, Any], library: str, pictures: str) -> TinyProcessor:
        """A processor of pictures of the tower's size, also for Pixtral, whose own processor needs torchvision."""
        square = dict.fromkeys(("height", "width"), self.size(config, "image_size"))
        settings: dict[str, Any] = {"size": square, "crop_size": square}
        if self.pinpoints:
            settings["image_grid_pinpoints"] = config["image_grid_pinpoints"]
        return TinyProcessor(library, pictures, settings, tokens=("<image>", "<video>"))

    def has_head(self, config: Mapping[str, Any]) -> int:
        """Number of output heads that are stored: 0 when the head shares the embedding's tensor, else 1.

        transformers ties them when the flag is set in either object of the config.
        """
        tied = self.top(config, "tie_word_embeddings")
        return int(not (tied or size_of(self.parts, config, "text_config", "tie_word_embeddings")))

    def rows(self, config: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
        """Prefixes in checkpoints, in transformers 5, and in vLLM, which uses the hub's."""
        pairs = [(self.prefix(config), "model.vision_tower"), ("multi_modal_projector", "model.multi_modal_projector")]
        pairs += [("language_model.model", "model.language_model"), ("language_model.lm_head", "lm_head")]
        pairs += [("image_newline", "model.image_newline")] * bool(self.pinpoints)
        return tuple((hub, live, hub) for hub, live in pairs)

    def also(self, config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
        """Prefixes that some versions of transformers saved -> those of the hub, which vLLM requires."""
        prefix = self.prefix(config)
        return (("vision_tower", prefix), ("model.vision_tower.vision_model", prefix))

    def plain(self, config: Mapping[str, Any], linear: str) -> str | None:
        """Why vLLM builds a linear of the tower in 16 bits, or None."""
        if part_of(self.parts, config, "vision_config") is not towers.SIGLIP or not linear.startswith("mlp."):
            return None
        widths = (self.size(config, "hidden_size"), self.size(config, "intermediate_size"))
        odd = [width for width in widths if width % WIDTH_STEP]
        return f"vLLM builds it in 16 bits, because {odd[0]} is no multiple of {WIDTH_STEP}" if odd else None


def _listed(layers: Any) -> list[int]:
    """Layers as a list."""
    return layers if isinstance(layers, list) else [layers]
