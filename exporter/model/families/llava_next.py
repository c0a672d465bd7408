"""The LLaVA-NeXT family (LLaVA-1.6): LLaVA-1.5 on tiles of the picture, whose rows end with a learned `image_newline`.

Checkpoint names are those of `llava-hf/llava-v1.6-mistral-7b-hf`; vLLM (models/llava_next.py) uses the same.
"""

from exporter.model.families.llava_fields import fields
from exporter.model.families.llava_shared import TEXTS, TOWERS, Tower

_TOWERS = {name: part for name, part in TOWERS.items() if name != "pixtral"}
_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
_TINY_PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
_PARTS = {"vision_config": _TOWERS, "text_config": TEXTS}
TOWER = Tower(_PARTS, fields(-2, "default", 32000), _PINPOINTS, text_ties=False)

FAMILY = TOWER.family(
    name="llava-next",
    models="LLaVA-NeXT (1.6)",
    heading="llava-next-and-llava-onevision",
    architectures=("LlavaNextForConditionalGeneration",),
    config_class="LlavaNextConfig",
    fallback_prompt="[INST] <image>\n{text} [/INST]",
    varies=True,
    tiny={
        "model_type": "llava_next",
        "image_token_index": 127,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "image_grid_pinpoints": _TINY_PINPOINTS,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
    tiny_processor=lambda config: TOWER.tiny_processor(config, "LlavaNextProcessor", "LlavaNextImageProcessorPil"),
)
