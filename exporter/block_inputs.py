"""The input of the next block for every calibration batch, and how much each of its tokens counts.

Tokens whose hidden states are not finite (float16 overflows on some pictures) are set to zero and count nothing from
there on, so that attention does not spread them; a job in which too many do so stops.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from exporter.block_calls import BlockCall, ChainInput
from exporter.errors import CalibrationError
from exporter.forward_hooks import first_output, run_until_stopped

Batch = dict[str, Tensor]
MOST_EXCLUDED = 0.1  # share of the tokens that may be excluded before the job stops


@dataclass
class BlockInputs:
    """The input of the next block for one batch.

    hidden: `[batch, tokens, width]`, or `[tokens, width]` where a model packs its pictures. calls: the other arguments
    of the next block and of those after it.
    weights: f32 `[batch, tokens]` (a batch of 1 for packed pictures), how much each token counts: 0 for padding and for
    tokens that were not finite; None when all count the same.
    tokens: how many counted at first. excluded: how many of them were not finite. newly_excluded: those that the last
    step added.
    """

    hidden: Tensor
    calls: tuple[BlockCall, ...]
    weights: Tensor | None
    tokens: int = 0
    excluded: int = 0
    newly_excluded: int = 0

    @classmethod
    def enter(cls, entered: ChainInput, weights: Tensor | None, store: torch.device) -> "BlockInputs":
        """The input of a component's first block, kept on `store`."""
        counted = entered.hidden.shape[:-1].numel() if weights is None else int((weights > 0).sum())
        inputs = cls(entered.hidden, entered.calls, weights, counted)
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
        before = self.excluded
        finite = torch.isfinite(hidden)
        if not finite.all():
            finite = finite.all(-1).cpu().view(-1, hidden.shape[-2])  # a row of tokens for each weight's row
            weights = torch.ones(finite.shape) if self.weights is None else self.weights
            self.weights = torch.where(finite, weights, 0.0)
            self.excluded += int(((weights > 0) & ~finite).sum())
            hidden = cleaned(hidden)
        self.newly_excluded = self.excluded - before
        self.hidden = hidden.to(store)


def cleaned(hidden: Tensor) -> Tensor:
    """Hidden states `[..., width]` with zeros in place of every token that is not finite."""
    return torch.where(torch.isfinite(hidden).all(-1, keepdim=True), hidden, 0.0)


def cleaning_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's `forward` between `cleaned` hidden states."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if args:
            output = forward(cleaned(args[0]), *args[1:], **kwargs)
        else:
            output = forward(**kwargs | {"hidden_states": cleaned(kwargs["hidden_states"])})
        return (cleaned(output[0]), *output[1:]) if isinstance(output, tuple) else cleaned(output)

    return run


def is_finite(entered: ChainInput) -> bool:
    """Whether no hidden state is infinite or NaN, those that cross-attention reads included (masks may hold -inf)."""
    if not torch.isfinite(entered.hidden).all():
        return False
    beside = {id(x): x for call in entered.calls for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor)}
    return all(bool((tensor < torch.inf).all()) for tensor in beside.values() if tensor.is_floating_point())


def check_excluded(block: str, inputs: Sequence[BlockInputs], also: int = 0) -> None:
    """CalibrationError when too many tokens of the block's inputs, or `also` inside of it, are not finite."""
    tokens, excluded = sum(entry.tokens for entry in inputs), also + sum(entry.excluded for entry in inputs)
    if excluded > MOST_EXCLUDED * tokens:
        raise CalibrationError(
            f"{block}: the activations of {excluded} of {tokens} calibration tokens ({excluded / tokens:.0%}) are not "
            f"finite; up to {MOST_EXCLUDED:.0%} would be left out",
            "float16 models overflow on a GPU: try --device cpu, which computes in float32; else look for damaged "
            "weights or pictures",
        )


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
