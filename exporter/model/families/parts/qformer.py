"""BLIP-2's Q-Former: BERT blocks of which every n-th attends to the picture."""

from exporter.model.families.config_fields import MAX_BLOCKS, MAX_ROWS, Choice, Flag, Fraction, Number, Values
from exporter.model.families.parts.part import (
    ACTIVATIONS,
    Part,
    Shapes,
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
    lambda values: heads_misfit(values) + pad_misfit(values),
)
