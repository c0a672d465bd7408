"""Text models: Llama and its relatives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from exporter.files.strict_json import kind
from exporter.model.families.config_fields import (
    MAX_BLOCKS,
    MAX_ROWS,
    Choice,
    Field,
    Flag,
    Fraction,
    Number,
    PositiveNumber,
    Section,
    Values,
)
from exporter.model.families.parts.part import (
    ACTIVATIONS,
    Part,
    Shapes,
    Smoothing,
    Stack,
    blocks,
    linear,
    norm,
    pad_misfit,
    pad_token,
)

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DECODER = Stack(
    path="layers.{i}",
    phases=(_QKV, ("self_attn.o_proj",), _GATE_UP, ("mlp.down_proj",)),
    attention=(*_QKV, "self_attn.o_proj"),
    row_parallel=("self_attn.o_proj", "mlp.down_proj"),
    smoothings=(
        Smoothing("input_layernorm", _QKV),
        Smoothing("self_attn.v_proj", ("self_attn.o_proj",)),
        Smoothing("post_attention_layernorm", _GATE_UP),
        Smoothing("mlp.up_proj", ("mlp.down_proj",)),
    ),
    fused={"self_attn.qkv_proj": _QKV, "mlp.gate_up_proj": _GATE_UP},
)
# Odd sizes: in != out, and 96 is not a multiple of 64.
_TINY = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 3}
_TINY |= {"num_key_value_heads": 3, "vocab_size": 128, "max_position_embeddings": 1024}
_GROUPED = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
_ROPE = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
_ROPES = {"rope_type": _ROPE, "type": _ROPE}
_ROPE_NUMBERS = (
    "rope_theta",
    "factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
)


def _fields(vocabulary: int, feeds: int, positions: int, heads: Number, head: Number) -> tuple[Field, ...]:
    """Fields of Llama-like models with the defaults of one class. heads: of keys and values. head: width of a head."""
    return (
        Number("hidden_size", 4096),
        Number("intermediate_size", feeds, most=2**20),
        Number("num_hidden_layers", 32, most=MAX_BLOCKS),
        Number("num_attention_heads", 32),
        heads,
        head,
        Number("vocab_size", vocabulary, most=MAX_ROWS),
        Number("max_position_embeddings", positions, most=MAX_ROWS),
        Choice("hidden_act", "silu", ACTIVATIONS),
        Flag("tie_word_embeddings", False),
        BlockKinds(),
        pad_token(0),
        Fraction("attention_dropout", 0.0),
        PositiveNumber("rope_theta"),
        Section("rope_parameters", null=True, kinds=_ROPES, numbers=_ROPE_NUMBERS),
        Section("rope_scaling", null=True, kinds=_ROPES, numbers=_ROPE_NUMBERS),
    )


@dataclass(frozen=True)
class BlockKinds:
    """The key that selects blocks with full or sliding-window attention; None: other fields determine it."""

    key: str = "layer_types"
    options: tuple[str, ...] = ("full_attention", "sliding_attention")

    def of(self, values: Values) -> Any:
        """The list in `values`, or None."""
        return values.get(self.key)

    def problem(self, value: Any) -> str | None:
        """Why `value` is not a list of kinds, or None."""
        if value is None or (isinstance(value, list) and all(entry in self.options for entry in value)):
            return None
        return f"expected a list of {' and '.join(self.options)}, got {kind(value)}"


def _misfits(values: Values) -> list[str]:
    heads, shared, kinds = values["num_attention_heads"], values["num_key_value_heads"], values["layer_types"]
    problems = [f"num_key_value_heads: {shared} does not divide num_attention_heads {heads}"] if heads % shared else []
    problems += [f"head_dim: {values['head_dim']} is odd"] if values["head_dim"] % 2 else []
    count = values["num_hidden_layers"]
    problems += pad_misfit(values)
    wrong_count = bool(kinds) and len(kinds) != count
    problems += [f"layer_types: {len(kinds)} entries for {count} blocks"] if wrong_count else []
    return problems + _kinds_misfits(values)


def _kinds_misfits(values: Values) -> list[str]:
    """A problem when blocks are to have a window and the text model has none, or has it in all blocks."""
    named = set(values["layer_types"] or ())
    window = values.get("sliding_window", MAX_ROWS) < MAX_ROWS
    if "use_sliding_window" in values:  # the Qwens, which read the kinds
        given = window and values["use_sliding_window"]
        needs = "sliding_attention needs `use_sliding_window: true` and a number as `sliding_window`"
        return [f"layer_types: {needs}"] if "sliding_attention" in named and not given else []
    only = "sliding_attention" if window else "full_attention"
    ignored = "transformers ignores it for this text model, and vLLM does not"
    return [f"layer_types: every block has {only}, and {ignored}: remove it"] if named - {only} else []


def _decoder(values: Values, query_bias: bool, output_bias: bool, mlp_bias: bool, head_norms: bool) -> Shapes:
    """Shapes of a decoder with Llama's names; the flags are the differences between models."""
    width, feeds, head = values["hidden_size"], values["intermediate_size"], values["head_dim"]
    queries, shared = values["num_attention_heads"] * head, values["num_key_value_heads"] * head
    block = linear("self_attn.q_proj", queries, width, query_bias)
    block |= linear("self_attn.k_proj", shared, width, query_bias)
    block |= linear("self_attn.v_proj", shared, width, query_bias)
    block |= linear("self_attn.o_proj", width, queries, output_bias)
    if head_norms:
        block |= norm("self_attn.q_norm", head, False) | norm("self_attn.k_norm", head, False)
    block |= linear("mlp.gate_proj", feeds, width, mlp_bias) | linear("mlp.up_proj", feeds, width, mlp_bias)
    block |= linear("mlp.down_proj", width, feeds, mlp_bias)
    block |= norm("input_layernorm", width, False) | norm("post_attention_layernorm", width, False)
    tensors: Shapes = {"embed_tokens.weight": (values["vocab_size"], width)}
    return tensors | blocks("layers", values["num_hidden_layers"], block) | norm("norm", width, False)


