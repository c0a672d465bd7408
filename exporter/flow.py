"""What batches look like on their way through the blocks, and how much each of their tokens counts."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exporter.stream import run_until_reached

Batch = dict[str, Tensor]


@dataclass
class Flow:
    """What one batch looks like at the door of the next block.

    hidden: `[batch, tokens, width]`. args, kwargs: everything else the block receives, the same for all blocks.
    weights: f32 `[batch, tokens]`, how much each token of `hidden` counts: 0 for padding; None when all count the same.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    weights: Tensor | None

    def run(self, block: torch.nn.Module, device: torch.device) -> Tensor | None:
        """The block's output, or None when a hook stopped it."""
        hidden = self.hidden.to(device)
        if "hidden_states" in self.kwargs:
            output = run_until_reached(block, **{**self.kwargs, "hidden_states": hidden})
        else:
            output = run_until_reached(block, hidden, *self.args, **self.kwargs)
        result: Tensor | None = output[0] if isinstance(output, tuple) else output
        return result


def token_weights(batch: Batch, tokens: int, image: int | None, vision: float) -> Tensor | None:
    """How much each of a block's last `tokens` tokens counts, f32 `[batch, tokens]`; None when all count the same.

    Padding counts 0, text 1, and the picture `vision`: tokens `image` of the prompt, and those before the prompt.
    """
    real = batch["attention_mask"].float()
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


def weighted(output: Tensor, weights: Tensor | None) -> Tensor:
    """A block's output, such that squared errors of its tokens count as much as the tokens do."""
    if weights is None:
        return output
    return output.float() * weights[:, -output.shape[1] :].sqrt().to(output.device).unsqueeze(-1)
