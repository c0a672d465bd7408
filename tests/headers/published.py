"""Headers rebuilt from published configurations: shapes of transformers' classes under the names of the hub's files.

`TOTALS` holds the parameters that the model pages show; `tests/test_headers.py` compares them.
"""

import re
from typing import Any

import torch

LLAVA = (  # prefix in transformers' class -> prefix in the hub's files
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.image_newline", "image_newline"),
)
PIXTRAL = (("model.vision_tower.", "vision_tower."), *LLAVA[1:])

Config = dict[str, Any]
CLIP = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
SIGLIP = {
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 26,
    "patch_size": 14,
    "vision_use_head": False,
}
LLAMA_3 = {
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
}
NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def llava(
    architecture: str, model_type: str, text: dict[str, Any], vision: dict[str, Any], **top: Any
) -> dict[str, Any]:
    """config.json of a LLaVA."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "text_config": text,
        "vision_config": vision,
        "projector_hidden_act": "gelu",
        **({"tie_word_embeddings": False} | top),
    }


QWEN2_05B = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "vocab_size": 152000,
}
YI_34B = {
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 56,
    "num_hidden_layers": 60,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 5000000.0,
    "vocab_size": 64064,
}


def llava_onevision(text: dict[str, Any], **top: Any) -> dict[str, Any]:
    """config.json of a LLaVA-OneVision."""
    settings = {"image_token_index": 151646, "video_token_index": 151647, "vision_feature_layer": -1}
    settings |= {"vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"}
    architecture = "LlavaOnevisionForConditionalGeneration"
    return llava(architecture, "llava_onevision", text, SIGLIP, **settings, torch_dtype="float16", **top)


def llava_next(text: dict[str, Any], **top: Any) -> dict[str, Any]:
    """config.json of a LLaVA-NeXT."""
    settings = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "torch_dtype": "float16"}
    settings |= {"image_grid_pinpoints": NEXT_PINPOINTS, "use_image_newline_parameter": True}
    return llava("LlavaNextForConditionalGeneration", "llava_next", text, CLIP, **settings, **top)


def smolvlm(
    architecture: str, model_type: str, text: tuple[int, ...], vision: Config, scale: int, **top: Any
) -> Config:
    """config.json of an Idefics 3 or SmolVLM. text: width, feed-forward, blocks, heads, and heads of keys."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    words = dict(zip(names, text, strict=True)) | {"model_type": "llama", "head_dim": 64, "vocab_size": 49280}
    words |= {"max_position_embeddings": 8192, "pad_token_id": 2, "rms_norm_eps": 1e-05, "rope_theta": 100000}
    return {
        "architectures": [architecture],
        "image_token_id": 49190,
        "model_type": model_type,
        "pad_token_id": 2,
        "scale_factor": scale,
        "text_config": words,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vision_config": vision,
        **top,
    }


BASE_512 = {
    "hidden_size": 768,
    "image_size": 512,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "patch_size": 16,
}
SO400M = {
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}
QWEN2 = (("model.visual.", "visual."), ("model.language_model.", "model."))


def qwen2_vl(number: str, text: tuple[int, ...], vision: Config, tied: bool, vocabulary: int) -> Config:
    """config.json of a Qwen2-VL or Qwen2.5-VL: the text model's keys are at the top level. text: as in `smolvlm`."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {
        "architectures": [f"Qwen{number}VLForConditionalGeneration"],
        "image_token_id": 151655,
        "max_position_embeddings": 128000,
        "max_window_layers": 28,
        "model_type": f"qwen{number.strip('_')}_vl",
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "video_token_id": 151656,
        "vision_config": vision,
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
        "vocab_size": vocabulary,
        **dict(zip(names, text, strict=True)),
    }


def qwen25_vision(out: int, inner: int = 3420) -> Config:
    """The tower of a Qwen2.5-VL whose text model is `out` wide. inner: width of its feed-forward."""
    return {
        "depth": 32,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "hidden_act": "silu",
        "hidden_size": 1280,
        "in_chans": 3,
        "intermediate_size": inner,
        "model_type": "qwen2_5_vl",
        "num_heads": 16,
        "out_hidden_size": out,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
    }


def qwen3_vl(text: tuple[int, ...], large: bool, tied: bool) -> Config:
    """config.json of a dense Qwen3-VL. text: as in `smolvlm`. large: whether the tower has 27 blocks."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    width, inner, depth = (1152, 4304, 27) if large else (1024, 4096, 24)
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": 151655,
        "model_type": "qwen3_vl",
        "text_config": {
            **dict(zip(names, text, strict=True)),
            "dtype": "bfloat16",
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "model_type": "qwen3_vl_text",
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 5000000,
            "tie_word_embeddings": tied,
            "vocab_size": 151936,
        },
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "video_token_id": 151656,
        "vision_config": {
            "deepstack_visual_indexes": [8, 16, 24] if large else [5, 11, 17],
            "depth": depth,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": width,
            "in_channels": 3,
            "intermediate_size": inner,
            "model_type": "qwen3_vl",
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": text[0],
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
    }


