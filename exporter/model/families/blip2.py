"""The BLIP-2 families (Li et al., arXiv 2301.12597): EVA ViT-g -> Q-Former -> linear -> OPT, or -> retrieval heads.

Checkpoint names are those of `Salesforce/blip2-opt-2.7b` and `Salesforce/blip2-itm-vit-g-coco`; transformers uses the
same. vLLM (models/blip2.py) builds the ViT without a prefix, so its linears are named `.encoder.layers.N...` there, and
builds the Q-Former and the projection as plain linears that it cannot load packed.
"""

import json
from dataclasses import replace
from typing import Any

import exporter.model.families.parts.blip2 as sizes
from exporter.model.families.component import Component, Config, Inputs, Pass, single, stack
from exporter.model.families.config_fields import Number
from exporter.model.families.family import Family, Sizes
from exporter.model.families.names import Names
from exporter.model.families.parts.part import TinyProcessor, field_of
from exporter.model.families.parts.qformer import CROSS, QUERIES

_PLAIN = "vLLM without mmq's plugin builds it from plain linears and cannot load it packed"
_PARTS = sizes.PARTS
_RETRIEVAL_PARTS = {key: sizes.PARTS[key] for key in ("vision_config", "qformer_config")}


def refuses(config: Config) -> str | None:
    """Why mmq does not support this model: Flan-T5, or an OPT that differs in structure from the published models."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        return None  # an invalid config.json, which has its own error
    kind = text.get("model_type", "opt")
    if kind == "t5" or not config.get("use_decoder_only_language_model", True):
        return (
            f"its language model is {kind}, but mmq supports BLIP-2 only with OPT: vLLM has no encoder-decoder T5 and "
            "could not serve the artifact"
        )
    for key, value in {"activation_function": "relu", "do_layer_norm_before": True}.items():
        if text.get(key, value) != value:
            return (
                f"text_config.{key} is {json.dumps(text[key])[:40]}, but mmq supports only {json.dumps(value)}, which "
                "OPT-2.7b and OPT-6.7b have"
            )
    return None


def misfits(config_sizes: Sizes) -> list[str]:
    """A problem when OPT's embedding is not as wide as its blocks: the projection makes vectors of that width."""
    text = config_sizes["text_config"]
    width, embedded = text["hidden_size"], text["word_embed_proj_dim"]
    same = f"text_config.word_embed_proj_dim: {embedded}, but a picture's tokens have the hidden_size {width}"
    return [] if width == embedded else [f"{same}; mmq supports only equal widths"]


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


def vision(config: Config) -> Component:
    """The ViT."""
    target = r"(?:vision_model)?\.?encoder\.layers\.{i}"
    return stack("vision", _PARTS, "vision_config", "vision_model", config, target=target, tokens=sizes.image_positions)


def former(config: Config, **changed: Any) -> Component:
    """The Q-Former. changed: fields that differ from those of the Q-Former in front of a language model."""
    own: dict[str, Any] = {
        "has": sizes.former_has,
        "target": r"qformer\.encoder\.layer\.{i}",
        "tokens": sizes.queries,
        "context": sizes.cross_attention_values,
        "unpackable": _PLAIN,
    }
    return stack("qformer", _PARTS, "qformer_config", "qformer", config, **{**own, **changed})


def assemble(config: Config) -> tuple[Component, ...]:
    """The components of a model that answers."""
    name = "language_projection"
    projector = single("projector", name, (name,), target=name, tokens=sizes.queries, unpackable=_PLAIN)
    language = stack(
        "language",
        _PARTS,
        "text_config",
        "language_model.model.decoder",
        config,
        target=r"language_model\.model\.decoder\.layers\.{i}",
        tokens=lambda config: sizes.queries(config) + 32,  # question and answer, or a caption
        passes=(Pass(padded=True),),
    )
    return vision(config), former(config), projector, language


def assemble_retrieval(config: Config) -> tuple[Component, ...]:
    """The components of a model that ranks texts: the Q-Former reads picture and text in three ways."""
    changed = former(
        config,
        passes=(Pass(match, padded=True), Pass(contrast), Pass(read_text, padded=True)),
        unpadded=frozenset((*CROSS, *QUERIES)),
        tokens=lambda config: 2 * (sizes.queries(config) + 32),
        context=lambda config: 2 * sizes.cross_attention_values(config),
        unpackable=None,
    )
    return vision(config), changed


