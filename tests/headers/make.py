"""Write names, shapes and dtypes of the real checkpoints into this folder, without any weights.

Everything follows from the published architectures: the names are those of the files on the hub, the shapes those of
the configuration; a `note` says where one is derived from another. `python tests/headers/make.py` rewrites the JSON
files; `tests/test_headers.py` checks that they are fresh and that the parameter counts are the published ones.

Format: `config` is config.json, `shard_bytes` the size at which a new shard starts, `tensors` maps a name to
`[dtype, shape]`, or a name with `{i}` to `[dtype, shape, "start:stop:step"]`, the blocks that have it. Tensors come in
the order of the file: patterns that follow each other and share the text before `{i}` belong to one stack of blocks.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.headers.published import CONFIGS, YI_34B, header_of

Entry = list[Any]  # [dtype, shape] or [dtype, shape, "start:stop:step"]
Tensors = dict[str, Entry]

OPT_27B = "Salesforce--blip2-opt-2.7b"
OPT_67B = "Salesforce--blip2-opt-6.7b"
ITM_COCO = "Salesforce--blip2-itm-vit-g-coco"
ITM = "Salesforce--blip2-itm-vit-g"
LLAVA_7B = "llava-hf--llava-1.5-7b-hf"
LLAVA_13B = "llava-hf--llava-1.5-13b-hf"
LLAVA_34B = "llava-1.5-shapes-34b"  # no such checkpoint is published; docs/measurements use it


def affine(name: str, rows: int, columns: int) -> dict[str, list[int]]:
    """A linear with a bias: weight `[out, in]`, bias `[out]`."""
    return {f"{name}.weight": [rows, columns], f"{name}.bias": [rows]}


def norm(name: str, width: int) -> dict[str, list[int]]:
    """A layer norm: weight and bias `[width]`."""
    return {f"{name}.weight": [width], f"{name}.bias": [width]}


def at(prefix: str, dtype: str, shapes: dict[str, list[int]], blocks: str | None = None) -> Tensors:
    """The entries of `shapes` below `prefix`."""
    return {f"{prefix}{name}": [dtype, shape, *([blocks] if blocks else [])] for name, shape in shapes.items()}


def clip_tower(prefix: str, dtype: str, width: int, inner: int, blocks: int, patch: int, image: int) -> Tensors:
    """CLIP's vision transformer; one position for the class token."""
    positions = (image // patch) ** 2 + 1
    outside = {
        "embeddings.class_embedding": [width],
        "embeddings.patch_embedding.weight": [width, 3, patch, patch],
        "embeddings.position_embedding.weight": [positions, width],
        **norm("pre_layrnorm", width),
    }
    block: dict[str, list[int]] = {}
    for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
        block |= affine(f"self_attn.{name}", width, width)
    block |= norm("layer_norm1", width) | affine("mlp.fc1", inner, width)
    block |= affine("mlp.fc2", width, inner) | norm("layer_norm2", width)
    return {
        **at(prefix, dtype, outside),
        **at(f"{prefix}encoder.layers.{{i}}.", dtype, block, f"0:{blocks}:1"),
        **at(prefix, dtype, norm("post_layernorm", width)),
    }


def llama(
    prefix: str, dtype: str, width: int, inner: int, blocks: int, vocabulary: int, pairs: int | None = None
) -> Tensors:
    """Llama with an untied output matrix. pairs: features of key and of value; None: as many as query has."""
    rows = {"q": width, "k": pairs or width, "v": pairs or width, "o": width}
    block = {f"self_attn.{name}_proj.weight": [rows[name], width] for name in "qkvo"}
    block |= {f"mlp.{name}_proj.weight": [inner, width] for name in ("gate", "up")}
    block |= {"mlp.down_proj.weight": [width, inner]}
    block |= {f"{name}.weight": [width] for name in ("input_layernorm", "post_attention_layernorm")}
    return {
        **at(prefix, dtype, {"model.embed_tokens.weight": [vocabulary, width]}),
        **at(f"{prefix}model.layers.{{i}}.", dtype, block, f"0:{blocks}:1"),
        **at(prefix, dtype, {"model.norm.weight": [width], "lm_head.weight": [vocabulary, width]}),
    }


def eva_tower(prefix: str, dtype: str, width: int, inner: int, blocks: int, patch: int, image: int) -> Tensors:
    """BLIP-2's vision transformer (EVA ViT-g): query, key and value are one linear."""
    positions = (image // patch) ** 2 + 1
    outside = {
        "embeddings.class_embedding": [1, 1, width],
        "embeddings.position_embedding": [1, positions, width],
        "embeddings.patch_embedding.weight": [width, 3, patch, patch],
        "embeddings.patch_embedding.bias": [width],
    }
    block = affine("self_attn.qkv", 3 * width, width) | affine("self_attn.projection", width, width)
    block |= norm("layer_norm1", width) | affine("mlp.fc1", inner, width)
    block |= affine("mlp.fc2", width, inner) | norm("layer_norm2", width)
    return {
        **at(prefix, dtype, outside),
        **at(f"{prefix}encoder.layers.{{i}}.", dtype, block, f"0:{blocks}:1"),
        **at(prefix, dtype, norm("post_layernorm", width)),
    }


def attention(name: str, width: int, source: int) -> dict[str, list[int]]:
    """BERT attention whose keys and values read a source of `source` features."""
    shapes = affine(f"{name}.attention.query", width, width)
    shapes |= affine(f"{name}.attention.key", width, source) | affine(f"{name}.attention.value", width, source)
    return shapes | affine(f"{name}.output.dense", width, width) | norm(f"{name}.output.LayerNorm", width)


def feed_forward(suffix: str, width: int, inner: int) -> dict[str, list[int]]:
    """BERT feed-forward; `suffix` is "_query" for the query tokens, "" for text."""
    shapes = affine(f"intermediate{suffix}.dense", inner, width)
    return shapes | affine(f"output{suffix}.dense", width, inner) | norm(f"output{suffix}.LayerNorm", width)


def q_former(prefix: str, dtype: str, blocks: int, text: bool) -> Tensors:
    """The Q-Former, 768 wide: every second block attends to the image; the text feed-forward only for retrieval."""
    every = f"0:{blocks}:1"
    stack = f"{prefix}encoder.layer.{{i}}."
    return {
        **at(prefix, dtype, norm("layernorm", 768)),
        **at(stack, dtype, attention("attention", 768, 768), every),
        **at(stack, dtype, attention("crossattention", 768, 1408), f"0:{blocks}:2"),
        **(at(stack, dtype, feed_forward("", 768, 3072), every) if text else {}),
        **at(stack, dtype, feed_forward("_query", 768, 3072), every),
    }


def opt(prefix: str, dtype: str, width: int, inner: int, blocks: int, vocabulary: int) -> Tensors:
    """OPT; its output matrix is the embedding and is not stored twice. Positions start at 2."""
    block: dict[str, list[int]] = {}
    for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
        block |= affine(f"self_attn.{name}", width, width)
    block |= norm("self_attn_layer_norm", width) | affine("fc1", inner, width)
    block |= affine("fc2", width, inner) | norm("final_layer_norm", width)
    outside = {"embed_tokens.weight": [vocabulary, width], "embed_positions.weight": [2050, width]}
    return {
        **at(prefix, dtype, outside | norm("final_layer_norm", width)),
        **at(f"{prefix}layers.{{i}}.", dtype, block, f"0:{blocks}:1"),
    }


def llava(
    text: dict[str, Any], width: int, inner: int, blocks: int, image_token: int, pairs: int | None = None
) -> dict[str, Any]:
    """LLaVA-1.5: CLIP-L/336, a two-linear projector, a Llama.

    text: its configuration. width, inner, blocks, pairs: of the Llama, as in `llama`.
    """
    text = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16", **text}
    text = dict(sorted(text.items()))
    vision = {
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
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_seq_length": 576,
        "image_token_index": image_token,
        "model_type": "llava",
        "pad_token_id": image_token + 1,
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_config": vision,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    projector = affine("linear_1", width, 1024) | affine("linear_2", width, width)
    tensors = {
        **clip_tower("vision_tower.vision_model.", "F16", 1024, 4096, 24, 14, 336),
        **at("multi_modal_projector.", "F16", projector),
        **llama("language_model.", "F16", width, inner, blocks, text["vocab_size"], pairs),
    }
    return {"config": config, "shard_bytes": 5 * 10**9, "tensors": tensors}


def llava_7b() -> dict[str, Any]:
    """LLaVA-1.5 7B: Vicuna 7B, whose shapes are the defaults of transformers and left out."""
    text = {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "vocab_size": 32064,
    }
    return llava(text, 4096, 11008, 32, 32000)


def llava_13b() -> dict[str, Any]:
    """LLaVA-1.5 13B: Vicuna 13B."""
    text = {
        "_name_or_path": "lmsys/vicuna-13b-v1.5",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "max_position_embeddings": 4096,
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
        "num_key_value_heads": 40,
        "rms_norm_eps": 1e-05,
        "vocab_size": 32064,
    }
    return llava(text, 5120, 13824, 40, 32000)


def llava_34b() -> dict[str, Any]:
    """LLaVA-NeXT 34B's shapes as LLaVA-1.5: Yi 34B, whose 56 heads of queries share 8 of keys and values."""
    shapes = {key: value for key, value in YI_34B.items() if key != "model_type"}
    text = {"_name_or_path": "NousResearch/Nous-Hermes-2-Yi-34B", **shapes}
    note = "LLaVA-NeXT 34B's shapes as plain LLaVA-1.5: one picture of 336 pixels, no image_newline"
    return {"note": note, **llava(text, 7168, 20480, 60, 64000, pairs=8 * 128)}


def blip2_config(architecture: str) -> dict[str, Any]:
    """What the two BLIP-2 configurations share."""
    vision = {
        "hidden_size": 1408,
        "image_size": 224,
        "intermediate_size": 6144,
        "model_type": "blip_2_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 39,
        "patch_size": 14,
        "qkv_bias": True,
    }
    former = {
        "cross_attention_frequency": 2,
        "encoder_hidden_size": 1408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "model_type": "blip_2_qformer",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "vocab_size": 30523,
    }
    return {
        "architectures": [architecture],
        "model_type": "blip-2",
        "num_query_tokens": 32,
        "qformer_config": former,
        "torch_dtype": "float32",
        "vision_config": vision,
    }


def blip2_opt(width: int = 2560) -> dict[str, Any]:
    """BLIP-2 with OPT-2.7b; 32 embedding rows more than OPT's own 50,272 hold the image token.

    OPT-6.7b is the same stack of 32 blocks and heads at a width of 4096 (its published configuration).
    """
    text = {
        "activation_function": "relu",
        "architectures": ["OPTForCausalLM"],
        "do_layer_norm_before": True,
        "ffn_dim": 4 * width,
        "hidden_size": width,
        "max_position_embeddings": 2048,
        "model_type": "opt",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "vocab_size": 50304,
        "word_embed_proj_dim": width,
    }
    config = blip2_config("Blip2ForConditionalGeneration")
    config |= {"image_token_index": 50265, "text_config": text, "use_decoder_only_language_model": True}
    tensors = {
        "query_tokens": ["F32", [1, 32, 768]],
        **eva_tower("vision_model.", "F32", 1408, 6144, 39, 14, 224),
        **q_former("qformer.", "F32", 12, text=False),
        **at("", "F32", affine("language_projection", width, 768)),
        **opt("language_model.model.decoder.", "F32", width, 4 * width, 32, 50304),
    }
    return {"config": config, "shard_bytes": 10**10, "tensors": tensors}


def blip2_opt_67b() -> dict[str, Any]:
    """BLIP-2 with OPT-6.7b."""
    note = "derived from the file of blip2-opt-2.7b: the width of OPT-6.7b, everything else alike"
    return {"note": note, **blip2_opt(4096)}


def blip2_itm_224() -> dict[str, Any]:
    """BLIP-2's retrieval model before it was fine-tuned on COCO."""
    note = "derived from the file of blip2-itm-vit-g-coco: pictures of 224 pixels, everything else alike"
    return {"note": note, **blip2_itm(224)}


def blip2_itm(image: int = 364) -> dict[str, Any]:
    """BLIP-2's retrieval model, ViT-g fine-tuned on COCO; no language model."""
    config = blip2_config("Blip2ForImageTextRetrieval")
    config["vision_config"]["image_size"] = image
    config["qformer_config"]["use_qformer_text_input"] = True
    config |= {"image_text_hidden_size": 256, "image_token_index": None}
    words = {"word_embeddings.weight": [30523, 768], "position_embeddings.weight": [512, 768]}
    heads = affine("vision_projection", 256, 768) | affine("text_projection", 256, 768) | affine("itm_head", 2, 768)
    tensors = {
        "query_tokens": ["F32", [1, 32, 768]],
        **eva_tower("vision_model.", "F32", 1408, 6144, 39, 14, image),
        **at("embeddings.", "F32", words),
        **q_former("qformer.", "F32", 12, text=True),
        **at("", "F32", heads),
    }
    return {"config": config, "shard_bytes": 10**10, "tensors": tensors}


HEADERS: dict[str, Callable[[], dict[str, Any]]] = {
    LLAVA_7B: llava_7b,
    LLAVA_13B: llava_13b,
    LLAVA_34B: llava_34b,
    OPT_27B: blip2_opt,
    OPT_67B: blip2_opt_67b,
    ITM_COCO: blip2_itm,
    ITM: blip2_itm_224,
    **{name: partial(header_of, *published) for name, published in CONFIGS.items()},
}


def render(header: dict[str, Any]) -> str:
    """The JSON text of one file: one tensor a line."""
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in header["tensors"].items())
    config = json.dumps(header["config"], indent=2).replace("\n", "\n  ")
    note = f'  "note": {json.dumps(header["note"])},\n' if "note" in header else ""
    head = f'{note}  "config": {config},\n  "shard_bytes": {header["shard_bytes"]}'
    return f'{{\n{head},\n  "tensors": {{\n{lines}\n  }}\n}}\n'


if __name__ == "__main__":
    for stem, make in HEADERS.items():
        Path(__file__).with_name(f"{stem}.json").write_text(render(make()), encoding="utf-8")
