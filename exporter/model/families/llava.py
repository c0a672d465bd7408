"""The LLaVA-1.5 family (Liu et al., arXiv 2310.03744): a vision tower -> two-linear projector -> a text model.

Checkpoint names are those of `llava-hf/llava-1.5-7b-hf`. vLLM (models/llava.py) builds the tower only up to
`vision_feature_layer`, and fuses q/k/v and gate/up.
"""

from exporter.model.families.llava_fields import fields
from exporter.model.families.llava_shared import TEXTS, TOWERS, Tower

TOWER = Tower({"vision_config": TOWERS, "text_config": TEXTS}, fields(-2, "default", 32000))


FAMILY = TOWER.family(
    name="llava",
    models="LLaVA-1.5 and checkpoints of the same architecture, Pixtral-12B",
    heading="llava-15",
    architectures=("LlavaForConditionalGeneration",),
    config_class="LlavaConfig",
    fallback_prompt="USER: <image>\n{text} ASSISTANT:",
    any_size=TOWER.any_size,
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