_TINY: dict[str, Any] = {
    "model_type": "blip-2",
    "num_query_tokens": 5,
    "initializer_range": 0.02,  # transformers' defaults make the ViT's outputs almost zero
    "dtype": "bfloat16",
}
_TINY_PROCESSOR = TinyProcessor(
    "Blip2Processor",
    "BlipImageProcessorPil",
    {"size": {"height": 32, "width": 32}},
    {"num_query_tokens": 5},
    prompt=None,
    named=False,
)
FAMILY = Family(
    name="blip2",
    models="BLIP-2 with OPT",
    heading="blip-2",
    architectures=("Blip2ForConditionalGeneration",),
    kept=(
        (r"language_model\.lm_head", "the output head shares the embedding's tensor; the paper keeps it in 16 bits"),
    ),
    config_class="Blip2Config",
    parts=_PARTS,
    assemble=assemble,
    names=lambda config: Names((("vision_model", "vision_model", ""),)),  # vLLM builds the ViT without a prefix
    question_prompt="Question: {question} Short answer:",
    caption_prompt="",
    fallback_prompt="{text}",
    max_new_tokens={
        "vqa": 10,
        "captioning": 40,
    },  # captions of photos have at most 20 tokens, those of the demo's scenes 34
    tasks=("vqa", "captioning"),
    image_tokens=sizes.image_tokens,
    positions=field_of(_PARTS, "text_config", "max_position_embeddings"),
    vocabulary=field_of(_PARTS, "text_config", "vocab_size"),
    pixels=sizes.pixels,
    processor_fields=lambda config: {"num_query_tokens": sizes.queries(config)},
    reply_end="\n",
    refuses=refuses,
    float32=("query_tokens", "qformer."),
    fields=sizes.FIELDS,
    shapes=sizes.shapes,
    misfits=misfits,
    tiny=_TINY | {"image_token_index": 127, "use_decoder_only_language_model": True},
    tiny_processor=lambda config: _TINY_PROCESSOR,
    tied={"language_model.lm_head.weight": "language_model.model.decoder.embed_tokens.weight"},
)

RETRIEVAL = Family(
    name="blip2-itm",
    models="BLIP-2 for image-text matching",
    heading="blip-2",
    architectures=("Blip2ForImageTextRetrieval",),
    kept=(
        (
            r"(vision|text)_projection",
            "a single projection computes the compared features; the paper keeps it in 16 bits",
        ),
        (r"itm_head", "its two outputs score every pair; the paper keeps it in 16 bits"),
    ),
    config_class="Blip2Config",
    parts=_RETRIEVAL_PARTS,
    assemble=assemble_retrieval,
    question_prompt="{question}",
    caption_prompt="",
    fallback_prompt="{text}",
    max_new_tokens={},
    tasks=("retrieval",),
    image_tokens=sizes.image_tokens,
    positions=sizes.former_positions,
    vocabulary=field_of(_PARTS, "qformer_config", "vocab_size"),
    pixels=sizes.pixels,
    processor_fields=lambda config: (
        {"num_query_tokens": sizes.image_tokens(config)} if sizes.image_tokens(config) else {}
    ),
    shared_settings=lambda config: {"num_query_tokens": sizes.image_tokens(config)},  # 0 without an image token
    reply_end="",
    outputs=retrieval_scores,
    float32=("query_tokens", "qformer."),
    unserved="vLLM does not support image-text retrieval; load the artifact with transformers",
    tiny=_TINY
    | {
        "qformer_config": {"use_qformer_text_input": True, "max_position_embeddings": 256},
        "image_text_hidden_size": 24,
        "image_token_index": None,
    },
    tiny_processor=lambda config: replace(_TINY_PROCESSOR, fields={"num_query_tokens": None}, tokens=()),
    fields=(*sizes.FIELDS, Number("image_text_hidden_size", 256)),
    shapes=sizes.retrieval_shapes,
)
