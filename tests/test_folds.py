"""Folds on blocks of real transformers classes: the block computes the same before and after."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from exporter.numerics.scale_folding import fold, fold_norm, fold_rows, misfit

HIDDEN, WIDE, HEADS, TOKENS = 24, 40, 3, 5
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def llama() -> nn.Module:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDE, "num_attention_heads": HEADS}
    config = LlamaConfig(**sizes, num_key_value_heads=HEADS, attention_bias=True, attn_implementation="eager")
    return LlamaDecoderLayer(config, 0)


def clip() -> nn.Module:
    from transformers import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDE, "num_attention_heads": HEADS}
    return CLIPEncoderLayer(CLIPVisionConfig(**sizes, attn_implementation="eager"))


def blip2_vision() -> nn.Module:
    from transformers import Blip2VisionConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2EncoderLayer

    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDE, "num_attention_heads": HEADS, "qkv_bias": True}
    return Blip2EncoderLayer(Blip2VisionConfig(**sizes, attn_implementation="eager"))


def qformer() -> nn.Module:
    from transformers import Blip2QFormerConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerLayer

    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDE, "num_attention_heads": HEADS, "encoder_hidden_size": 32}
    return Blip2QFormerLayer(Blip2QFormerConfig(**sizes, attn_implementation="eager"), 0)


def opt() -> nn.Module:
    from transformers import OPTConfig
    from transformers.models.opt.modeling_opt import OPTDecoderLayer

    sizes = {"hidden_size": HIDDEN, "ffn_dim": WIDE, "num_attention_heads": HEADS, "activation_function": "relu"}
    return OPTDecoderLayer(OPTConfig(**sizes, attn_implementation="eager"), 0)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "clip": clip,
    "blip2_vision": blip2_vision,
    "qformer": qformer,
    "opt": opt,
}
FOLDS: list[tuple[str, str, tuple[str, ...], tuple[int, int] | None]] = [
    ("llama", "input_layernorm", QKV, None),
    ("llama", "self_attn.v_proj", ("self_attn.o_proj",), None),
    ("llama", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), None),
    ("llama", "mlp.up_proj", ("mlp.down_proj",), None),
    ("clip", "layer_norm1", QKV, None),
    ("clip", "self_attn.v_proj", ("self_attn.out_proj",), None),
    ("clip", "layer_norm2", ("mlp.fc1",), None),
    ("blip2_vision", "layer_norm1", ("self_attn.qkv",), None),
    ("blip2_vision", "self_attn.qkv", ("self_attn.projection",), (2, 3)),
    ("blip2_vision", "layer_norm2", ("mlp.fc1",), None),
    ("qformer", "attention.attention.value", ("attention.output.dense",), None),
    ("qformer", "crossattention.attention.value", ("crossattention.output.dense",), None),
    ("opt", "self_attn_layer_norm", QKV, None),
    ("opt", "self_attn.v_proj", ("self_attn.out_proj",), None),
    ("opt", "final_layer_norm", ("fc1",), None),
    ("opt", "fc1", ("fc2",), None),
]
every_fold = pytest.mark.parametrize(("name", "source", "targets", "rows"), FOLDS, ids=lambda value: str(value))


@torch.no_grad()
def make(name: str, dtype: torch.dtype) -> nn.Module:
    """A block whose norms and biases are not 1 and 0."""
    generator = torch.Generator().manual_seed(0)
    block = BLOCKS[name]().eval()
    for parameter in block.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.ndim == 1))
    return block.to(dtype)


@torch.no_grad()
def output(name: str, block: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, TOKENS, HIDDEN, generator=generator).to(dtype)
    extra: dict[str, Any] = {}
    if name == "llama":
        angles = torch.rand(1, TOKENS, HIDDEN // HEADS, generator=generator).to(dtype)
        extra["position_embeddings"] = (angles.cos(), angles.sin())
    if name == "qformer":
        extra = {"encoder_hidden_states": torch.randn(2, 7, 32, generator=generator).to(dtype), "query_length": TOKENS}
    if name in ("clip", "opt"):
        extra["attention_mask"] = None
    result = block(x, **extra)
    return result[0] if isinstance(result, tuple) else result


def width_of(block: nn.Module, targets: tuple[str, ...]) -> int:
    return block.get_submodule(targets[0]).in_features  # type: ignore[return-value]


def scales_for(width: int) -> torch.Tensor:
    return torch.logspace(-1.5, 1, width)[torch.randperm(width, generator=torch.Generator().manual_seed(2))]


@every_fold
def test_powers_of_two_change_no_bit(
    name: str, source: str, targets: tuple[str, ...], rows: tuple[int, int] | None
) -> None:
    block = make(name, torch.float32)
    folded = copy.deepcopy(block)
    scales = 2.0 ** (torch.arange(width_of(block, targets)) % 7 - 3)
    applied, changed = fold(folded, source, targets, rows, scales)
    assert torch.equal(applied, scales)
    assert torch.equal(output(name, folded, torch.float32), output(name, block, torch.float32))
    before, after = dict(block.named_parameters()), dict(folded.named_parameters())
    different = {key for key in before if not torch.equal(before[key], after[key])}
    assert different == {*changed, *(f"{target}.weight" for target in targets)}


@every_fold
def test_any_scales_keep_the_output(
    name: str, source: str, targets: tuple[str, ...], rows: tuple[int, int] | None
) -> None:
    block = make(name, torch.float64)
    before = output(name, block, torch.float64)
    fold(block, source, targets, rows, scales_for(width_of(block, targets)))
    torch.testing.assert_close(output(name, block, torch.float64), before, rtol=1e-12, atol=1e-12)


@every_fold
def test_both_sides_are_scaled(name: str, source: str, targets: tuple[str, ...], rows: tuple[int, int] | None) -> None:
    """A fold that did nothing would pass the other two."""
    block = make(name, torch.float64)
    column = block.get_submodule(targets[-1]).weight.detach().clone()
    scales = scales_for(width_of(block, targets))
    fold(block, source, targets, rows, scales)
    torch.testing.assert_close(block.get_submodule(targets[-1]).weight.detach(), column * scales.double())


def test_gelu_in_between_prevents_a_fold() -> None:
    block = make("clip", torch.float64)
    before = output("clip", block, torch.float64)
    fold(block, "mlp.fc1", ("mlp.fc2",), None, scales_for(WIDE))
    assert float((output("clip", block, torch.float64) - before).abs().max()) > 1e-2


def test_other_thirds_of_a_fused_linear_stay() -> None:
    block = make("blip2_vision", torch.float32)
    before = block.self_attn.qkv.weight.detach().clone()
    fold(block, "self_attn.qkv", ("self_attn.projection",), (2, 3), scales_for(HIDDEN))
    after = block.self_attn.qkv.weight.detach()
    assert torch.equal(after[: 2 * HIDDEN], before[: 2 * HIDDEN])
    assert not (after[2 * HIDDEN :] == before[2 * HIDDEN :]).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_columns_compensate_a_rounded_norm(dtype: torch.dtype) -> None:
    norm, linear = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 7)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.4, 2, HIDDEN).to(dtype))
        norm.weight[3] = 0  # a column that never varies
        norm.bias.copy_(torch.linspace(-3, 3, HIDDEN).to(dtype))
    block = nn.ModuleDict({"norm": norm.to(dtype), "linear": linear.double()})
    before_norm, before_columns = norm.weight.detach().double(), linear.weight.detach().clone()
    before_bias = norm.bias.detach().double()
    applied, changed = fold(block, "norm", ("linear",), None, scales_for(HIDDEN))
    assert torch.equal(norm.bias, (before_bias / applied).to(dtype))  # by what the columns got, not what was asked for
    after = norm.weight.detach().double() * linear.weight.detach()
    torch.testing.assert_close(after, before_norm * before_columns, rtol=1e-6, atol=0)
    assert norm.weight.dtype == dtype
    assert changed == ("norm.weight", "norm.bias")
    torch.testing.assert_close(applied.double(), scales_for(HIDDEN).double(), rtol=2e-2, atol=0)
    assert not torch.equal(applied, scales_for(HIDDEN))


def test_a_channel_whose_quotient_float16_cannot_hold_keeps_its_weight() -> None:
    norm, linear = nn.LayerNorm(4).half(), nn.Linear(4, 2)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([8.0, 2e-4, 1.0, 0.0]))
    weights, columns = norm.weight.detach().clone(), linear.weight.detach().clone()
    block = nn.ModuleDict({"norm": norm, "linear": linear})
    applied, _ = fold(block, "norm", ("linear",), None, torch.tensor([1e-4, 1e4, 2.0, 3.0]))
    assert applied.tolist() == [1, 1, 2, 3]
    assert torch.equal(norm.weight, weights / torch.tensor([1, 1, 2, 1]).half())
    assert torch.equal(linear.weight, columns * applied)


def test_shared_storage_is_not_modified() -> None:
    source, target = nn.Linear(4, 6), nn.Linear(6, 3)
    tensors = [source.weight.detach(), source.bias.detach(), target.weight.detach()]
    copies = [tensor.clone() for tensor in tensors]
    fold_rows(source, slice(0, 6), [target], torch.full((6,), 2.0))
    assert all(torch.equal(tensor, copied) for tensor, copied in zip(tensors, copies, strict=True))
    assert torch.equal(target.weight, copies[2] * 2)
    assert torch.equal(source.bias, copies[1] / 2)


def test_pairs_with_different_sizes_are_refused_by_name() -> None:
    values, out = nn.Linear(HIDDEN, 8), nn.Linear(HIDDEN, HIDDEN)  # one value head for three query heads
    block = nn.ModuleDict({"v_proj": values, "o_proj": out, "norm": nn.LayerNorm(HIDDEN)})
    assert misfit(block, "v_proj", ("o_proj",), None) == f"v_proj has 8 outputs but o_proj has {HIDDEN} inputs"
    assert misfit(block, "norm", ("o_proj", "v_proj"), None) is None
    before = out.weight.detach().clone()
    with pytest.raises(ValueError, match="v_proj has 8 outputs"):
        fold(block, "v_proj", ("o_proj",), None, torch.full((8,), 2.0))
    assert torch.equal(out.weight, before)
    with pytest.raises(ValueError, match="not a linear"):
        fold(block, "v_proj", ("norm",), None, torch.ones(8))
    with pytest.raises(ValueError, match="no parameter weight"):
        misfit(nn.ModuleDict({"act": nn.ReLU(), "o_proj": out}), "act", ("o_proj",), None)


def test_scales_of_another_number_of_columns_change_nothing() -> None:
    source, target, norm = nn.Linear(4, 8), nn.Linear(6, 3), nn.LayerNorm(8)
    before = [tensor.detach().clone() for layer in (source, target, norm) for tensor in layer.parameters()]
    with pytest.raises(ValueError, match="8 outputs cannot feed a linear with 6 inputs"):
        fold_rows(source, slice(0, 8), [target], torch.full((8,), 2.0))
    with pytest.raises(ValueError, match="8 outputs cannot feed a linear with 6 inputs"):
        fold_norm(norm, [target], torch.full((8,), 2.0))
    after = [tensor for layer in (source, target, norm) for tensor in layer.parameters()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
