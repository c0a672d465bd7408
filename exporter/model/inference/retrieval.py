"""Image-text retrieval with BLIP-2: ranks the pictures and texts of a pool by contrastive and matching scores.

Contrastive similarity selects candidates, and the matching head reranks them. Every picture and every text goes through
the model once. The ViT's features of the pictures stay on the host, in memory up to a limit and beyond it on disk;
matching reads pairs in batches. Works on transformers' `Blip2ForImageTextRetrieval`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exporter.data.tasks.retrieval import format_answer
from exporter.data.tasks.sample import Pool, Sample
from exporter.model.inference.batch_size import PAIRS, BatchSize
from exporter.model.inference.row_store import RowStore

LONGEST = 35  # largest number of tokens of a text, as in the paper
PIECE = 8  # pictures whose ranks are yielded together


@dataclass(frozen=True)
class EncodedPool:
    """The encoded pictures and texts of a pool, on the CPU.

    features: rows `[patches, width]`, one per picture: the ViT features that cross-attention reads. tokens, mask: int64
    `[texts, t]`. owners: the picture of each text. similarity: contrastive, float32 `[pictures, texts]`.
    """

    features: RowStore
    tokens: Tensor
    mask: Tensor
    owners: tuple[int, ...]
    similarity: Tensor


def _qformer(model: Any, words: Tensor, mask: Tensor, queries: int, features: Tensor | None) -> Tensor:
    """Outputs of the Q-Former in the dtype of the heads. features: of the pictures, None for texts alone."""
    options: dict[str, Any] = {"query_embeds": words, "query_length": queries, "attention_mask": mask}
    if features is not None:
        options |= {"encoder_hidden_states": features, "encoder_attention_mask": mask.new_ones(features.shape[:2])}
    result: Tensor = model.qformer(**options).last_hidden_state
    return result.to(model.itm_head.weight.dtype)


def _encode_pictures(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """ViT features `[n, patches, width]`, and unit vectors `[n, queries, d]`."""
    features = model.vision_model(pixel_values=pixels).last_hidden_state
    queries = model.query_tokens.expand(len(pixels), -1, -1)
    mask = torch.ones(queries.shape[:2], dtype=torch.long, device=pixels.device)
    hidden = _qformer(model, queries, mask, queries.shape[1], features)
    return features, torch.nn.functional.normalize(model.vision_projection(hidden), dim=-1)


def _encode_texts(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Unit vectors `[n, d]` of texts, from their first tokens."""
    hidden = _qformer(model, model.embeddings(input_ids=tokens), mask, 0, None)
    return torch.nn.functional.normalize(model.text_projection(hidden[:, 0]), dim=-1)


