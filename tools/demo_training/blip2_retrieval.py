"""Forward passes of the retrieval model: contrastive features, matching logits, and captioning (training only)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.demo_training.blip2_folder import QUERIES
from tools.demo_training.blip2_packing import qformer, queries_of
from tools.demo_training.folder import PAD


def _embed(model: Any, tokens: Tensor) -> Tensor:
    positions = model.embeddings.position_embeddings.weight[: tokens.shape[1]]
    result: Tensor = model.embeddings.word_embeddings(tokens) + positions
    return result


def _padding_mask(tokens: Tensor, queries: int) -> Tensor:
    """Attention mask that excludes padding, bool `[n, 1, 1, queries + t]`."""
    return F.pad(tokens != PAD, (queries, 0), value=True)[:, None, None, :]


def captioning(model: Any, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Query outputs `[n, 32, 128]`, independent of the text, and causal next-token logits `[n, t, vocabulary]`."""
    t = tokens.shape[1]
    order = torch.arange(QUERIES + t, device=tokens.device)
    mask = (order < QUERIES) | ((order[:, None] >= order) & (order[:, None] >= QUERIES))
    x = torch.cat([queries_of(model, len(tokens)), _embed(model, tokens)], dim=1)
    x = qformer(model, x, image, mask)
    return x[:, :QUERIES], F.linear(x[:, QUERIES:], model.embeddings.word_embeddings.weight.to(x.dtype))


def picture_features(model: Any, queries: Tensor) -> Tensor:
    """Unit vectors `[n, 32, 128]` of query outputs."""
    return F.normalize(model.vision_projection(queries), dim=-1)


def text_features(model: Any, tokens: Tensor, outputs: list[Tensor] | None = None) -> Tensor:
    """Unit vectors `[n, 128]` of texts, from the first token. outputs: every block's output is appended."""
    x = qformer(model, _embed(model, tokens), None, _padding_mask(tokens, 0), outputs)
    return F.normalize(model.text_projection(x[:, 0]), dim=-1)


def matching(model: Any, image: Tensor, tokens: Tensor, outputs: list[Tensor] | None = None) -> Tensor:
    """Logits `[n, 2]` of pairs: does not fit, fits. after: gets every block's output, queries first."""
    x = torch.cat([queries_of(model, len(tokens)), _embed(model, tokens)], dim=1)
    x = qformer(model, x, image, _padding_mask(tokens, QUERIES), outputs)
    result: Tensor = model.itm_head(x[:, :QUERIES]).mean(dim=1)
    return result
