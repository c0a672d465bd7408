"""The LLaVA-OneVision family (Li et al., arXiv 2408.03326): SigLIP on tiles of the picture -> projector -> Qwen2.

Checkpoint names are those of `llava-hf/llava-onevision-qwen2-7b-ov-hf`; vLLM (models/llava_onevision.py) uses the same.
It builds the projector from plain linears.
"""

from exporter.model.families.family import Family
from exporter.model.families.llava_shared import TEXTS, TOWERS, Tower, fields
from exporter.model.families.names import Names
from exporter.model.families.parts.part import field_of

_PLAIN = "vLLM builds LLaVA-OneVision's projector from plain linears and cannot load it packed"
_SIDES = tuple(range(384, 2305, 384))
_TINY_PINPOINTS = [[32, 32], [32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
TOWER = Tower(
    {
        "vision_config": {"siglip_vision_model": TOWERS["siglip_vision_model"]},
        "text_config": {name: TEXTS[name] for name in ("qwen2", "llama", "mistral", "qwen3")},
    },
    fields(-1, "full", 151646),
    tuple((height, width) for height in _SIDES for width in _SIDES),
)

FAMILY = Family(
    name="llava-onevision",
    models="LLaVA-OneVision",
    heading="llava-next-and-llava-onevision",
    architectures=("LlavaOnevisionForConditionalGeneration",),
    config_class="LlavaOnevisionConfig",
    parts=TOWER.parts,
    assemble=lambda config: TOWER.components(config, unpackable=_PLAIN),
    names=lambda config: Names(TOWER.rows(config), TOWER.also(config)),
    shapes=TOWER.shapes,
    fields=TOWER.fields,
    misfits=TOWER.misfits,
    question_prompt="{question}\nAnswer the question using a single word or phrase.",
    caption_prompt="Provide a one-sentence caption for the provided image.",
    fallback_prompt="<|im_start|>user <image>\n{text}<|im_end|><|im_start|>assistant\n",
    max_new_tokens={"vqa": 10, "captioning": 64},
    tasks=("vqa", "captioning"),
    image_tokens=TOWER.image_tokens,
    varies=True,
    positions=field_of(TOWER.parts, "text_config", "max_position_embeddings"),
    vocabulary=field_of(TOWER.parts, "text_config", "vocab_size"),
    pixels=TOWER.pixels,
    processor_fields=lambda config: {
        "num_image_tokens": TOWER.patches(config),
        "vision_feature_select_strategy": TOWER.top(config, "vision_feature_select_strategy"),
    },
    tied={"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"},
    tiny={
        "model_type": "llava_onevision",
        "image_token_index": 127,
        "video_token_index": 126,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "image_grid_pinpoints": _TINY_PINPOINTS,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
    tiny_processor=lambda config: TOWER.tiny_processor(
        config, "LlavaOnevisionProcessor", "LlavaOnevisionImageProcessorPil"
    ),
)
