"""The retrieval model's passes: features for contrast, scores for matching, and telling, which only training needs."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.demo_training.blip2_folder import QUERIES
from tools.demo_training.blip2_packing import former, queries_of
from tools.demo_training.folder import PAD


def _words(model: Any, tokens: Tensor) -> Tensor:
    places = model.embeddings.position_embeddings.weight[: tokens.shape[1]]
    result: Tensor = model.embeddings.word_embeddings(tokens) + places
    return result


def _attends(tokens: Tensor, queries: int) -> Tensor:
    """Nobody looks at padding: bool `[n, 1, 1, queries + t]`."""
    return F.pad(tokens != PAD, (queries, 0), value=True)[:, None, None, :]


def telling(model: Any, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Query outputs `[n, 32, 128]`, which see no text, and next-token logits `[n, t, vocabulary]`, left to right."""
    t = tokens.shape[1]
    order = torch.arange(QUERIES + t, device=tokens.device)
    sees = (order < QUERIES) | ((order[:, None] >= order) & (order[:, None] >= QUERIES))
    x = torch.cat([queries_of(model, len(tokens)), _words(model, tokens)], dim=1)
    x = former(model, x, image, sees)
    return x[:, :QUERIES], F.linear(x[:, QUERIES:], model.embeddings.word_embeddings.weight.to(x.dtype))


def picture_features(model: Any, queries: Tensor) -> Tensor:
    """Unit vectors `[n, 32, 128]` of query outputs."""
    return F.normalize(model.vision_projection(queries), dim=-1)


def text_features(model: Any, tokens: Tensor, after: list[Tensor] | None = None) -> Tensor:
    """Unit vectors `[n, 128]` of texts: the first token's. after: gets every block's output."""
    x = former(model, _words(model, tokens), None, _attends(tokens, 0), after)
    return F.normalize(model.text_projection(x[:, 0]), dim=-1)


def matching(model: Any, image: Tensor, tokens: Tensor, after: list[Tensor] | None = None) -> Tensor:
    """Logits `[n, 2]` of pairs: does not fit, fits. after: gets every block's output, queries first."""
    x = torch.cat([queries_of(model, len(tokens)), _words(model, tokens)], dim=1)
    x = former(model, x, image, _attends(tokens, QUERIES), after)
    result: Tensor = model.itm_head(x[:, :QUERIES]).mean(dim=1)
    return result
