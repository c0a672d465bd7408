"""Scale folding: move column scales into the preceding module without changing a block's output (AWQ, 2306.00978, 3.2).

If a module's output y feeds only linear layers, `W y = (W * s) (y / s)`: the columns of every target are multiplied by
s, and the producer of y is divided by s. The producer is the weight and bias of a norm, or output rows and bias of a
linear layer, if everything in between is positively homogeneous: attention's weighted sum of values, a product with
another branch, ReLU. GELU is not. The family lists the pairs (`Smoothing` in `families/family.py`).

Modules get new parameters in their own dtype; existing storage is not modified.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def fold(
    block: nn.Module, source: str, targets: Sequence[str], rows: tuple[int, int] | None, scales: Tensor
) -> tuple[Tensor, tuple[str, ...]]:
    """Fold `scales` f32 `[in]` (positive) between modules of `block`, named as in a `Smoothing`.

    rows: (index, parts), the part of a fused source that feeds the targets. Returns the applied scales (see
    `fold_norm`) and the names of the changed source parameters (`input_layernorm.weight`), which an artifact must
    store. Raises ValueError when `misfit` has a reason.
    """
    producer, consumers = block.get_submodule(source), [_linear(block, name) for name in targets]
    if isinstance(producer, nn.Linear):
        scales = fold_rows(producer, part_of(producer, rows), consumers, scales)
    else:
        scales = fold_norm(producer, consumers, scales)
    return scales, tuple(f"{source}.{name}" for name, _ in producer.named_parameters(recurse=False))


def misfit(block: nn.Module, source: str, targets: Sequence[str], rows: tuple[int, int] | None) -> str | None:
    """Why the pair cannot be folded in this model (grouped-query attention repeats its values), or None."""
    producer = block.get_submodule(source)
    if isinstance(producer, nn.Linear):
        part = part_of(producer, rows)
        outputs = part.stop - part.start
    else:
        outputs = len(_parameter(producer, "weight"))
    for name in targets:
        inputs = _linear(block, name).in_features
        if inputs != outputs:
            return f"{source} has {outputs} outputs and {name} has {inputs} inputs"
    return None


def part_of(source: nn.Linear, rows: tuple[int, int] | None) -> slice:
    """Output rows of part (index, parts) of a fused linear layer; all rows for None."""
    index, parts = rows or (0, 1)
    size = source.out_features // parts
    return slice(index * size, (index + 1) * size)


def fold_norm(norm: nn.Module, linears: Sequence[nn.Linear], scales: Tensor) -> Tensor:
    """Divide a norm (`weight * normalized`, with or without bias: LayerNorm, RMSNorm) by `scales` `[in]`.

    A 16-bit norm rounds its new weight. The linear layers are therefore multiplied by old weight / rounded weight
    instead of `scales`, so that both still cancel; this quotient, f32 `[in]`, is returned. A channel whose new weight
    overflows or rounds to 0 in the norm's dtype keeps its weight, and its scale is 1.
    """
    weight = _parameter(norm, "weight")
    _check(len(weight), linears)
    wide = torch.promote_types(weight.dtype, torch.float32)
    scales = scales.to(weight.device, wide)
    stored = (weight.to(wide) / scales).to(weight.dtype).to(wide)
    lost = ~stored.isfinite() | ((stored == 0) & (weight != 0))
    scales, stored = torch.where(lost, 1.0, scales), torch.where(lost, weight.to(wide), stored)
    applied = torch.where(stored == 0, scales, weight.to(wide) / torch.where(stored == 0, 1.0, stored))
    _replace(norm, "weight", stored)
    if getattr(norm, "bias", None) is not None:
        _replace(norm, "bias", _parameter(norm, "bias").to(wide) / applied)
    _multiply_columns(linears, applied)
    return applied


def fold_linear(source: nn.Linear, targets: Sequence[nn.Linear], scales: Tensor) -> Tensor:
    """Divide all output rows and the bias of `source` by `scales` `[out]` (the targets' `[in]`); returns `scales`."""
    return fold_rows(source, slice(0, source.out_features), targets, scales)


def fold_rows(source: nn.Linear, rows: slice, targets: Sequence[nn.Linear], scales: Tensor) -> Tensor:
    """`fold_linear` for a slice of rows of a fused linear layer, for instance the values of a qkv projection."""
    _check(rows.stop - rows.start, targets)
    wide = torch.promote_types(source.weight.dtype, torch.float32)
    scales = scales.to(source.weight.device, wide)
    weight = source.weight.detach().to(wide, copy=True)
    weight[rows] /= scales.unsqueeze(1)
    _replace(source, "weight", weight)
    if source.bias is not None:
        bias = source.bias.detach().to(wide, copy=True)
        bias[rows] /= scales
        _replace(source, "bias", bias)
    _multiply_columns(targets, scales)
    return scales


def _check(outputs: int, linears: Sequence[nn.Linear]) -> None:
    for linear in linears:
        if linear.in_features != outputs:
            raise ValueError(f"a source of {outputs} outputs cannot feed a linear of {linear.in_features} inputs")


def _multiply_columns(linears: Sequence[nn.Linear], scales: Tensor) -> None:
    for linear in linears:
        _replace(linear, "weight", linear.weight.detach() * scales)


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    setattr(module, name, nn.Parameter(value.to(_parameter(module, name).dtype), requires_grad=False))


def _parameter(module: nn.Module, name: str) -> Tensor:
    parameter = getattr(module, name, None)
    if not isinstance(parameter, Tensor):
        raise ValueError(f"{type(module).__name__} has no {name} to scale")
    return parameter.detach()


def _linear(block: nn.Module, name: str) -> nn.Linear:
    linear = block.get_submodule(name)
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"{name} is a {type(linear).__name__}, not a linear")
    return linear
