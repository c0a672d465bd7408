"""Vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pictures of any size, packed into one sequence of patches."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from exporter.files.strict_json import kind
from exporter.model.families.config_fields import MAX_BLOCKS, Choice, Field, Number, Values
from exporter.model.families.parts.part import (
    ACTIVATIONS,
    Part,
    Shapes,
    Smoothing,
    Stack,
    below,
    blocks,
    linear,
    norm,
)

MAX_NAMED = 8  # block numbers that a message has
_ATTENTION = ("attn.qkv", "attn.proj")
_FOLDS = (Smoothing("norm1", ("attn.qkv",)), Smoothing("attn.qkv", ("attn.proj",), rows=(2, 3)))


def _plain(first: str, second: str) -> Stack:
    """Blocks with a feed-forward of two linears around a GELU, which no fold crosses."""
    return Stack(
        path="blocks.{i}",
        phases=(("attn.qkv",), ("attn.proj",), (first,), (second,)),
        attention=_ATTENTION,
        row_parallel=("attn.proj", second),
        smoothings=(*_FOLDS, Smoothing("norm2", (first,))),
        count="depth",
        heads="num_heads",
    )


_WINDOW = Number("window_size", 112, most=2**14)  # side in pixels of the squares in which most blocks attend
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_GATED = replace(
    _plain("", "mlp.down_proj"),
    phases=(("attn.qkv",), ("attn.proj",), _GATE_UP, ("mlp.down_proj",)),
    smoothings=(*_FOLDS, Smoothing("norm2", _GATE_UP), Smoothing("mlp.up_proj", ("mlp.down_proj",))),
    fused={"mlp.gate_up_proj": _GATE_UP},
)


@dataclass(frozen=True)
class Taps:
    """The key that selects the blocks whose outputs are added to the text model's hidden states: a list of integers."""

    key: str = "deepstack_visual_indexes"
    default: tuple[int, ...] = (8, 16, 24)

    def of(self, values: Mapping[str, Any]) -> Any:
        """The list in `values`, or the default; `problem` tells whether it is a list."""
        return values.get(self.key, list(self.default))

    def problem(self, value: Any) -> str | None:
        """Why `value` does not select blocks, or None."""
        if isinstance(value, list) and all(type(entry) is int and 0 <= entry < MAX_BLOCKS for entry in value):
            ordered = value == sorted(set(value))
            return None if ordered else f"expected rising block numbers, got {value[:MAX_NAMED]}"
        return f"expected a list of block numbers, got {kind(value)}"


def _fields(width: int, act: str, patch: int, count: int = 32) -> tuple[Field, ...]:
    """Fields of all three, with the defaults of one class."""
    return (
        Number("hidden_size", width),
        Number("depth", count, most=MAX_BLOCKS),
        Number("num_heads", 16),
        Number("in_channels", 3, most=64),
        Number("patch_size", patch, most=2**10),
        Number("spatial_merge_size", 2, most=64),
        Number("temporal_patch_size", 2, most=64),
        Choice("hidden_act", act, ACTIVATIONS),
    )


def _misfits(width: str) -> Any:
    """A check that the heads divide the field `width` into heads whose quarters rotate with row and column."""

    def check(values: Values) -> list[str]:
        size, heads = values[width], values["num_heads"]
        if size % heads:
            return [f"num_heads: {heads} does not divide {width} {size}"]
        odd = f"num_heads: {heads} makes heads of {size // heads} values, which must be a multiple of 4"
        return [odd] if size // heads % 4 else []

    return check


def _window_misfits(values: Values) -> list[str]:
    """`_misfits` of the width, and a problem when a window holds no square of merged patches."""
    square, window = values["patch_size"] * values["spatial_merge_size"], values["window_size"]
    small = [f"window_size: {window} is less than patch_size x spatial_merge_size, {square}"] if window < square else []
    return [*_misfits("hidden_size")(values), *small]


def _tap_misfits(values: Values) -> list[str]:
    """`_misfits` of the width, and a problem when a selected block does not exist."""
    taps, depth = values[Taps.key], values["depth"]
    absent = [f"{Taps.key}: {taps[-1]}, but the vision tower has {depth} blocks"] if taps and taps[-1] >= depth else []
    return [*_misfits("hidden_size")(values), *absent]


