"""Inputs of the next block for every calibration batch, with a weight per token; non-finite tokens are excluded.

A token with a non-finite hidden state (float16 overflows on some pictures) is set to zero and gets weight 0, so that
attention does not spread the value to other tokens. CalibrationError when more than `MAX_EXCLUDED` of the tokens are
excluded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from exporter.errors import CalibrationError
from exporter.model.inference.encoding import Batch
from exporter.model.inference.forward_hooks import first_output, run_until_stopped
from exporter.quantization.block_calls import BlockCall, ChainInput

MAX_EXCLUDED = 0.1  # share of the tokens that may be excluded before the job stops


@dataclass
class Cleaning:
    """Zeroes non-finite tokens in the blocks upstream of a component, for one batch, and counts them.

    damaged: the number of non-finite tokens at the place that had most of them. tokens: the number of all tokens there.
    """

    damaged: int = 0
    tokens: int = 0

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward` of a block, wrapped so that non-finite tokens of its input and output become zeros."""

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
        return zero_nonfinite(hidden) if damaged else hidden


@dataclass
class BlockInputs:
    """The input of the next block for one batch.

    hidden: `[batch, tokens, width]`, or `[tokens, width]` when the model packs the pictures of a batch into one
    sequence. calls: the other arguments of the next block and of the blocks after it. weights: f32 `[batch, tokens]`
    (`[1, tokens]` for packed pictures), the weight of each token in the statistics: 0 for padding and excluded tokens;
    None when all weights are 1. upstream: counts of the tokens that were zeroed before the first block. tokens: the
    number of tokens with a positive weight at the first block. excluded: how many of these were excluded since then.
    noted: how many of the excluded tokens a note already reports.
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
        cls,
        entered: ChainInput,
        weights: Tensor | None,
        device: torch.device,
        store: torch.device,
        upstream: Cleaning | None = None,
    ) -> "BlockInputs":
        """The input of a component's first block, for computing on `device`; hidden states are stored on `store`."""
        counted = entered.hidden.shape[:-1].numel() if weights is None else int((weights > 0).sum())
        moved: dict[int, Tensor] = {}
        calls = tuple(
            replace(call.to(device, moved), added=None if call.added is None else call.added.to(store))
            for call in entered.calls
        )
        inputs = cls(entered.hidden, calls, weights, upstream or Cleaning(), counted)
        inputs._keep(entered.hidden, store)
        return inputs

    def call(self, block: Callable[..., Any], device: torch.device) -> Any:
        """The hidden states that `block` returns on `device`; differentiable, and a hook that ends the pass raises."""
        return first_output(self.calls[0].to(device, {})(block, self.hidden.to(device)))

    def run(self, block: Callable[..., Any], device: torch.device) -> Tensor | None:
        """The block's output on `device`, or None when a hook ended the pass early."""
        output = run_until_stopped(self.call, block, device)
        assert output is None or isinstance(output, Tensor)
        return output

    def output(self, block: nn.Module, device: torch.device) -> Tensor:
        """The block's output on `device`; no hook may end the pass early."""
        output = self.run(block, device)
        assert output is not None
        return output

    def advance(self, block: nn.Module, device: torch.device) -> None:
        """Run the block and make its output the input of the next block."""
        self.accept(self.output(block, device))

    def accept(self, output: Tensor) -> None:
        """Make `output` of the block, on the compute device, the input of the next block."""
        self.calls = self.calls[1:]
        if (added := self.calls[0].added) is not None:
            output = output + added.to(output.device)
        self._keep(output, self.hidden.device)

    def _keep(self, hidden: Tensor, store: torch.device) -> None:
        """Store the next block's input on `store`; exclude tokens with a non-finite value."""
        finite = torch.isfinite(hidden)
        if not finite.all():
            finite = finite.all(-1).cpu().view(-1, hidden.shape[-2])  # the shape of `weights`
            weights = torch.ones(finite.shape) if self.weights is None else self.weights
            self.weights = torch.where(finite, weights, 0.0)
            self.excluded += int(((weights > 0) & ~finite).sum())
            hidden = zero_nonfinite(hidden)
        self.hidden = hidden.to(store)


def zero_nonfinite(hidden: Tensor) -> Tensor:
    """Hidden states `[..., width]`, with zeros for every token that has a non-finite value."""
    return torch.where(torch.isfinite(hidden).all(-1, keepdim=True), hidden, 0.0)


def is_finite(entered: ChainInput) -> bool:
    """Whether all hidden states are finite, including those that cross-attention reads.

    Other floating-point arguments may hold -inf, because attention masks do.
    """
    if not torch.isfinite(entered.hidden).all():
        return False
    others = {id(x): x for call in entered.calls for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor)}
    return all(bool((tensor < torch.inf).all()) for tensor in others.values() if tensor.is_floating_point())


