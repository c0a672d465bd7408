"""The text model OPT."""

from exporter.model.families.config_fields import MAX_BLOCKS, MAX_ROWS, Choice, Flag, Fraction, Number, Values
from exporter.model.families.parts.part import (
    ACTIVATIONS,
    Part,
    Shapes,
    Smoothing,
    Stack,
    blocks,
    heads_misfit,
    linear,
    norm,
    pad_misfit,
    pad_token,
)

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_STACK = Stack(
    path="layers.{i}",
    phases=(_QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
    attention=(*_QKV, "self_attn.out_proj"),
    row_parallel=("self_attn.out_proj", "fc2"),
    smoothings=(  # fc1 -> fc2 can be folded, because ReLU is homogeneous
        Smoothing("self_attn_layer_norm", _QKV),
        Smoothing("self_attn.v_proj", ("self_attn.out_proj",)),
        Smoothing("final_layer_norm", ("fc1",)),
        Smoothing("fc1", ("fc2",)),
    ),
    fused={"self_attn.qkv_proj": _QKV},
)


def _opt(values: Values) -> Shapes:
    width, feeds = values["hidden_size"], values["ffn_dim"]
    bias, learned = values["enable_bias"], values["layer_norm_elementwise_affine"]

    def affine(name: str) -> Shapes:
        return norm(name, width) if learned else {}

    block: Shapes = {}
    for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
        block |= linear(f"self_attn.{name}", width, width, bias)
    block |= affine("self_attn_layer_norm") | linear("fc1", feeds, width, bias)
    block |= linear("fc2", width, feeds, bias) | affine("final_layer_norm")
    tensors: Shapes = {
        "embed_tokens.weight": (values["vocab_size"], width),
        "embed_positions.weight": (values["max_position_embeddings"] + 2, width),  # OPT's positions start at 2
    }
    if values["do_layer_norm_before"] and not values["_remove_final_layer_norm"]:
        tensors |= affine("final_layer_norm")
    return tensors | blocks("layers", values["num_hidden_layers"], block)


def _hidden_width(values: Values) -> int:
    return int(values["hidden_size"])


OPT = Part(
    (
        Number("hidden_size", 768),
        Number("ffn_dim", 3072, most=2**20),
        Number("num_hidden_layers", 12, most=MAX_BLOCKS),
        Number("num_attention_heads", 12),
        Number("vocab_size", 50272, most=MAX_ROWS),
        Number("max_position_embeddings", 2048, most=MAX_ROWS),
        Number("word_embed_proj_dim", _hidden_width, null=_hidden_width),
        Choice("activation_function", "relu", ACTIVATIONS),
        Flag("do_layer_norm_before", True),
        Flag("_remove_final_layer_norm", False),
        Flag("enable_bias", True),
        Flag("layer_norm_elementwise_affine", True),
        Flag("tie_word_embeddings", True),
        pad_token(1),
        *(Fraction(name, 0.1 if name == "dropout" else 0.0) for name in ("dropout", "attention_dropout", "layerdrop")),
    ),
    _opt,
    _STACK,
    lambda values: heads_misfit(values) + pad_misfit(values),
    {
        "model_type": "opt",
        "hidden_size": 96,
        "ffn_dim": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "vocab_size": 128,
        "max_position_embeddings": 256,
        "word_embed_proj_dim": 96,
    },
)
