"""The BLIP-2 families (Li et al., arXiv 2301.12597): EVA ViT-g -> Q-Former -> linear -> OPT, or -> retrieval heads.

Checkpoint names are those of `Salesforce/blip2-opt-2.7b` and `Salesforce/blip2-itm-vit-g-coco`; transformers uses the
same. vLLM (models/blip2.py) builds the ViT without a prefix, so its linears are named `.encoder.layers.N...` there, and
builds the Q-Former and the projection as plain linears that it cannot load packed.
"""

from dataclasses import replace
from typing import Any

import exporter.model.families.parts.blip2 as sizes
from exporter.model.families.config_fields import Number
from exporter.model.families.family import Component, Config, Family, Inputs, Pass, Role, Smoothing

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
_ATTENDS: Role = "attention"
_FEEDS: Role = "mlp"
_PLAIN = "vLLM without mmq's plugin builds it from plain linears and cannot load it packed"


def same_name(name: str) -> str:
    """The name itself: checkpoint, canonical and live names are equal."""
    return name


def runtime_name(name: str) -> str:
    """Name inside vLLM's `Blip2ForConditionalGeneration`, which builds the ViT without a prefix."""
    return name.removeprefix("vision_model") if name.startswith("vision_model.") else name


def skeleton(config: Config) -> Any:
    """The transformers model for a config.json, with uninitialized weights."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    return Blip2ForConditionalGeneration(Blip2Config.from_dict(dict(config)))


def retrieval_skeleton(config: Config) -> Any:
    """The transformers model with contrastive and matching heads, with uninitialized weights."""
    from transformers import Blip2Config, Blip2ForImageTextRetrieval

    return Blip2ForImageTextRetrieval(Blip2Config.from_dict(dict(config)))


def refuses(config: Config) -> str | None:
    """Why mmq does not support this model: Flan-T5, or an OPT that differs in structure from the published models."""
    text = config["text_config"]
    kind = text.get("model_type", "opt")
    if kind != "opt" or not config.get("use_decoder_only_language_model", True):
        return (
            f"its language model is {kind}, but mmq supports BLIP-2 only with OPT: vLLM has no encoder-decoder T5 and "
            "could not serve the artifact"
        )
    if text.get("activation_function", "relu") != "relu" or not text.get("do_layer_norm_before", True):
        return "its OPT has other activations or norms than OPT-2.7b and OPT-6.7b"
    return None


def match(model: Any, inputs: Inputs) -> Any:
    """Forward pass of the matching head: queries and text together."""
    return model(**inputs, use_image_text_matching_head=True)


def contrast(model: Any, inputs: Inputs) -> Any:
    """Forward pass of the contrastive heads; the Q-Former reads only queries and picture."""
    return model(**inputs, use_image_text_matching_head=False)


def read_text(model: Any, inputs: Inputs) -> Any:
    """Forward pass of the Q-Former on text only, as the contrastive head for texts needs it."""
    skipped = model.config.num_query_tokens if model.config.image_token_index is not None else 0
    words = model.embeddings(input_ids=inputs["input_ids"][:, skipped:])
    return model.qformer(query_embeds=words, query_length=0, attention_mask=inputs["attention_mask"][:, skipped:])


def retrieval_scores(model: Any, inputs: Inputs) -> Any:
    """Scores of all heads, `[values]`."""
    import torch

    return torch.cat([run(model, inputs).logits_per_image.flatten() for run in (contrast, match)])


def tiny_config() -> Config:
    """Two or three blocks per component, odd sizes.

    Sets the initializer ranges, because transformers' defaults make the ViT's outputs almost zero.
    """
    text = {"model_type": "opt", "hidden_size": 96, "ffn_dim": 160, "num_hidden_layers": 2, "num_attention_heads": 3}
    text |= {"vocab_size": 128, "max_position_embeddings": 256, "word_embed_proj_dim": 96}
    return {
        **_tiny("Blip2ForConditionalGeneration"),
        "text_config": text,
        "image_token_index": 127,
        "use_decoder_only_language_model": True,
    }


def tiny_retrieval_config() -> Config:
    """The same ViT, and a Q-Former with a feed-forward for text."""
    config = _tiny("Blip2ForImageTextRetrieval")
    config["qformer_config"] |= {"use_qformer_text_input": True, "max_position_embeddings": 64}
    return config | {"image_text_hidden_size": 24, "image_token_index": None}


def _tiny(architecture: str) -> dict[str, Any]:
    vision = {"model_type": "blip_2_vision_model", "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8, "qkv_bias": True, "initializer_range": 0.02}
    former = {"model_type": "blip_2_qformer", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
    former |= {"num_attention_heads": 3, "encoder_hidden_size": 64, "cross_attention_frequency": 2, "vocab_size": 128}
    return {
        "model_type": "blip-2",
        "architectures": [architecture],
        "vision_config": vision,
        "qformer_config": former,
        "num_query_tokens": 5,
        "initializer_range": 0.02,
        "dtype": "bfloat16",
    }


def _roles(attention: tuple[str, ...], mlp: tuple[str, ...]) -> dict[str, Role]:
    return {**dict.fromkeys(attention, _ATTENDS), **dict.fromkeys(mlp, _FEEDS)}


VISION = Component(
    name="vision",
    blocks="vision_model.encoder.layers.{i}",
    used=sizes.vision_blocks,
    stored=sizes.vision_blocks,
    target=r"(?:vision_model)?\.?encoder\.layers\.{i}",
    tokens=sizes.image_positions,
    phases=(("self_attn.qkv",), ("self_attn.projection",), ("mlp.fc1",), ("mlp.fc2",)),
    roles={"self_attn.qkv": "attention", "self_attn.projection": "attention", "mlp.fc1": "mlp", "mlp.fc2": "mlp"},
    smoothings=(  # fc1 -> fc2 cannot be folded, because GELU is not homogeneous
        Smoothing("layer_norm1", ("self_attn.qkv",)),
        Smoothing("self_attn.qkv", ("self_attn.projection",), rows=(2, 3)),
        Smoothing("layer_norm2", ("mlp.fc1",)),
    ),
)

_CROSS = ("crossattention.attention.key", "crossattention.attention.value")  # their input is the picture's features
_QUERY_PART = ("crossattention.attention.query", "crossattention.output.dense")
_QUERY_FEED_FORWARD = ("intermediate_query.dense", "output_query.dense")
_TEXT_FEED_FORWARD = ("intermediate.dense", "output.dense")

QFORMER = Component(
    name="qformer",
    blocks="qformer.encoder.layer.{i}",
    used=sizes.former_blocks,
    stored=sizes.former_blocks,
    has=sizes.former_has,
    target=r"qformer\.encoder\.layer\.{i}",
    tokens=sizes.queries,
    context=sizes.cross_attention_values,
    phases=(
        _ATTENTION,
        ("attention.output.dense",),
        ("crossattention.attention.query",),
        _CROSS,
        ("crossattention.output.dense",),
        ("intermediate_query.dense",),
        ("output_query.dense",),
        ("intermediate.dense",),
        ("output.dense",),
    ),
    roles=_roles(
        attention=(*_ATTENTION, "attention.output.dense", *_CROSS, *_QUERY_PART),
        mlp=(*_QUERY_FEED_FORWARD, *_TEXT_FEED_FORWARD),
    ),
    smoothings=(  # norms cannot be folded: each follows a residual sum and feeds both the next linear and the next sum
        Smoothing("attention.attention.value", ("attention.output.dense",)),
        Smoothing("crossattention.attention.value", ("crossattention.output.dense",)),
    ),
    unpackable=_PLAIN,
)

PROJECTOR = Component(
    name="projector",
    blocks="language_projection",
    used=lambda config: 1,
    stored=lambda config: 1,
    phases=(("language_projection",),),
    roles={"language_projection": "mlp"},
    target=r"language_projection",
    tokens=sizes.queries,
    unpackable=_PLAIN,
)

LANGUAGE = Component(
    name="language",
    blocks="language_model.model.decoder.layers.{i}",
    used=sizes.text_blocks,
    stored=sizes.text_blocks,
    target=r"language_model\.model\.decoder\.layers\.{i}",
    tokens=lambda config: sizes.queries(config) + 32,  # question and answer, or a caption
    passes=(Pass(padded=True),),
    phases=(_QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
    roles=_roles(attention=(*_QKV, "self_attn.out_proj"), mlp=("fc1", "fc2")),
    smoothings=(  # fc1 -> fc2 can be folded, because ReLU is homogeneous
        Smoothing("self_attn_layer_norm", _QKV),
        Smoothing("self_attn.v_proj", ("self_attn.out_proj",)),
        Smoothing("final_layer_norm", ("fc1",)),
        Smoothing("fc1", ("fc2",)),
    ),
    fused={"self_attn.qkv_proj": _QKV},
)

FAMILY = Family(
    name="blip2",
    architectures=("Blip2ForConditionalGeneration",),
    components=(VISION, QFORMER, PROJECTOR, LANGUAGE),
    kept=(
        (r"language_model\.lm_head", "the output head shares the embedding's tensor; the paper keeps it in 16 bits"),
    ),
    canonical_name=same_name,
    live_name=same_name,
    runtime_name=runtime_name,
    config_class="Blip2Config",
    skeleton=skeleton,
    tiny_config=tiny_config,
    question_prompt="Question: {question} Short answer:",
    caption_prompt="",
    fallback_prompt="{text}",
    max_new_tokens={
        "vqa": 10,
        "captioning": 40,
    },  # captions of photos have at most 20 tokens, those of the demo's scenes 34
    tasks=("vqa", "captioning"),
    image_tokens=sizes.image_tokens,
    positions=sizes.positions,
    vocabulary=sizes.vocabulary,
    picture_side=sizes.picture_side,
    processor_fields=lambda config: {"num_query_tokens": sizes.queries(config)},
    reply_end="\n",
    refuses=refuses,
    float32=("query_tokens", "qformer."),
    parts=sizes.PARTS,
    fields=sizes.FIELDS,
    shapes=sizes.shapes,
    tied={"language_model.lm_head.weight": "language_model.model.decoder.embed_tokens.weight"},
)

RETRIEVAL = Family(
    name="blip2-itm",
    architectures=("Blip2ForImageTextRetrieval",),
    components=(
        VISION,
        replace(
            QFORMER,
            passes=(Pass(match, padded=True), Pass(contrast), Pass(read_text, padded=True)),
            unpadded=frozenset((*_CROSS, *_QUERY_PART, *_QUERY_FEED_FORWARD)),
            tokens=lambda config: 2 * (sizes.queries(config) + 32),
            context=lambda config: 2 * sizes.cross_attention_values(config),
            unpackable=None,
        ),
    ),
    kept=(
        (
            r"(vision|text)_projection",
            "a single projection computes the compared features; the paper keeps it in 16 bits",
        ),
        (r"itm_head", "its two outputs score every pair; the paper keeps it in 16 bits"),
    ),
    canonical_name=same_name,
    live_name=same_name,
    runtime_name=same_name,
    config_class="Blip2Config",
    skeleton=retrieval_skeleton,
    tiny_config=tiny_retrieval_config,
    question_prompt="{question}",
    caption_prompt="",
    fallback_prompt="{text}",
    max_new_tokens={},
    tasks=("retrieval",),
    image_tokens=sizes.image_tokens,
    positions=sizes.former_positions,
    vocabulary=sizes.former_vocabulary,
    picture_side=sizes.picture_side,
    processor_fields=lambda config: {"num_query_tokens": sizes.queries(config)},
    reply_end="",
    outputs=retrieval_scores,
    float32=("query_tokens", "qformer."),
    unserved="vLLM does not support image-text retrieval; load the artifact with transformers",
    parts={key: sizes.PARTS[key] for key in ("vision_config", "qformer_config")},
    fields=(*sizes.FIELDS, Number("image_text_hidden_size", 256)),
    shapes=sizes.retrieval_shapes,
)
