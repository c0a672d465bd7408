"""What Qwen2-VL, Qwen2.5-VL and Qwen3-VL share: pictures of any size as one sequence, a merger, a Qwen text model."""

from dataclasses import dataclass
from typing import Any

from exporter.model.families.component import Component, Config, Pass, head, single, stack
from exporter.model.families.config_fields import MAX_ROWS, Field, Flag, Number
from exporter.model.families.family import Family, Sizes
from exporter.model.families.names import Names
from exporter.model.families.parts.part import (
    Parts,
    Shapes,
    Smoothing,
    TinyProcessor,
    below,
    field_of,
    ignored_tie,
    size_of,
)

TYPICAL = (480, 640)  # height and width in pixels of a picture for which memory is predicted
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
FALLBACK = f"<|im_start|>user\n{PICTURE}{{text}}<|im_end|>\n<|im_start|>assistant\n"
FIELDS: tuple[Field, ...] = (
    Flag("tie_word_embeddings", False),
    Number("image_token_id", 151655, least=0, most=MAX_ROWS),
)
TINY = {
    "image_token_id": 127,
    "video_token_id": 126,
    "vision_start_token_id": 125,
    "vision_end_token_id": 124,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


@dataclass(frozen=True)
class Qwen:
    """One of the families.

    parts: its tower and text model. visual, words: prefixes of their tensors in checkpoints. width: field of the tower
    with the width of its output. inside: field with the width of its blocks. merger: linears of the merger. text_ties:
    whether transformers also ties the output head when only the text model's flag is set.
    """

    parts: Parts
    visual: str
    words: str
    width: str
    inside: str
    merger: tuple[str, str]
    norm: str
    text_ties: bool = True

    def family(self, **declared: Any) -> Family:
        """A family with this structure. declared: its other fields of `Family`."""
        shared: dict[str, Any] = {
            "heading": "qwen-vl",
            "parts": self.parts,
            "assemble": self.components,
            "names": lambda config: Names(
                (
                    (self.visual, "model.visual", "visual"),
                    (self.words, "model.language_model", "language_model.model"),
                    ("lm_head", "lm_head", "language_model.lm_head"),
                )
            ),
            "shapes": self.shapes,
            "fields": FIELDS,
            "misfits": self.misfits,
            "question_prompt": "{question}\nPlease try to answer the question with short words or phrases if possible.",
            "caption_prompt": "Provide a one-sentence caption for the provided image.",
            "fallback_prompt": FALLBACK,
            "reply_end": "<|im_end|>",
            "max_new_tokens": {"vqa": 10, "captioning": 64},
            "tasks": ("vqa", "captioning"),
            "image_tokens": self.image_tokens,
            "varies": True,
            "image_marker": "<|image_pad|>",
            "positions": field_of(self.parts, "text_config", "max_position_embeddings"),
            "vocabulary": field_of(self.parts, "text_config", "vocab_size"),
            "pixels": self.pixels,
            "shared_settings": self.shared_settings,
            "tied": {"lm_head.weight": f"{self.words}.embed_tokens.weight"},
        }
        return Family(**(shared | declared))

    def vision(self, config: Config, name: str) -> int:
        """A field of the tower."""
        return int(size_of(self.parts, config, "vision_config", name))

    def patches(self, config: Config) -> int:
        """Patches of a picture of `TYPICAL` size, whose sides are rounded to whole squares of merged patches."""
        square = self.vision(config, "patch_size") * self.vision(config, "spatial_merge_size")
        squares = [max(1, round(side / square)) for side in TYPICAL]
        return squares[0] * squares[1] * self.vision(config, "spatial_merge_size") ** 2

    def image_tokens(self, config: Config) -> int:
        """Tokens of such a picture in a prompt."""
        return self.patches(config) // self.vision(config, "spatial_merge_size") ** 2

    def pixels(self, config: Config) -> tuple[int, ...]:
        """Values of one patch: all that the processor's pixels have in common."""
        return (
            self.vision(config, "in_channels")
            * self.vision(config, "temporal_patch_size")
            * self.vision(config, "patch_size") ** 2,
        )

    def shared_settings(self, config: Config) -> dict[str, Any]:
        """Settings of the image processor: how it cuts pictures into patches, and groups them."""
        keys = {"patch_size": "patch_size", "temporal_patch_size": "temporal_patch_size"}
        keys["merge_size"] = "spatial_merge_size"
        return {f"image_processor.{own}": self.vision(config, key) for own, key in keys.items()}

    def tied(self, config: Config) -> bool:
        """Whether the head shares the embedding's tensor."""
        text = config.get("text_config")
        flags = (config, text if isinstance(text, dict) else {})
        return any(FIELDS[0].of(values) for values in flags)

    def misfits(self, sizes: Sizes) -> list[str]:
        """Problems: the tower's output is not as wide as the text model; a flag for a tied head is ignored."""
        out, text = sizes["vision_config"][self.width], sizes["text_config"]["hidden_size"]
        wide = [f"vision_config.{self.width}: {out}, but text_config.hidden_size is {text}"] if out != text else []
        return wide + ([] if self.text_ties else ignored_tie(sizes))

    def shapes(self, sizes: Sizes) -> Shapes:
        """Shapes of all tensors of a checkpoint."""
        vision, text = sizes["vision_config"], sizes["text_config"]
        tensors = below(self.visual, self.parts["vision_config"][vision["model_type"]].shapes(vision))
        tensors |= below(self.words, self.parts["text_config"][text["model_type"]].shapes(text))
        if not (sizes[""]["tie_word_embeddings"] or text["tie_word_embeddings"]):
            tensors["lm_head.weight"] = (text["vocab_size"], text["hidden_size"])
        return tensors

    def components(self, config: Config) -> tuple[Component, ...]:
        """Tower, merger, text model, head."""
        vision = stack(
            "vision",
            self.parts,
            "vision_config",
            self.visual,
            config,
            target=r"(?:model\.)?visual\.blocks\.{i}",
            tokens=self.patches,
        )
        projector = single(
            "projector",
            f"{self.visual}.merger",
            self.merger,
            target=r"(?:model\.)?visual\.merger",
            tokens=self.image_tokens,
            row_parallel=self.merger[1:],
            smoothings=(Smoothing(self.norm, self.merger[:1]),),
        )
        language = stack(
            "language",
            self.parts,
            "text_config",
            self.words,
            config,
            target=r".*language_model\.(?:model\.)?layers\.{i}",
            tokens=lambda config: self.image_tokens(config) + 64,  # prompt and reply
            passes=(Pass(padded=True),),
        )
        return vision, projector, language, head("lm_head", lambda config: int(not self.tied(config)))


def tiny_processor(library: str) -> Any:
    """A processor of small pictures in patches of 4 pixels."""
    settings: dict[str, Any] = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    settings |= {"size": {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}}
    tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>")
    return lambda config: TinyProcessor(library, "Qwen2VLImageProcessorPil", settings, {}, tokens, PICTURE, named=False)