IDEFICS3_8B = {
    "architectures": ["Idefics3ForConditionalGeneration"],
    "image_token_id": 128257,
    "model_type": "idefics3",
    "pad_token_id": 128002,
    "scale_factor": 2,
    "text_config": {
        **LLAMA_3,
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "vocab_size": 128259,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vision_config": {"model_type": "idefics3", **SO400M, "image_size": 364},
}
SMOL, IDEFICS = "SmolVLMForConditionalGeneration", "Idefics3ForConditionalGeneration"

CONFIGS: dict[str, tuple[dict[str, Any], tuple[tuple[str, str], ...]]] = {
    "llava-hf--llava-v1.6-mistral-7b-hf": (
        llava_next(
            {
                "intermediate_size": 14336,
                "max_position_embeddings": 32768,
                "model_type": "mistral",
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-05,
                "rope_theta": 1000000.0,
                "sliding_window": None,
                "vocab_size": 32064,
            },
            image_token_index=32000,
        ),
        LLAVA,
    ),
    "llava-hf--llava-v1.6-vicuna-7b-hf": (
        llava_next(
            {"max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05, "vocab_size": 32064},
            image_token_index=32000,
        ),
        LLAVA,
    ),
    "llava-hf--llama3-llava-next-8b-hf": (
        llava_next({**LLAMA_3, "vocab_size": 128320}, image_token_index=128256),
        LLAVA,
    ),
    "llava-hf--llava-v1.6-34b-hf": (llava_next(YI_34B, image_token_index=64000), LLAVA),
    "llava-hf--llava-onevision-qwen2-7b-ov-hf": (
        llava_onevision(
            {
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "max_position_embeddings": 32768,
                "model_type": "qwen2",
                "num_attention_heads": 28,
                "num_hidden_layers": 28,
                "num_key_value_heads": 4,
                "rope_theta": 1000000.0,
                "vocab_size": 152064,
            },
        ),
        LLAVA,
    ),
    "llava-hf--llava-onevision-qwen2-0.5b-ov-hf": (llava_onevision(QWEN2_05B, tie_word_embeddings=True), LLAVA),
    "xtuner--llava-llama-3-8b-v1_1-transformers": (
        llava(
            "LlavaForConditionalGeneration",
            "llava",
            {**LLAMA_3, "vocab_size": 128320},
            CLIP,
            image_token_index=128257,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            torch_dtype="float16",
        ),
        LLAVA,
    ),
    "mistral-community--pixtral-12b": (
        llava(
            "LlavaForConditionalGeneration",
            "llava",
            {
                "head_dim": 128,
                "hidden_size": 5120,
                "intermediate_size": 14336,
                "max_position_embeddings": 1024000,
                "model_type": "mistral",
                "num_hidden_layers": 40,
                "num_key_value_heads": 8,
                "rope_theta": 1000000000.0,
                "sliding_window": None,
                "vocab_size": 131072,
            },
            {
                "head_dim": 64,
                "hidden_act": "gelu",
                "image_size": 1024,
                "model_type": "pixtral",
                "patch_size": 16,
                "rope_theta": 10000.0,
            },
            image_token_index=10,
            image_seq_length=1,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            torch_dtype="bfloat16",
        ),
        PIXTRAL,
    ),
    "HuggingFaceM4--Idefics3-8B-Llama3": (IDEFICS3_8B, ()),
    "HuggingFaceTB--SmolVLM-256M-Instruct": (
        smolvlm(IDEFICS, "idefics3", (576, 1536, 30, 9, 3), {"model_type": "idefics3", **BASE_512}, 4),
        (),
    ),
    "HuggingFaceTB--SmolVLM2-500M-Video-Instruct": (
        smolvlm(SMOL, "smolvlm", (960, 2560, 32, 15, 5), {"model_type": "smolvlm_vision", **BASE_512}, 4),
        (),
    ),
    "HuggingFaceTB--SmolVLM2-2.2B-Instruct": (
        smolvlm(SMOL, "smolvlm", (2048, 8192, 24, 32, 32), {"model_type": "smolvlm_vision", **SO400M}, 3),
        (),
    ),
    "Qwen--Qwen2-VL-2B-Instruct": (
        qwen2_vl(
            "2",
            (1536, 8960, 28, 12, 2),
            {
                "depth": 32,
                "embed_dim": 1280,
                "hidden_size": 1536,
                "in_chans": 3,
                "mlp_ratio": 4,
                "model_type": "qwen2_vl",
                "num_heads": 16,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
            True,
            151936,
        ),
        QWEN2,
    ),
    "Qwen--Qwen2.5-VL-3B-Instruct": (
        qwen2_vl("2_5_", (2048, 11008, 36, 16, 2), qwen25_vision(2048), True, 151936),
        QWEN2,
    ),
    "Qwen--Qwen2.5-VL-7B-Instruct": (
        qwen2_vl("2_5_", (3584, 18944, 28, 28, 4), qwen25_vision(3584), False, 152064),
        QWEN2,
    ),
    "Qwen--Qwen2.5-VL-32B-Instruct": (
        qwen2_vl("2_5_", (5120, 27648, 64, 40, 8), qwen25_vision(5120, 3456), False, 152064),
        QWEN2,
    ),
    "Qwen--Qwen2.5-VL-72B-Instruct": (
        qwen2_vl("2_5_", (8192, 29568, 80, 64, 8), qwen25_vision(8192, 3456), False, 152064),
        QWEN2,
    ),
    "Qwen--Qwen3-VL-2B-Instruct": (qwen3_vl((2048, 6144, 28, 16, 8), False, True), ()),
    "Qwen--Qwen3-VL-4B-Instruct": (qwen3_vl((2560, 9728, 36, 32, 8), False, True), ()),
    "Qwen--Qwen3-VL-8B-Instruct": (qwen3_vl((4096, 12288, 36, 32, 8), True, False), ()),
    "Qwen--Qwen3-VL-32B-Instruct": (qwen3_vl((5120, 25600, 64, 64, 8), True, False), ()),
}
TOTALS = {
    "llava-hf--llava-v1.6-mistral-7b-hf": 7_566_747_648,
    "llava-hf--llava-v1.6-vicuna-7b-hf": 7_063_431_168,
    "llava-hf--llama3-llava-next-8b-hf": 8_355_276_800,
    "llava-hf--llava-v1.6-34b-hf": 34_752_083_968,
    "llava-hf--llava-onevision-qwen2-7b-ov-hf": 8_030_348_832,
    "llava-hf--llava-onevision-qwen2-0.5b-ov-hf": 893_675_552,
    "mistral-community--pixtral-12b": 12_682_739_712,
    "HuggingFaceM4--Idefics3-8B-Llama3": 8_462_086_384,
    "HuggingFaceTB--SmolVLM-256M-Instruct": 256_484_928,
    "HuggingFaceTB--SmolVLM2-500M-Video-Instruct": 507_482_304,
    "HuggingFaceTB--SmolVLM2-2.2B-Instruct": 2_246_784_880,
    "Qwen--Qwen2-VL-2B-Instruct": 2_208_985_600,
    "Qwen--Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen--Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen--Qwen2.5-VL-32B-Instruct": 33_452_718_336,
    "Qwen--Qwen2.5-VL-72B-Instruct": 73_410_777_344,
    "Qwen--Qwen3-VL-2B-Instruct": 2_127_532_032,
    "Qwen--Qwen3-VL-4B-Instruct": 4_437_815_808,
    "Qwen--Qwen3-VL-8B-Instruct": 8_767_123_696,
    "Qwen--Qwen3-VL-32B-Instruct": 33_357_390_064,
}
DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


def header_of(config: dict[str, Any], renamed: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """The header of a configuration: `{i}` stands for the number of a block."""
    import transformers

    kind = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        model = kind(kind.config_class.from_dict(config))
    model.tie_weights()
    kinds: dict[str, list[Any]] = {}
    numbers: dict[str, list[int]] = {}
    dtype = DTYPES[config.get("torch_dtype", config.get("dtype", "float32"))]
    for live, parameter in model.named_parameters():
        name = next((hub + live.removeprefix(prefix) for prefix, hub in renamed if live.startswith(prefix)), live)
        pattern = re.sub(r"(?<=layers\.|blocks\.|r_list\.)\d+(?=\.)", "{i}", name, count=1)
        kinds.setdefault(pattern, [dtype, list(parameter.shape)])
        if found := re.search(r"(?:layers|blocks|r_list)\.(\d+)\.", name):
            numbers.setdefault(pattern, []).append(int(found[1]))
    for pattern, blocks in numbers.items():
        assert blocks == list(range(len(blocks)))
        kinds[pattern].append(f"0:{len(blocks)}:1")
    return {"config": config, "shard_bytes": 5 * 10**9, "tensors": kinds}
