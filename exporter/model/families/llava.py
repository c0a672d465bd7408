"""The LLaVA-1.5 family (Liu et al., arXiv 2310.03744): a vision tower -> two-linear projector -> a text model.

Checkpoint names are those of `llava-hf/llava-1.5-7b-hf`. vLLM (models/llava.py) builds the tower only up to
`vision_feature_layer`, and fuses q/k/v and gate/up.
"""

from exporter.model.families.family import Family
from exporter.model.families.llava_shared import TEXTS, TOWERS, Tower, fields
from exporter.model.families.names import Names
from exporter.model.families.parts.part import field_of

TOWER = Tower({"vision_config": TOWERS, "text_config": TEXTS}, fields(-2, "default", 32000))


FAMILY = Family(
    name="llava",
    models="LLaVA-1.5 and checkpoints of the same architecture, Pixtral-12B",
    heading="llava-15",
    architectures=("LlavaForConditionalGeneration",),
    config_class="LlavaConfig",
    parts=TOWER.parts,
    assemble=TOWER.components,
    names=lambda config: Names(TOWER.rows(config), TOWER.also(config)),
    shapes=TOWER.shapes,
    fields=TOWER.fields,
    misfits=TOWER.misfits,
    question_prompt="{question}\nAnswer the question using a single word or phrase.",
    caption_prompt="Provide a one-sentence caption for the provided image.",
    fallback_prompt="USER: <image>\n{text} ASSISTANT:",
    max_new_tokens={"vqa": 10, "captioning": 64},
    tasks=("vqa", "captioning"),
    image_tokens=TOWER.image_tokens,
    positions=field_of(TOWER.parts, "text_config", "max_position_embeddings"),
    vocabulary=field_of(TOWER.parts, "text_config", "vocab_size"),
    pixels=TOWER.pixels,
    any_size=TOWER.any_size,
    processor_fields=TOWER.processor_fields,
    tied={"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"},
    tiny={
        "model_type": "llava",
        "image_token_index": 127,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
    tiny_processor=lambda config: TOWER.tiny_processor(config, "LlavaProcessor", "CLIPImageProcessorPil"),
)
