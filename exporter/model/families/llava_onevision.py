"""The LLaVA-OneVision family (Li et al., arXiv 2408.03326): SigLIP on tiles of the picture -> projector -> Qwen2.

Checkpoint names are those of `llava-hf/llava-onevision-qwen2-7b-ov-hf`; vLLM (models/llava_onevision.py) uses the same.
It builds the projector from plain linears.
"""

from exporter.model.families.llava_fields import TileLimit, fields
from exporter.model.families.llava_shared import TEXTS, TOWERS, Tower

_PLAIN = "vLLM builds LLaVA-OneVision's projector from plain linears and cannot load it packed"
_SIDES = tuple(range(384, 2305, 384))
_TINY_PINPOINTS = [[32, 32], [32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
TOWER = Tower(
    {
        "vision_config": {"siglip_vision_model": TOWERS["siglip_vision_model"]},
        "text_config": {name: TEXTS[name] for name in ("qwen2", "llama", "mistral", "qwen3")},
    },
    (*fields(-1, "full", 151646), TileLimit()),
    tuple((height, width) for height in _SIDES for width in _SIDES),
)

FAMILY = TOWER.family(
    name="llava-onevision",
    models="LLaVA-OneVision",
    heading="llava-next-and-llava-onevision",
    architectures=("LlavaOnevisionForConditionalGeneration",),
    config_class="LlavaOnevisionConfig",
    assemble=lambda config: TOWER.components(config, unpackable=_PLAIN),
    fallback_prompt="<|im_start|>user <image>\n{text}<|im_end|><|im_start|>assistant\n",
    varies=True,
    processor_fields=lambda config: {
        "num_image_tokens": TOWER.patches(config),
        "vision_feature_select_strategy": TOWER.top(config, "vision_feature_select_strategy"),
    },
    shared_settings=lambda config: TOWER.shared_settings(config) | {TileLimit.key: TileLimit().of(config)},
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
