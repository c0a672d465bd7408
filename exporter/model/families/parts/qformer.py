"""BLIP-2's Q-Former: BERT blocks of which every n-th attends to the picture."""

from exporter.model.families.config_fields import MAX_BLOCKS, MAX_ROWS, Choice, Flag, Fraction, Number, Values
from exporter.model.families.parts.part import (
    ACTIVATIONS,
    Part,
    Shapes,
    Smoothing,
    Stack,
    below,
    heads_misfit,
    linear,
    norm,
    pad_misfit,
    pad_token,
)


def _attention(width: int, inputs: int) -> Shapes:
    """Shapes of one attention whose keys and values have `inputs` inputs."""
    shapes = linear("attention.query", width, width)
    shapes |= linear("attention.key", width, inputs) | linear("attention.value", width, inputs)
    return shapes | linear("output.dense", width, width) | norm("output.LayerNorm", width)


def _feed_forward(suffix: str, width: int, feeds: int) -> Shapes:
    inside = linear(f"intermediate{suffix}.dense", feeds, width) | linear(f"output{suffix}.dense", width, feeds)
    return inside | norm(f"output{suffix}.LayerNorm", width)


def _shapes(values: Values) -> Shapes:
    width, feeds = values["hidden_size"], values["intermediate_size"]
    tensors = norm("layernorm", width)
    for i in range(values["num_hidden_layers"]):
        block = below("attention", _attention(width, width))
        if i % values["cross_attention_frequency"] == 0:
            block |= below("crossattention", _attention(width, values["encoder_hidden_size"]))
        if values["use_qformer_text_input"]:
            block |= _feed_forward("", width, feeds)
        tensors |= below(f"encoder.layer.{i}", block | _feed_forward("_query", width, feeds))
    return tensors


_QKV = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
CROSS = ("crossattention.attention.key", "crossattention.attention.value")  # their input is the picture's features
QUERIES = (  # linears that see only the queries, which have no padding
    "crossattention.attention.query",
    "crossattention.output.dense",
    "intermediate_query.dense",
    "output_query.dense",
)
_STACK = Stack(
    path="encoder.layer.{i}",
    phases=(
        _QKV,
        ("attention.output.dense",),
        ("crossattention.attention.query",),
        CROSS,
        ("crossattention.output.dense",),
        ("intermediate_query.dense",),
        ("output_query.dense",),
        ("intermediate.dense",),
        ("output.dense",),
    ),
    attention=(
        *_QKV,
        "attention.output.dense",
        *CROSS,
        "crossattention.attention.query",
        "crossattention.output.dense",
    ),
    row_parallel=("attention.output.dense", "crossattention.output.dense", "output_query.dense", "output.dense"),
    smoothings=(  # norms cannot be folded: each follows a residual sum and feeds both the next linear and the next sum
        Smoothing("attention.attention.value", ("attention.output.dense",)),
        Smoothing("crossattention.attention.value", ("crossattention.output.dense",)),
    ),
)

QFORMER = Part(
    (
        Number("hidden_size", 768),
        Number("intermediate_size", 3072),
        Number("num_hidden_layers", 12, most=MAX_BLOCKS),
        Number("num_attention_heads", 12),
        Number("cross_attention_frequency", 2, most=MAX_BLOCKS),
        Number("encoder_hidden_size", 1408),
        Number("vocab_size", 30522, most=MAX_ROWS),
        Number("max_position_embeddings", 512, most=MAX_ROWS),
        Choice("hidden_act", "gelu", ACTIVATIONS),
        Flag("use_qformer_text_input", False),
        pad_token(0),
        Fraction("hidden_dropout_prob", 0.1),
        Fraction("attention_probs_dropout_prob", 0.1),
    ),
    _shapes,
    _STACK,
    lambda values: heads_misfit(values) + pad_misfit(values),
    {
        "model_type": "blip_2_qformer",
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "encoder_hidden_size": 64,
        "cross_attention_frequency": 2,
        "vocab_size": 128,
    },
)
