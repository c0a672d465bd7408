"""Scores of a retrieval model: recall by contrast, recall after matching, and matching of nearly fitting pairs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exporter.demo.scenes import Split, draw, scenes
from exporter.tasks.retrieval import recalls
from tools.demo_training.blip2_packing import former, queries_of, see
from tools.demo_training.blip2_retrieval import matching, picture_features, text_features
from tools.demo_training.packing import normalize
from tools.demo_training.texts import NAMED, lexicon_tokens, spoil, texts

CHUNK = 250
RERANKED = 16  # candidates that matching reads; the scenes are few


@dataclass(frozen=True)
class PairExam:
    """pixels uint8 `[n, 3, 64, 64]`; right and wrong int64 `[n, 40]`: a caption, and one that differs in one thing."""

    pixels: Tensor
    right: Tensor
    wrong: Tensor


def exam(split: Split, count: int, device: torch.device, plain: bool = False) -> PairExam:
    """The first scenes of a split with one caption each, by names or in plain words, the styles in turn."""
    batch, known = scenes(split, torch.arange(count, device=device)), lexicon_tokens(device)
    style = torch.arange(count, device=device) % NAMED + NAMED * plain
    spoiled = spoil(batch, style, torch.Generator(device).manual_seed(0))
    return PairExam(draw(batch), texts(batch, style, known).tokens, texts(spoiled, style, known).tokens)


def _match(model: Any, image: Tensor, tokens: Tensor) -> Tensor:
    """How much more a pair fits than not, float32 `[n]`."""
    parts = zip(image.split(CHUNK), tokens.split(CHUNK), strict=True)
    scores = torch.cat([matching(model, *part).float() for part in parts])
    return scores[:, 1] - scores[:, 0]


@torch.no_grad()
def grade(model: Any, pairs: PairExam) -> dict[str, float]:
    """Recall at 1 both ways by contrast and after matching among the best 16, and how often matching is right."""
    dtype = next(model.parameters()).dtype
    image = torch.cat([see(model, normalize(part).to(dtype)) for part in pairs.pixels.split(CHUNK)])
    queries = [former(model, queries_of(model, len(part)), part) for part in image.split(CHUNK)]
    found = picture_features(model, torch.cat(queries)).float()
    said = torch.cat([text_features(model, part) for part in pairs.right.split(CHUNK)]).float()
    similarity = torch.cat([torch.einsum("iqd,jd->iqj", part, said).amax(1) for part in found.split(CHUNK)])
    right, wrong = _match(model, image, pairs.right), _match(model, image, pairs.wrong)
    figures = _first(similarity, "contrast") | _first(_again(model, image, pairs.right, similarity), "matching")
    figures |= {"fits": float((right > 0).float().mean()), "near misses": float((wrong < 0).float().mean())}
    return figures | {"prefers": float((right > wrong).float().mean())}


def _first(similarity: Tensor, name: str) -> dict[str, float]:
    found = recalls(similarity.cpu(), range(similarity.shape[1]))
    return {f"{name} {way}": sum(found[f"{way}_r1"]) / len(found[f"{way}_r1"]) for way in ("text", "image")}


def _again(model: Any, image: Tensor, tokens: Tensor, similarity: Tensor) -> Tensor:
    """Contrast plus matching for pairs among the best of their row or column, minus infinity elsewhere."""
    chosen = torch.zeros_like(similarity, dtype=torch.bool)
    chosen.scatter_(1, similarity.topk(RERANKED, dim=1).indices, True)
    chosen.scatter_(0, similarity.topk(RERANKED, dim=0).indices, True)
    rows, columns = chosen.nonzero(as_tuple=True)
    scores = torch.cat(
        [_match(model, image[r], tokens[c]) for r, c in zip(rows.split(CHUNK), columns.split(CHUNK), strict=True)]
    )
    result = torch.full_like(similarity, float("-inf"))
    result[rows, columns] = scores + similarity[rows, columns]
    return result
