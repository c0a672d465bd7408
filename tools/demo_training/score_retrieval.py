"""Scores of a retrieval model: recall by contrastive score, recall after matching, and verdicts on hard negatives."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exporter.data.demo.scenes import Split, draw, scenes
from exporter.data.tasks.retrieval import recalls
from tools.demo_training.blip2_packing import encode_image, qformer, queries_of
from tools.demo_training.blip2_retrieval import matching, picture_features, text_features
from tools.demo_training.packing import normalize
from tools.demo_training.texts import NAMED, hard_negatives, lexicon_tokens, texts

CHUNK = 250
RERANKED = 16  # candidates per query that the matching head scores


@dataclass(frozen=True)
class PairExam:
    """pixels uint8 `[n, 3, 64, 64]`; right and wrong int64 `[n, 40]`: tokens of the caption and of a hard negative."""

    pixels: Tensor
    right: Tensor
    wrong: Tensor


def exam(split: Split, count: int, device: torch.device, plain: bool = False) -> PairExam:
    """The first scenes of a split with one caption each, in names or plain words, cycling through the styles."""
    batch, lex = scenes(split, torch.arange(count, device=device)), lexicon_tokens(device)
    style = torch.arange(count, device=device) % NAMED + NAMED * plain
    negatives = hard_negatives(batch, style, torch.Generator(device).manual_seed(0))
    return PairExam(draw(batch), texts(batch, style, lex).tokens, texts(negatives, style, lex).tokens)


def _match_scores(model: Any, image: Tensor, tokens: Tensor) -> Tensor:
    """The logit of "fits" minus that of "does not fit", float32 `[n]`."""
    parts = zip(image.split(CHUNK), tokens.split(CHUNK), strict=True)
    scores = torch.cat([matching(model, *part).float() for part in parts])
    return scores[:, 1] - scores[:, 0]


@torch.no_grad()
def grade(model: Any, pairs: PairExam) -> dict[str, float]:
    """Recall at 1 in both directions, by contrastive score and after matching the best 16, and accuracy of matching."""
    dtype = next(model.parameters()).dtype
    image = torch.cat([encode_image(model, normalize(part).to(dtype)) for part in pairs.pixels.split(CHUNK)])
    queries = [qformer(model, queries_of(model, len(part)), part) for part in image.split(CHUNK)]
    image_vectors = picture_features(model, torch.cat(queries)).float()
    text_vectors = torch.cat([text_features(model, part) for part in pairs.right.split(CHUNK)]).float()
    similarity = torch.cat(
        [torch.einsum("iqd,jd->iqj", part, text_vectors).amax(1) for part in image_vectors.split(CHUNK)]
    )
    right, wrong = _match_scores(model, image, pairs.right), _match_scores(model, image, pairs.wrong)
    reranked = _rerank(model, image, pairs.right, similarity)
    figures = _recall_at_1(similarity, "contrast") | _recall_at_1(reranked, "matching")
    figures |= {"fits": float((right > 0).float().mean()), "near misses": float((wrong < 0).float().mean())}
    return figures | {"prefers": float((right > wrong).float().mean())}


def _recall_at_1(similarity: Tensor, name: str) -> dict[str, float]:
    hits = recalls(similarity.cpu(), range(similarity.shape[1]))
    return {f"{name} {way}": sum(hits[f"{way}_r1"]) / len(hits[f"{way}_r1"]) for way in ("text", "image")}


def _rerank(model: Any, image: Tensor, tokens: Tensor, similarity: Tensor) -> Tensor:
    """Contrastive plus matching score for pairs among the best of their row or column, minus infinity elsewhere."""
    candidates = torch.zeros_like(similarity, dtype=torch.bool)
    candidates.scatter_(1, similarity.topk(RERANKED, dim=1).indices, True)
    candidates.scatter_(0, similarity.topk(RERANKED, dim=0).indices, True)
    rows, columns = candidates.nonzero(as_tuple=True)
    scores = torch.cat(
        [
            _match_scores(model, image[r], tokens[c])
            for r, c in zip(rows.split(CHUNK), columns.split(CHUNK), strict=True)
        ]
    )
    result = torch.full_like(similarity, float("-inf"))
    result[rows, columns] = scores + similarity[rows, columns]
    return result