def check_excluded(block: str, inputs: Sequence[BlockInputs], also: int = 0) -> None:
    """CalibrationError when more than `MAX_EXCLUDED` of the calibration tokens are excluded.

    Checks the tokens excluded from the block's inputs plus `also` tokens excluded inside the block, and separately the
    tokens zeroed upstream of it.
    """
    tokens, excluded = sum(entry.tokens for entry in inputs), also + sum(entry.excluded for entry in inputs)
    _refuse_too_many(block, excluded, tokens)
    damaged = [entry.upstream for entry in inputs if entry.upstream.damaged]
    if damaged:
        estimated = sum(cleaning.tokens for cleaning in damaged) * len(inputs) // len(damaged)
        _refuse_too_many(f"upstream of {block}", sum(cleaning.damaged for cleaning in damaged), estimated)


def _refuse_too_many(where: str, excluded: int, tokens: int) -> None:
    if excluded > MAX_EXCLUDED * tokens:
        raise CalibrationError(
            f"{where}: the activations of {excluded} of {tokens} calibration tokens ({excluded / tokens:.0%}) are not "
            f"finite; at most {MAX_EXCLUDED:.0%} may be excluded",
            "float16 models can overflow on a GPU: try --device cpu, which computes in float32; otherwise check the "
            "weights and pictures for damage",
        )


def excluded_token_notes(inputs: Sequence[BlockInputs]) -> list[str]:
    """Notes about the tokens that were excluded since `mark_noted`, empty when there are none.

    The notes of a block are the same whether or not the run was interrupted and resumed before it.
    """
    tokens, excluded = sum(entry.tokens for entry in inputs), sum(entry.excluded - entry.noted for entry in inputs)
    upstream = sum(entry.upstream.damaged for entry in inputs)
    notes = [f"tokens that are not finite upstream of it: {upstream}; they are set to zero"] * bool(upstream)
    left = f"the inputs of {excluded} of {tokens} calibration tokens are not finite; they are left out from here on"
    return notes + [left] * bool(excluded)


def mark_noted(inputs: Sequence[BlockInputs]) -> None:
    """Record that all tokens excluded so far are reported in a note."""
    for entry in inputs:
        entry.noted, entry.upstream = entry.excluded, Cleaning()


def token_weights(batch: Batch, hidden: Tensor, image: int | None, vision: float) -> Tensor | None:
    """Weight of each token of a padded block, f32 `[batch, tokens]`; None when all weights are 1.

    hidden: `[batch, tokens, width]`; its last tokens are those of the attention mask. Padding gets weight 0, text 1,
    and the picture's tokens `vision`: those with the id `image`, and those that the model inserts before the prompt.
    CalibrationError when the shape of the hidden states does not match the mask.
    """
    real = batch["attention_mask"].float()
    if hidden.dim() != 3 or len(hidden) != len(real):
        shapes = f"hidden states {list(hidden.shape)} and an attention mask {list(real.shape)}"
        raise CalibrationError(f"a block receives {shapes}; expected [batch, tokens, width] and [batch, tokens]")
    tokens = hidden.shape[1]
    if "input_ids" in batch and image is not None:
        real = torch.where(batch["input_ids"] == image, vision * real, real)
    before = real.new_full((len(real), max(0, tokens - real.shape[1])), vision)
    weights = torch.cat([before, real], dim=1)[:, -tokens:]
    return None if (weights == 1).all() else weights


def counted_rows(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows `[rows, in]` with a weight above 0, and their weights `[rows]` (None: all are 1).

    x: `[batch, tokens, in]` or `[batch * tokens, in]`; its tokens are the last ones of `weights`.
    """
    if weights is None:
        return x.reshape(-1, x.shape[-1]), None
    tokens = x.reshape(len(weights), -1, x.shape[-1])  # OPT flattens before its feed-forward
    token_weights = weights[:, -tokens.shape[1] :].to(x.device)
    counted = token_weights > 0
    row_weights = token_weights[counted]
    return tokens[counted], None if (row_weights == 1).all() else row_weights


def finite_rows(rows: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The rows `[rows, in]` without non-finite values, and their weights `[rows]`."""
    finite = torch.isfinite(rows).all(-1)
    return rows[finite], None if weights is None else weights[finite]


def weighted(output: Tensor, weights: Tensor | None) -> Tensor:
    """A block's output scaled by the square root of each token's weight.

    Squared errors of the scaled outputs are then weighted by the token weights.
    """
    if weights is None:
        return output
    return output.float() * weights[:, -output.shape[-2] :].sqrt().to(output.device).view(*output.shape[:-1], 1)