def _llama(values: Values) -> Shapes:
    bias = values["attention_bias"]
    return _decoder(values, bias, bias, values["mlp_bias"], head_norms=False)


def _qwen2(values: Values) -> Shapes:
    return _decoder(values, True, False, False, head_norms=False)


def _qwen3(values: Values) -> Shapes:
    bias = values["attention_bias"]
    return _decoder(values, bias, bias, mlp_bias=False, head_norms=True)


def _query_heads(values: Values) -> int:
    return int(values["num_attention_heads"])


def _head_width(values: Values) -> int:
    return int(values["hidden_size"]) // int(values["num_attention_heads"])


_HEAD = Number("head_dim", _head_width, most=2**12, null=_head_width)
_BIAS = Flag("attention_bias", False)
_WINDOW = Number("sliding_window", 4096, most=MAX_ROWS, null=lambda values: MAX_ROWS)
_WINDOWS = (Flag("use_sliding_window", False), _WINDOW, Number("max_window_layers", 28, least=0, most=MAX_BLOCKS))


def _shared(default: int) -> Number:
    """The field of key and value heads; null means as many as query heads."""
    return Number("num_key_value_heads", default, null=_query_heads)


LLAMA = Part(
    (
        *_fields(32000, 11008, 2048, Number("num_key_value_heads", _query_heads, null=_query_heads), _HEAD),
        _BIAS,
        Flag("mlp_bias", False),
    ),
    _llama,
    DECODER,
    _misfits,
    {"model_type": "llama", **_TINY},
)
MISTRAL = Part(
    (*_fields(32000, 14336, 131072, _shared(8), _HEAD), _WINDOW),
    lambda values: _decoder(values, False, False, False, head_norms=False),
    DECODER,
    _misfits,
    {"model_type": "mistral", **_TINY, **_GROUPED},
)
QWEN2 = Part(
    (*_fields(151936, 22016, 32768, _shared(32), _HEAD), *_WINDOWS),
    _qwen2,
    DECODER,
    _misfits,
    {"model_type": "qwen2", **_TINY, **_GROUPED},
)
QWEN3 = Part(
    (*_fields(151936, 22016, 32768, _shared(32), Number("head_dim", 128, most=2**12)), _BIAS, *_WINDOWS),
    _qwen3,
    DECODER,
    _misfits,
    {"model_type": "qwen3", **_TINY, **_GROUPED},
)


def _changed(fields: tuple[Field, ...], *others: Field) -> tuple[Field, ...]:
    """The fields with some of them replaced by others of the same key."""
    by_key = {other.key: other for other in others}
    return tuple(by_key.get(field.key, field) for field in fields)


_POSITIONS = {"rope_type": (*_ROPE, "mrope"), "type": (*_ROPE, "mrope")}  # one position each for time, row and column
_AXES = (
    Section("rope_parameters", null=True, kinds=_POSITIONS, numbers=_ROPE_NUMBERS),
    Section("rope_scaling", null=True, kinds=_POSITIONS, numbers=_ROPE_NUMBERS),
)


def _axes_misfits(default: list[int]) -> Callable[[Values], list[str]]:
    """`_misfits`, and a problem when the frequencies of time, row and column are not those of half a head."""

    def check(values: Values) -> list[str]:
        rope = values["rope_scaling"] or values["rope_parameters"] or {}
        axes = rope.get("mrope_section", default)
        width = int(values["head_dim"] * rope.get("partial_rotary_factor", 1.0)) // 2
        whole = isinstance(axes, list) and len(axes) == 3 and all(type(axis) is int and axis >= 0 for axis in axes)
        if whole and sum(axes) == width:
            return _misfits(values)
        problem = f"mrope_section: expected three numbers whose sum is {width}, half the width of a head, got {axes}"
        return [*_misfits(values), problem]

    return check


QWEN2_VL = Part(
    _changed(
        QWEN2.fields,
        Number("hidden_size", 8192),
        Number("intermediate_size", 29568, most=2**20),
        Number("num_hidden_layers", 80, most=MAX_BLOCKS),
        Number("num_attention_heads", 64),
        _shared(8),
        Number("vocab_size", 152064, most=MAX_ROWS),
        Number("max_window_layers", 80, least=0, most=MAX_BLOCKS),
        *_AXES,
    ),
    _qwen2,
    DECODER,
    _axes_misfits([16, 24, 24]),
    {
        "model_type": "qwen2_5_vl_text",
        **_TINY,
        **_GROUPED,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    },
)
QWEN3_VL = Part(
    (
        *_changed(
            _fields(151936, 22016, 128000, _shared(32), Number("head_dim", 128, most=2**12)),
            *_AXES,
        ),
        _BIAS,
    ),
    _qwen3,
    DECODER,
    _axes_misfits([24, 20, 20]),
    {
        "model_type": "qwen3_vl_text",
        **_TINY,
        **_GROUPED,
        "num_hidden_layers": 3,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 3, 3],
            "mrope_interleaved": True,
        },
    },
)
