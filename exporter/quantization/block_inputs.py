"""The input of the next block for every calibration batch, and how much each of its tokens counts.

Tokens whose hidden states are not finite (float16 overflows on some pictures) are set to zero and count nothing from
there on, so that attention does not spread them; a job in which too many do so stops.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from exporter.errors import CalibrationError
from exporter.inference.encoding import Batch
from exporter.inference.forward_hooks import first_output, run_until_stopped
from exporter.quantization.block_calls import BlockCall, ChainInput

MOST_EXCLUDED = 0.1  # share of the tokens that may be excluded before the job stops


@dataclass
class Cleaning:
    """Zeros in place of tokens that are not finite, wherever they appear upstream of a component for one batch.

    damaged, tokens: how many were not finite where most of them were, and how many there were in all.
    """

    damaged: int = 0
    tokens: int = 0

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A block's `forward` between cleaned hidden states."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if args:
                output = forward(self._clean(args[0]), *args[1:], **kwargs)
            else:
                output = forward(**kwargs | {"hidden_states": self._clean(kwargs["hidden_states"])})
            return (self._clean(output[0]), *output[1:]) if isinstance(output, tuple) else self._clean(output)

        return run

    def _clean(self, hidden: Tensor) -> Tensor:
        finite = torch.isfinite(hidden).all(-1)
        damaged = int((~finite).sum())
        if damaged > self.damaged:
            self.damaged, self.tokens = damaged, finite.numel()
        return cleaned(hidden) if damaged else hidden


@dataclass
class BlockInputs:
    """The input of the next block for one batch.

    hidden: `[batch, tokens, width]`, or `[tokens, width]` where a model packs its pictures. calls: the other arguments
    of the next block and of those after it.
    weights: f32 `[batch, tokens]` (a batch of 1 for packed pictures), how much each token counts: 0 for padding and for
    tokens that were not finite; None when all count the same.
    tokens: how many counted at first. excluded: how many of them were not finite since. noted: of how many of these a
    note tells. upstream: what was cleaned before the first block.
    """

    hidden: Tensor
    calls: tuple[BlockCall, ...]
    weights: Tensor | None
    upstream: Cleaning
    tokens: int
    excluded: int = 0
    noted: int = 0

    @classmethod
    def enter(
        cls, entered: ChainInput, weights: Tensor | None, store: torch.device, upstream: Cleaning | None = None
    ) -> "BlockInputs":
        """The input of a component's first block, kept on `store`."""
        counted = entered.hidden.shape[:-1].numel() if weights is None else int((weights > 0).sum())
        inputs = cls(entered.hidden, entered.calls, weights, upstream or Cleaning(), counted)
        inputs._keep(entered.hidden, store)
        return inputs

    def run(self, block: nn.Module, device: torch.device) -> Tensor | None:
        """The block's output on `device`, or None when a hook ended the pass early."""
        output = first_output(run_until_stopped(self.calls[0], block, self.hidden.to(device)))
        assert output is None or isinstance(output, Tensor)
        return output

    def output(self, block: nn.Module, device: torch.device) -> Tensor:
        """The block's output on `device`, of a whole pass."""
        output = self.run(block, device)
        assert output is not None
        return output

    def advance(self, block: nn.Module, device: torch.device) -> None:
        """Run the block: its output becomes the input of the next one."""
        output = self.output(block, device)
        self.calls = self.calls[1:]
        self._keep(output, self.hidden.device)

    def _keep(self, hidden: Tensor, store: torch.device) -> None:
        """Store the next block's input; tokens that are not finite count nothing from now on."""
        finite = torch.isfinite(hidden)
        if not finite.all():
            finite = finite.all(-1).cpu().view(-1, hidden.shape[-2])  # a row of tokens for each weight's row
            weights = torch.ones(finite.shape) if self.weights is None else self.weights
            self.weights = torch.where(finite, weights, 0.0)
            self.excluded += int(((weights > 0) & ~finite).sum())
            hidden = cleaned(hidden)
        self.hidden = hidden.to(store)


def cleaned(hidden: Tensor) -> Tensor:
    """Hidden states `[..., width]` with zeros in place of every token that is not finite."""
    return torch.where(torch.isfinite(hidden).all(-1, keepdim=True), hidden, 0.0)


