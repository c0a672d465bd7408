"""The model families that mmq supports: where the parts of a model are, their names, shapes and prompts.

Enters: a name, or the content of a config.json.
Leaves: a `Family`, and the components of a model.
May import: files.

To add a family, write `model/families/NAME.py` with a `FAMILY` and add a line to `FAMILIES`.
"""

from exporter.model.families import blip2, idefics3, llava, llava_next, llava_onevision, qwen2_vl, qwen3_vl
from exporter.model.families.component import Component, Pass
from exporter.model.families.family import AtMost, Family
from exporter.model.families.parts.part import Smoothing

FAMILIES: dict[str, Family] = {
    "llava": llava.FAMILY,
    "llava-next": llava_next.FAMILY,
    "llava-onevision": llava_onevision.FAMILY,
    "qwen2-vl": qwen2_vl.QWEN2_FAMILY,
    "qwen2.5-vl": qwen2_vl.FAMILY,
    "qwen3-vl": qwen3_vl.FAMILY,
    "idefics3": idefics3.FAMILY,
    "smolvlm": idefics3.SMOLVLM,
    "blip2": blip2.FAMILY,
    "blip2-itm": blip2.RETRIEVAL,
}

__all__ = ["FAMILIES", "AtMost", "Component", "Family", "Pass", "Smoothing"]
