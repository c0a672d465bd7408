"""Towers and text models by `model_type`, shared by families.

The shapes are those that transformers builds (`tests/test_parts.py` compares them). Computing them takes no library, so
that a plan can compare a checkpoint with its config.json in milliseconds.
"""

from exporter.families.parts import qformer, text, vision
from exporter.families.parts.part import ACTIVATIONS, Part, Shapes, below, linear, size_of

TOWERS: dict[str, Part] = {
    "clip_vision_model": vision.CLIP,
    "siglip_vision_model": vision.SIGLIP,
    "blip_2_vision_model": vision.BLIP2,
}
QFORMERS: dict[str, Part] = {"blip_2_qformer": qformer.QFORMER}
TEXTS: dict[str, Part] = {
    "llama": text.LLAMA,
    "mistral": text.MISTRAL,
    "qwen2": text.QWEN2,
    "qwen3": text.QWEN3,
    "opt": text.OPT,
}

__all__ = ["ACTIVATIONS", "QFORMERS", "TEXTS", "TOWERS", "Part", "Shapes", "below", "linear", "size_of"]
