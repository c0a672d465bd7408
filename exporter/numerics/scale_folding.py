"""Scale folding: moves column scales from a linear into the module before it (AWQ, arXiv 2306.00978, 3.2).

When a module's output y feeds only linears, `W y = (W * s) (y / s)`: the columns of every target are multiplied by s,
and the module that computes y is divided by s. This can be the weight and bias of a norm, or output rows and bias of a
linear if everything in between is positively homogeneous: attention's weighted sum of values, a product with another
branch, ReLU; GELU is not. Several columns may read one output: grouped-query attention gives the values of one head to
a group of query heads, and a merger joins patches that one norm made. Their scales must be equal. The families list the
pairs that qualify (`Smoothing` in `families/parts/part.py`).

Existing tensors are not modified: modules get new parameters, in their own dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def fold(
    block: nn.Module, source: str, targets: Sequence[str], rows: tuple[int, int] | None, scales: Tensor
) -> tuple[Tensor, tuple[str, ...]]:
    """Fold `scales` f32 `[in]` (positive) between modules of `block`, named as in a `Smoothing`.

    rows: (index, parts), the part of a fused source that feeds the targets. Returns the scales as applied (see
    `fold_norm`) and the names of the source's changed parameters (`input_layernorm.weight`), which an artifact must
    store. ValueError when `misfit` returns a reason.
    """
    producer, consumers = block.get_submodule(source), [_linear(block, name) for name in targets]
    if reason := misfit(block, source, targets, rows):
        raise ValueError(reason)
    columns = tied(block, source, targets, rows, scales)
    repeats, width = _sharing(block, source, targets[0], rows)
    own = columns.view(-1, repeats, width)[:, 0].reshape(-1)
    if isinstance(producer, nn.Linear):
        scales = fold_rows(producer, part_of(producer, rows), consumers, own, columns)
    else:
        scales = fold_norm(producer, consumers, own, repeats)
    return scales, tuple(f"{source}.{name}" for name, _ in producer.named_parameters(recurse=False))


def misfit(block: nn.Module, source: str, targets: Sequence[str], rows: tuple[int, int] | None) -> str | None:
    """Why the pair cannot be folded in this model, or None.

    The numbers of values may differ if every output feeds the same number of columns.
    """
    for name in targets:
        repeats, width = _sharing(block, source, name, rows)
        outputs, inputs = _outputs(block, source, rows), _linear(block, name).in_features
        if outputs * repeats != inputs or outputs % width:
            return f"{source} has {outputs} outputs but {name} has {inputs} inputs"
    return None


def tied(block: nn.Module, source: str, targets: Sequence[str], rows: tuple[int, int] | None, scales: Tensor) -> Tensor:
    """Column scales f32 `[in]` of the targets that a fold can apply: equal where columns read the same output.

    Each set of such columns gets the geometric mean of its scales.
    """
    repeats, width = _sharing(block, source, targets[0], rows)
    if repeats == 1:
        return scales
    means = scales.view(-1, repeats, width).log().mean(1, keepdim=True).exp()
    return means.expand(-1, repeats, -1).reshape(-1)


def _sharing(block: nn.Module, source: str, target: str, rows: tuple[int, int] | None) -> tuple[int, int]:
    """How many columns of the target read one output of the source, and how many outputs lie between two of them.

    Attention repeats whole heads, whose width the source's module has as `head_dim`; a norm's outputs are repeated as a
    whole. (1, outputs) unless the number of columns is a multiple.
    """
    outputs, inputs = _outputs(block, source, rows), _linear(block, target).in_features
    width = outputs
    if isinstance(block.get_submodule(source), nn.Linear) and inputs != outputs:
        width = int(getattr(block.get_submodule(source.rpartition(".")[0]), "head_dim", 0))
    if not width or inputs % outputs:
        return 1, outputs
    return inputs // outputs, width


def _outputs(block: nn.Module, source: str, rows: tuple[int, int] | None) -> int:
    """Number of the source's outputs that feed the targets."""
    producer = block.get_submodule(source)
    if isinstance(producer, nn.Linear):
        part = part_of(producer, rows)
        return int(part.stop - part.start)
    return len(_parameter(producer, "weight"))


