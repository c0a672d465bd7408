"""Ideas for few bits that mmq does not have, as patches of its quantizer; `bench/peers.py` measures them.

    python -m bench.peers --model demo-llava --bits 3 2 --methods gptq-asym gptq-asym-joint gptq-tokens gptq-magr

joint: scale and zero point of a group are searched together (NeUQI, arXiv 2505.17595), for every integer zero point.
tokens: GPTQ's Hessians weight each token by the squared gradient of the block's output error, whose weights are rounded
to nearest, with respect to the linear's output (VLMQ, arXiv 2508.03351). magr: the largest weights of each group shrink
where the inputs hardly see it (MagR, arXiv 2406.00800). docs/measurements/ideas.md has the figures.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from exporter.methods import autoround, gptq
from exporter.numerics import ranges
from exporter.numerics.quantized import Scheme, dequantize, quantize
from exporter.quantization.block import Block
from exporter.quantization.source_stream import with_weights

SHARE, TIMES = 0.99, 10.0  # a token weighs at most what this share of the tokens weigh, and this multiple of the mean
LEAST_WEIGHT = 0.02
MAGR_STEPS = 150


def joint_range(
    weight: Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    range_: ranges.Range = "minmax",
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ranges.fit_scale`, but of an asymmetric scheme every zero point with 40 scales each is tried."""
    if scheme.symmetric:
        return ranges.fit_scale(weight, scheme, dtype, range_, importance)
    parts = [_joint(part, scheme, dtype, importance) for part in weight.split(max(1, ranges.PIECE // weight.shape[1]))]
    return torch.cat([scale for scale, _ in parts]), torch.cat([zero for _, zero in parts])


def _joint(weight: Tensor, scheme: Scheme, dtype: torch.dtype, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    low, high = ranges.full_range(weight, scheme)
    grouped = ranges._grouped(weight, scheme)
    counts = None if importance is None else ranges._grouped(importance.unsqueeze(0), scheme)
    scale, zero = ranges.fit_scale(weight, scheme, dtype, "mse", importance)
    error = ranges._errors(grouped, scale, zero, scheme, counts)
    for point in range(scheme.levels + 1):
        below = -low / point if point else torch.zeros_like(low)
        above = high / (scheme.levels - point) if point < scheme.levels else torch.zeros_like(high)
        widest, points = torch.maximum(below, above), torch.full_like(zero, point)
        for step in range(ranges.SHRINK_STEPS):
            candidate = ranges._stored(widest * (1 - ranges.MAX_SHRINK * step / ranges.SHRINK_STEPS), dtype)
            candidate_error = ranges._errors(grouped, candidate, points, scheme, counts)
            better = candidate_error < error
            error, scale = torch.where(better, candidate_error, error), torch.where(better, candidate, scale)
            zero = torch.where(better, points, zero)
    return scale, zero


@contextmanager
def joint() -> Iterator[None]:
    """GPTQ and AutoRound start from joint ranges."""
    with mock.patch.object(gptq, "fit_scale", joint_range), mock.patch.object(autoround, "fit_scale", joint_range):
        yield


@contextmanager
def tokens() -> Iterator[None]:
    """Hessians with token weights from one backward pass of each block; of the batches as they enter the block."""
    original, known = Block._statistics, dict[str, dict[str, list[Tensor]]]()

    def statistics(self: Block, row: Any, correcting: Any) -> Any:
        if self.unit.block not in known:
            known.clear()
            known[self.unit.block] = _sensitivities(self)
        together = next(stack for stack in self._stacks() if row in stack)
        own = [entry.weights for entry in self.inputs]
        shares = [known[self.unit.block][other.module] for other in together]
        sums = [torch.stack(each).sum(0) for each in zip(*shares, strict=True)]
        for entry, weights in zip(self.inputs, _normalized(sums, own), strict=True):
            entry.weights = weights
        try:
            return original(self, row, correcting)
        finally:
            for entry, former in zip(self.inputs, own, strict=True):
                entry.weights = former

    with mock.patch.object(Block, "_statistics", statistics):
        yield


def _sensitivities(block: Block) -> dict[str, list[Tensor]]:
    """Module -> for each batch the squared gradient norm of every token, f32 `[batch, tokens]`."""
    io, device = block.io, block.io.device.torch_device
    modules = {row.module: io.stream.module(row.module) for row in block.unit.rows}
    full = {
        io.name_inside(block.unit.block, row.tensor.name): block.parameter(row.tensor.name) for row in block.unit.rows
    }
    rounded = {}
    for row in block.unit.rows:
        weight = block.parameter(row.tensor.name)
        assert row.scheme is not None
        scale, zero = ranges.fit_scale(weight.float(), row.scheme, torch.bfloat16, "mse")
        near = dequantize(quantize(weight.float(), scale, zero, row.scheme), scale, zero, row.scheme)
        rounded[io.name_inside(block.unit.block, row.tensor.name)] = near.to(weight.dtype)
    result: dict[str, list[Tensor]] = {name: [] for name in modules}
    for entry in block.inputs:
        with torch.no_grad():
            target = entry.call(with_weights(block.module, dict(full)), device)
        outputs: dict[str, Tensor] = {}
        handles = [module.register_forward_hook(_keep(outputs, name)) for name, module in modules.items()]
        with torch.enable_grad():
            output = entry.call(
                with_weights(block.module, {k: v.clone().requires_grad_() for k, v in rounded.items()}), device
            )
        for handle in handles:
            handle.remove()
        error = output.detach() - target
        if entry.weights is not None:
            error = error * entry.weights[:, -error.shape[-2] :].to(device).view(*error.shape[:-1], 1)
        output.backward(error.to(output.dtype))
        batch = 1 if entry.hidden.dim() == 2 else len(entry.hidden)
        rows = batch if entry.weights is None else len(entry.weights)
        for name, tensor in outputs.items():
            assert tensor.grad is not None
            result[name].append(tensor.grad.float().square().sum(-1).view(rows, -1).cpu())
    return result


def _keep(outputs: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        output.retain_grad()
        outputs[name] = output

    return hook


def _normalized(squares: list[Tensor], own: list[Tensor | None]) -> list[Tensor]:
    """Token weights of mean 1, clipped, times the weights that the batches have."""
    masks = [torch.ones_like(x) if w is None else w[:, -x.shape[1] :].cpu() for x, w in zip(squares, own, strict=True)]
    counted = torch.cat([x[mask > 0] for x, mask in zip(squares, masks, strict=True)])
    largest = min(float(torch.quantile(counted, SHARE)), TIMES * float(counted.mean()))
    mean = float(counted.clamp_max(largest).mean())
    result = []
    for x, weights, mask in zip(squares, own, masks, strict=True):
        share = (x.clamp_max(largest) / mean).clamp_min(LEAST_WEIGHT)
        whole = torch.ones_like(share) if weights is None else weights.cpu().clone()
        whole[:, -share.shape[1] :] = share * mask
        result.append(whole)
    return result


@contextmanager
def magr(penalty: float) -> Iterator[None]:
    """GPTQ of weights whose largest are shrunk. penalty: relative to the largest eigenvalue of the Hessian."""
    original = gptq.quantize_linear

    def shrunk(weight: Tensor, statistics: Any, scheme: Scheme, *more: Any) -> Any:
        return original(_shrunk(weight, statistics.hessian, scheme, penalty), statistics, scheme, *more)

    with mock.patch.object(gptq, "quantize_linear", shrunk):
        yield


def _shrunk(weight: Tensor, hessian: Tensor, scheme: Scheme, penalty: float) -> Tensor:
    """Proximal gradient steps on tr(D H D^T) / 2 + penalty times the largest weight of every group."""
    scaled = hessian / torch.linalg.eigvalsh(hessian)[-1]
    result = weight.clone()
    for _ in range(MAGR_STEPS):
        moved = ranges._grouped(result - (result - weight) @ scaled, scheme)
        result = (moved - _onto_ball(moved, penalty)).flatten(1)[:, : weight.shape[1]]
    return result


def _onto_ball(x: Tensor, radius: float) -> Tensor:
    """The nearest point of the l1 ball, along the last axis."""
    sizes = x.abs()
    ordered = sizes.sort(-1, descending=True).values
    excess = ordered.cumsum(-1) - radius
    counts = torch.arange(1, x.shape[-1] + 1, device=x.device)
    last = (ordered * counts > excess).sum(-1, keepdim=True).clamp_min(1)
    threshold = (excess.gather(-1, last - 1) / last).clamp_min(0)
    return x.sign() * (sizes - threshold).clamp_min(0)


ASYMMETRIC = {"symmetric": False}
SIGNED = {"options": {"range": "signed"}}
IDEAS: dict[str, tuple[dict[str, Any], Callable[[], AbstractContextManager[None]]]] = {
    "gptq-asym-joint": ({"method": "gptq", **ASYMMETRIC}, joint),
    "autoround-asym-joint": ({"method": "autoround", **ASYMMETRIC}, joint),
    "gptq-tokens": ({"method": "gptq", **SIGNED}, tokens),
    "gptq-magr": ({"method": "gptq", **SIGNED}, lambda: magr(1e-5)),
    "gptq-magr-more": ({"method": "gptq", **SIGNED}, lambda: magr(1e-4)),
}