def match_scores(model: Any, features: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Matching score of pairs, float32 `[n]`: the head's second logit, which the paper's code adds."""
    queries = model.query_tokens.expand(len(tokens), -1, -1)
    words = model.embeddings(input_ids=tokens, query_embeds=queries)
    whole = torch.cat([mask.new_ones(queries.shape[:2]), mask], dim=1)
    hidden = _qformer(model, words, whole, queries.shape[1], features)
    result: Tensor = model.itm_head(hidden[:, : queries.shape[1]]).mean(dim=1)[:, 1].float()
    return result


def pixels_of(processor: Any, samples: Sequence[Sample]) -> Tensor:
    """Preprocessed pictures of the samples, `[n, 3, height, width]`."""
    images = [sample.image() for sample in samples]
    pixels: Tensor = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    return pixels


def encode_pool(
    model: Any, processor: Any, pool: Pool, device: torch.device, size: BatchSize, pixels: RowStore | None = None
) -> EncodedPool:
    """Encode every picture and every text of the pool once.

    pixels: the output of `pixels_of` for the pool, to avoid preprocessing the pictures again.
    """
    dtype = next(model.parameters()).dtype
    features, picture_vectors = RowStore(len(pool.samples)), []

    def encode_pictures(numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = slice(numbers[0], numbers[-1] + 1)
        values = pixels_of(processor, pool.samples[rows]) if pixels is None else pixels[rows]
        return _encode_pictures(model, values.to(device, dtype))

    for rows, vectors in size.each(range(len(pool.samples)), encode_pictures):
        features.append(rows)
        picture_vectors.append(vectors.float().cpu())
    texts = [text for sample in pool.samples for text in sample.references]
    options = {"padding": True, "padding_side": "right", "truncation": True, "max_length": LONGEST}
    coded = processor.tokenizer(texts, return_tensors="pt", **options)
    tokens, mask = coded["input_ids"], coded["attention_mask"]

    def encode_texts(numbers: Sequence[int]) -> Tensor:
        rows = slice(numbers[0], numbers[-1] + 1)
        return _encode_texts(model, tokens[rows].to(device), mask[rows].to(device)).float()

    text_vectors = torch.cat(list(size.each(range(len(texts)), encode_texts)))
    similarity = torch.empty(len(pool.samples), len(texts))
    start = 0
    for part in picture_vectors:
        similarity[start : start + len(part)] = torch.einsum("iqd,jd->iqj", part.to(device), text_vectors).amax(dim=1)
        start += len(part)
    owners = tuple(i for i, sample in enumerate(pool.samples) for _ in sample.references)
    return EncodedPool(features, tokens, mask, owners, similarity)


def _rank(scores: Tensor, own: Tensor) -> float | None:
    """Rank of the best of the query's own candidates, from 1; None when it has none, NaN when none has a finite score.

    Candidates with the same or a non-finite score count as ranked before it, so that neither ties nor NaN help a model.
    own: bool, which candidates belong to the query.
    """
    if not bool(own.any()):
        return None
    own_scores = scores[own & scores.isfinite()]
    if not len(own_scores):
        return math.nan
    worse = scores.isfinite() & (scores < own_scores.max())
    return 1 + int((~own & ~worse).sum())


def _best(similarity: Tensor, own: Tensor, count: int) -> Tensor:
    """Numbers of the `count` most similar candidates.

    Among equal ones the query's own come last, and non-finite ones come last of all.
    """
    order = own.int().argsort(stable=True)
    rank = similarity.masked_fill(~similarity.isfinite(), float("-inf"))[order]
    return order[rank.argsort(descending=True, stable=True)[:count]]


def candidates(pool: Pool, encoded: EncodedPool, number: int) -> tuple[Tensor, Tensor, list[int]]:
    """The pairs to match for one picture: numbers of pictures, numbers of texts, and the number of pairs per query.

    The first query searches the picture's texts among all texts; the other queries search the picture for each of its
    texts.
    """
    similarity, own = encoded.similarity, torch.tensor(encoded.owners) == number
    best = _best(similarity[number], own, pool.candidates)
    pictures = [torch.full_like(best, number)]
    texts = [best]
    itself = torch.arange(len(similarity)) == number
    for text in own.nonzero()[:, 0].tolist():
        best = _best(similarity[:, text], itself, pool.candidates)
        pictures.append(best)
        texts.append(torch.full_like(best, text))
    return torch.cat(pictures), torch.cat(texts), [len(part) for part in texts]


def score_pairs(
    model: Any, encoded: EncodedPool, pairs: tuple[Tensor, Tensor], device: torch.device, size: BatchSize
) -> Tensor:
    """Sum of the matching and contrastive scores of pairs, float32 `[n]`, on the CPU; repeated pairs are computed once.

    pairs: numbers of pictures and of texts, int64 `[n]` each.
    """
    unique, inverse = torch.stack(pairs, dim=1).unique(dim=0, return_inverse=True)

    def score(numbers: Sequence[int]) -> Tensor:
        pictures, texts = unique[numbers[0] : numbers[-1] + 1].unbind(dim=1)
        longest = int(encoded.mask[texts].sum(dim=1).max())
        tokens, mask = encoded.tokens[texts, :longest], encoded.mask[texts, :longest]
        distinct, which = pictures.unique(return_inverse=True)  # sorted pairs share few pictures
        features = encoded.features[distinct].to(device)[which.to(device)]
        return (
            match_scores(model, features, tokens.to(device), mask.to(device)).cpu()
            + encoded.similarity[pictures, texts]
        )

    return torch.cat(list(size.each(range(len(unique)), score, times=PAIRS)))[inverse]


@torch.inference_mode()
def rank(
    model: Any, processor: Any, samples: Sequence[Sample], device: torch.device, size: BatchSize
) -> Iterator[dict[int, str]]:
    """Yield number of a sample -> ranks of its texts and of itself as text, for `PIECE` pictures at a time.

    ValueError when the samples are not of one pool.
    """
    pools = {id(sample.among): sample.among for sample in samples}
    pool = next(iter(pools.values()), None)
    if pool is None or len(pools) != 1:
        raise ValueError("all samples must belong to one pool")
    encoded = encode_pool(model, processor, pool, device, size)
    places = {sample.identity: number for number, sample in enumerate(pool.samples)}
    for start in range(0, len(samples), PIECE):
        numbers = [places[sample.identity] for sample in samples[start : start + PIECE]]
        queries = [candidates(pool, encoded, number) for number in numbers]
        pairs = torch.cat([query[0] for query in queries]), torch.cat([query[1] for query in queries])
        scores = score_pairs(model, encoded, pairs, device, size)
        parts = scores.split([sum(counts) for _, _, counts in queries])
        yield {
            start + i: format_ranks(encoded, number, query, part)
            for i, (number, query, part) in enumerate(zip(numbers, queries, parts, strict=True))
        }


def format_ranks(encoded: EncodedPool, number: int, pairs: tuple[Tensor, Tensor, list[int]], scores: Tensor) -> str:
    """Ranks of a picture's `candidates` as text, in the format that `tasks.retrieval` reads."""
    pictures, texts, counts = pairs
    owners = torch.tensor(encoded.owners)
    queries = zip(scores.split(counts), (owners[texts] == pictures).split(counts), strict=True)
    ranks = [_rank(score, own) for score, own in queries]
    finite = encoded.similarity[number, owners == number].isfinite()  # a non-finite similarity selects no candidate
    valid = [bool(finite.any()), *finite.tolist()]
    first, *others = [rank if good else math.nan for rank, good in zip(ranks, valid, strict=True)]
    return format_answer(first, others)