def _patches(values: Values, width: int, bias: bool) -> Shapes:
    """Shapes of the patch embedding: a convolution over two frames."""
    patch = values["patch_size"]
    shape = (width, values["in_channels"], values["temporal_patch_size"], patch, patch)
    return {"patch_embed.proj.weight": shape} | ({"patch_embed.proj.bias": (width,)} if bias else {})


def _attention(width: int, bias: bool) -> Shapes:
    """Shapes of attention and norms of one block."""
    shapes = norm("norm1", width, bias) | norm("norm2", width, bias)
    return shapes | linear("attn.qkv", 3 * width, width) | linear("attn.proj", width, width)


def merged(values: Values, width: str = "hidden_size") -> int:
    """Width of the patches of one square, concatenated: the input of a merger."""
    return int(values[width]) * int(values["spatial_merge_size"]) ** 2


def _qwen2(values: Values) -> Shapes:
    width = values["embed_dim"]
    block = _attention(width, True) | linear("mlp.fc1", values["mlp_ratio"] * width, width)
    block |= linear("mlp.fc2", width, values["mlp_ratio"] * width)
    inside = merged(values, "embed_dim")
    merger = norm("ln_q", width) | linear("mlp.0", inside, inside) | linear("mlp.2", values["hidden_size"], inside)
    return _patches(values, width, False) | blocks("blocks", values["depth"], block) | below("merger", merger)


def _qwen25(values: Values) -> Shapes:
    width, feeds, inside = values["hidden_size"], values["intermediate_size"], merged(values)
    block = _attention(width, False) | linear("mlp.gate_proj", feeds, width) | linear("mlp.up_proj", feeds, width)
    block |= linear("mlp.down_proj", width, feeds)
    merger = norm("ln_q", width, False) | linear("mlp.0", inside, inside)
    merger |= linear("mlp.2", values["out_hidden_size"], inside)
    return _patches(values, width, False) | blocks("blocks", values["depth"], block) | below("merger", merger)


def _qwen3(values: Values) -> Shapes:
    width, feeds, inside = values["hidden_size"], values["intermediate_size"], merged(values)
    block = _attention(width, True) | linear("mlp.linear_fc1", feeds, width) | linear("mlp.linear_fc2", width, feeds)
    linears = linear("linear_fc1", inside, inside) | linear("linear_fc2", values["out_hidden_size"], inside)
    tensors = _patches(values, width, True) | {"pos_embed.weight": (values["num_position_embeddings"], width)}
    tensors |= blocks("blocks", values["depth"], block) | below("merger", norm("norm", width) | linears)
    taps = len(values["deepstack_visual_indexes"])
    return tensors | blocks("deepstack_merger_list", taps, norm("norm", inside) | linears)


_TINY = {"depth": 4, "num_heads": 2, "in_channels": 3, "patch_size": 4, "spatial_merge_size": 2}
_TINY |= {"temporal_patch_size": 2}

QWEN2 = Part(
    (*_fields(3584, "quick_gelu", 14), Number("embed_dim", 1280), Number("mlp_ratio", 4, most=64)),
    _qwen2,
    _plain("mlp.fc1", "mlp.fc2"),
    _misfits("embed_dim"),
    {"model_type": "qwen2_vl_vision", **_TINY, "embed_dim": 64, "hidden_size": 96, "mlp_ratio": 2},
)
QWEN25 = Part(
    (*_fields(3584, "silu", 14), Number("intermediate_size", 3420), Number("out_hidden_size", 3584), _WINDOW),
    _qwen25,
    _GATED,
    _window_misfits,
    {
        "model_type": "qwen2_5_vl_vision",
        **_TINY,
        "hidden_size": 64,
        "intermediate_size": 112,
        "out_hidden_size": 96,
        "window_size": 16,
        "fullatt_block_indexes": [1, 3],
    },
)
QWEN3 = Part(
    (
        *_fields(1152, "gelu_pytorch_tanh", 16, 27),
        Number("intermediate_size", 4304),
        Number("out_hidden_size", 3584),
        Number("num_position_embeddings", 2304, most=2**20),
        Taps(),
    ),
    _qwen3,
    _plain("mlp.linear_fc1", "mlp.linear_fc2"),
    _tap_misfits,
    {
        "model_type": "qwen3_vl_vision",
        **_TINY,
        "hidden_size": 64,
        "intermediate_size": 112,
        "out_hidden_size": 96,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [0, 2],
    },
)