def part_of(source: nn.Linear, rows: tuple[int, int] | None) -> slice:
    """Output rows of part (index, parts) of a fused linear; all rows for None."""
    index, parts = rows or (0, 1)
    size = source.out_features // parts
    return slice(index * size, (index + 1) * size)


def fold_norm(norm: nn.Module, linears: Sequence[nn.Linear], scales: Tensor, repeats: int = 1) -> Tensor:
    """Divide a norm (`weight * normalized`, with or without bias: LayerNorm, RMSNorm) by `scales` `[in]`.

    repeats: how many times the norm's outputs follow each other in the linears' inputs.

    A 16-bit norm rounds the quotient. To make weight and columns cancel exactly, the linears are multiplied by the
    ratio of the old weight and the rounded one instead of `scales`; this ratio f32 `[in]` is returned. A channel whose
    quotient overflows or rounds to 0 keeps its weight: its scale is 1.
    """
    weight = _parameter(norm, "weight")
    _check(len(weight) * repeats, linears)
    wide = torch.promote_types(weight.dtype, torch.float32)
    scales = scales.to(weight.device, wide)
    stored = (weight.to(wide) / scales).to(weight.dtype).to(wide)
    lost = ~stored.isfinite() | ((stored == 0) & (weight != 0))
    scales, stored = torch.where(lost, 1.0, scales), torch.where(lost, weight.to(wide), stored)
    applied = torch.where(stored == 0, scales, weight.to(wide) / torch.where(stored == 0, 1.0, stored))
    _replace(norm, "weight", stored)
    if getattr(norm, "bias", None) is not None:
        _replace(norm, "bias", _parameter(norm, "bias").to(wide) / applied)
    columns = applied.repeat(repeats)
    _multiply_columns(linears, columns)
    return columns


def fold_rows(
    source: nn.Linear, rows: slice, targets: Sequence[nn.Linear], scales: Tensor, columns: Tensor | None = None
) -> Tensor:
    """Divide output rows and bias of `source` by `scales` `[rows]`, and multiply the columns of the targets.

    rows: all rows, or a part of a fused linear, for example the values' third of a qkv. columns: the scales of the
    targets' columns `[in]` if several columns read one row. Returns the scales of the columns.
    """
    columns = scales if columns is None else columns
    _check(len(columns), targets)
    wide = torch.promote_types(source.weight.dtype, torch.float32)
    scales = scales.to(source.weight.device, wide)
    weight = source.weight.detach().to(wide, copy=True)
    weight[rows] /= scales.unsqueeze(1)
    _replace(source, "weight", weight)
    if source.bias is not None:
        bias = source.bias.detach().to(wide, copy=True)
        bias[rows] /= scales
        _replace(source, "bias", bias)
    columns = columns.to(scales)
    _multiply_columns(targets, columns)
    return columns


def _check(outputs: int, linears: Sequence[nn.Linear]) -> None:
    for linear in linears:
        if linear.in_features != outputs:
            raise ValueError(f"a source with {outputs} outputs cannot feed a linear with {linear.in_features} inputs")


def _multiply_columns(linears: Sequence[nn.Linear], scales: Tensor) -> None:
    for linear in linears:
        _replace(linear, "weight", linear.weight.detach() * scales)


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    setattr(module, name, nn.Parameter(value.to(_parameter(module, name).dtype), requires_grad=False))


def _parameter(module: nn.Module, name: str) -> Tensor:
    parameter = getattr(module, name, None)
    if not isinstance(parameter, Tensor):
        raise ValueError(f"{type(module).__name__} has no parameter {name} to scale")
    return parameter.detach()


def _linear(block: nn.Module, name: str) -> nn.Linear:
    linear = block.get_submodule(name)
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"{name} is a {type(linear).__name__}, not a linear")
    return linear
