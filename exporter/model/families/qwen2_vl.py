"""The Qwen2-VL (arXiv 2409.12191) and Qwen2.5-VL (arXiv 2502.13923) families.

Checkpoint names are those of `Qwen/Qwen2-VL-2B-Instruct` and `Qwen/Qwen2.5-VL-3B-Instruct`, whose config.json has the
text model's keys at the top level. vLLM: models/qwen2_vl.py, qwen2_5_vl.py.
"""

from dataclasses import replace

from exporter.model.families.family import Family
from exporter.model.families.names import Names
from exporter.model.families.parts.part import field_of
from exporter.model.families.parts.qwen_vision import QWEN2, QWEN25
from exporter.model.families.parts.text import QWEN2_VL
from exporter.model.families.qwen_shared import FALLBACK, FIELDS, TINY, Qwen, tiny_processor

_TEXTS = dict.fromkeys(("qwen2_5_vl_text", "qwen2_vl_text", "qwen2_5_vl", "qwen2_vl"), QWEN2_VL)
_PARTS_2 = {"vision_config": dict.fromkeys(("qwen2_vl_vision", "qwen2_vl"), QWEN2), "text_config": _TEXTS}
_PARTS_25 = {"vision_config": dict.fromkeys(("qwen2_5_vl_vision", "qwen2_5_vl"), QWEN25), "text_config": _TEXTS}
_TWO = Qwen(_PARTS_2, "visual", "model", "hidden_size", "embed_dim", ("mlp.0", "mlp.2"), "ln_q")
_TWO_FIVE = Qwen(_PARTS_25, "visual", "model", "out_hidden_size", "hidden_size", ("mlp.0", "mlp.2"), "ln_q")

FAMILY = Family(
    name="qwen2.5-vl",
    models="Qwen2.5-VL",
    heading="qwen-vl",
    architectures=("Qwen2_5_VLForConditionalGeneration",),
    config_class="Qwen2_5_VLConfig",
    parts=_PARTS_25,
    assemble=_TWO_FIVE.components,
    names=lambda config: Names(
        (
            ("visual", "model.visual", "visual"),
            ("model", "model.language_model", "language_model.model"),
            ("lm_head", "lm_head", "language_model.lm_head"),
        )
    ),
    shapes=_TWO_FIVE.shapes,
    fields=FIELDS,
    flat=("text_config",),
    misfits=_TWO_FIVE.misfits,
    question_prompt="{question}\nPlease try to answer the question with short words or phrases if possible.",
    caption_prompt="Provide a one-sentence caption for the provided image.",
    fallback_prompt=FALLBACK,
    reply_end="<|im_end|>",
    max_new_tokens={"vqa": 10, "captioning": 64},
    tasks=("vqa", "captioning"),
    image_tokens=_TWO_FIVE.image_tokens,
    varies=True,
    image_marker="<|image_pad|>",
    positions=field_of(_PARTS_25, "text_config", "max_position_embeddings"),
    vocabulary=field_of(_PARTS_25, "text_config", "vocab_size"),
    pixels=_TWO_FIVE.pixels,
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    tiny=TINY | {"model_type": "qwen2_5_vl"},
    tiny_processor=tiny_processor("Qwen2_5_VLProcessor"),
)
QWEN2_FAMILY = replace(
    FAMILY,
    name="qwen2-vl",
    models="Qwen2-VL",
    architectures=("Qwen2VLForConditionalGeneration",),
    config_class="Qwen2VLConfig",
    parts=_PARTS_2,
    assemble=_TWO.components,
    components=(),
    shapes=_TWO.shapes,
    misfits=_TWO.misfits,
    image_tokens=_TWO.image_tokens,
    positions=field_of(_PARTS_2, "text_config", "max_position_embeddings"),
    vocabulary=field_of(_PARTS_2, "text_config", "vocab_size"),
    pixels=_TWO.pixels,
    tiny=TINY | {"model_type": "qwen2_vl"},
    tiny_processor=tiny_processor("Qwen2VLProcessor"),
)