def is_finite(entered: ChainInput) -> bool:
    """Whether no hidden state is infinite or NaN, those that cross-attention reads included (masks may hold -inf)."""
    if not torch.isfinite(entered.hidden).all():
        return False
    beside = {id(x): x for call in entered.calls for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor)}
    return all(bool((tensor < torch.inf).all()) for tensor in beside.values() if tensor.is_floating_point())


def check_excluded(block: str, inputs: Sequence[BlockInputs], also: int = 0) -> None:
    """CalibrationError when too many tokens are not finite: the block's inputs and `also` inside of it, or upstream."""
    tokens, excluded = sum(entry.tokens for entry in inputs), also + sum(entry.excluded for entry in inputs)
    _refuse_many(block, excluded, tokens)
    damaged = [entry.upstream for entry in inputs if entry.upstream.damaged]
    if damaged:
        estimated = sum(cleaning.tokens for cleaning in damaged) * len(inputs) // len(damaged)
        _refuse_many(f"upstream of {block}", sum(cleaning.damaged for cleaning in damaged), estimated)


def _refuse_many(where: str, excluded: int, tokens: int) -> None:
    if excluded > MOST_EXCLUDED * tokens:
        raise CalibrationError(
            f"{where}: the activations of {excluded} of {tokens} calibration tokens ({excluded / tokens:.0%}) are not "
            f"finite; up to {MOST_EXCLUDED:.0%} would be left out",
            "float16 models overflow on a GPU: try --device cpu, which computes in float32; else look for damaged "
            "weights or pictures",
        )


def unnoted(inputs: Sequence[BlockInputs]) -> list[str]:
    """Notes about tokens that were not finite since `mark_noted`; they do not depend on where a stopped run went on."""
    tokens, excluded = sum(entry.tokens for entry in inputs), sum(entry.excluded - entry.noted for entry in inputs)
    upstream = sum(entry.upstream.damaged for entry in inputs)
    notes = [f"tokens that are not finite upstream of it: {upstream}; they are set to zero"] * bool(upstream)
    left = f"the inputs of {excluded} of {tokens} calibration tokens are not finite; they are left out from here on"
    return notes + [left] * bool(excluded)


def mark_noted(inputs: Sequence[BlockInputs]) -> None:
    """A note tells of everything that was excluded so far."""
    for entry in inputs:
        entry.noted, entry.upstream = entry.excluded, Cleaning()


def token_weights(batch: Batch, hidden: Tensor, image: int | None, vision: float) -> Tensor | None:
    """How much each of a padded block's tokens counts, f32 `[batch, tokens]`; None when all count the same.

    hidden: `[batch, tokens, width]`, whose last tokens are those of the attention mask. Padding counts 0, text 1, and
    the picture `vision`: tokens `image` of the prompt, and those before the prompt. CalibrationError when the hidden
    states do not fit the mask.
    """
    real = batch["attention_mask"].float()
    if hidden.dim() != 3 or len(hidden) != len(real):
        shapes = f"hidden states {list(hidden.shape)} and an attention mask {list(real.shape)}"
        raise CalibrationError(f"a block receives {shapes}: expected [batch, tokens, width] and [batch, tokens]")
    tokens = hidden.shape[1]
    if "input_ids" in batch and image is not None:
        real = torch.where(batch["input_ids"] == image, vision * real, real)
    before = real.new_full((len(real), max(0, tokens - real.shape[1])), vision)
    weights = torch.cat([before, real], dim=1)[:, -tokens:]
    return None if (weights == 1).all() else weights


def counted_rows(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows `[rows, in]` that count, and how much each does `[rows]` (None: 1).

    x: `[batch, tokens, in]` or `[batch * tokens, in]`, the last tokens of `weights`.
    """
    if weights is None:
        return x.reshape(-1, x.shape[-1]), None
    tokens = x.reshape(len(weights), -1, x.shape[-1])  # OPT flattens before its feed-forward
    own = weights[:, -tokens.shape[1] :].to(x.device)
    counted = own > 0
    return tokens[counted], None if (own[counted] == 1).all() else own[counted]


def finite_rows(rows: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The rows `[rows, in]` that are finite, and their weights `[rows]`."""
    finite = torch.isfinite(rows).all(-1)
    return rows[finite], None if weights is None else weights[finite]


def weighted(output: Tensor, weights: Tensor | None) -> Tensor:
    """A block's output, such that squared errors of its tokens count as much as the tokens do."""
    if weights is None:
        return output
    return output.float() * weights[:, -output.shape[-2] :].sqrt().to(output.device).view(*output.shape[:-1], 1)
