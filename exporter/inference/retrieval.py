"""Where a retrieval model finds the pictures and texts of a pool: contrast chooses candidates, matching orders them.

Every picture and every text goes through the model once. What the ViT makes of the pictures stays on the host, within
a bound of memory and beyond it on disk; matching then reads pairs in batches. Works on transformers'
`Blip2ForImageTextRetrieval`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exporter.inference.batch_size import BatchSize
from exporter.inference.row_store import RowStore
from exporter.tasks.retrieval import format_answer
from exporter.tasks.sample import Pool, Sample

LONGEST = 35  # tokens of a text, as in the paper
PIECE = 8  # pictures whose ranks are handed on together
PAIRS = 8  # times as many pairs as pictures go through the model at once: they skip the ViT


@dataclass(frozen=True)
class Searched:
    """A pool as the model sees it, on the CPU.

    seen: rows `[patches, width]`, one a picture: what cross-attention reads. tokens, mask: int64 `[texts, t]`.
    owners: the picture of each text. similarity: float32 `[pictures, texts]`, by contrast.
    """

    seen: RowStore
    tokens: Tensor
    mask: Tensor
    owners: tuple[int, ...]
    similarity: Tensor


def _former(model: Any, words: Tensor, mask: Tensor, queries: int, seen: Tensor | None) -> Tensor:
    """Outputs of the Q-Former in the dtype of the heads."""
    options: dict[str, Any] = {"query_embeds": words, "query_length": queries, "attention_mask": mask}
    if seen is not None:
        options |= {"encoder_hidden_states": seen, "encoder_attention_mask": mask.new_ones(seen.shape[:2])}
    result: Tensor = model.qformer(**options).last_hidden_state
    return result.to(model.itm_head.weight.dtype)


def _pictures(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """What cross-attention reads `[n, patches, width]`, and unit vectors `[n, queries, d]`."""
    seen = model.vision_model(pixel_values=pixels).last_hidden_state
    queries = model.query_tokens.expand(len(pixels), -1, -1)
    mask = torch.ones(queries.shape[:2], dtype=torch.long, device=pixels.device)
    found = _former(model, queries, mask, queries.shape[1], seen)
    return seen, torch.nn.functional.normalize(model.vision_projection(found), dim=-1)


def _texts(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Unit vectors `[n, d]`: the first token's."""
    found = _former(model, model.embeddings(input_ids=tokens), mask, 0, None)
    return torch.nn.functional.normalize(model.text_projection(found[:, 0]), dim=-1)


def match(model: Any, seen: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """The matching head's score that pairs fit, float32 `[n]` (its second logit, as the paper's code adds it)."""
    queries = model.query_tokens.expand(len(tokens), -1, -1)
    words = model.embeddings(input_ids=tokens, query_embeds=queries)
    whole = torch.cat([mask.new_ones(queries.shape[:2]), mask], dim=1)
    found = _former(model, words, whole, queries.shape[1], seen)
    result: Tensor = model.itm_head(found[:, : queries.shape[1]]).mean(dim=1)[:, 1].float()
    return result


def pixels_of(processor: Any, samples: Sequence[Sample]) -> Tensor:
    """Pictures as the model takes them, `[n, 3, height, width]`."""
    images = [sample.image() for sample in samples]
    pixels: Tensor = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    return pixels


def search(
    model: Any, processor: Any, pool: Pool, device: torch.device, size: BatchSize, drawn: RowStore | None = None
) -> Searched:
    """Every picture and every text of the pool through the model once. drawn: `pixels_of` the pool, where kept."""
    dtype = next(model.parameters()).dtype
    seen, pictures = RowStore(len(pool.samples)), []

    def look(numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        some = slice(numbers[0], numbers[-1] + 1)
        pixels = pixels_of(processor, pool.samples[some]) if drawn is None else drawn[some]
        return _pictures(model, pixels.to(device, dtype))

    for features, vectors in size.each(range(len(pool.samples)), look):
        seen.append(features)
        pictures.append(vectors.float().cpu())
    texts = [text for sample in pool.samples for text in sample.references]
    options = {"padding": True, "padding_side": "right", "truncation": True, "max_length": LONGEST}
    coded = processor.tokenizer(texts, return_tensors="pt", **options)
    tokens, mask = coded["input_ids"], coded["attention_mask"]

    def read(numbers: Sequence[int]) -> Tensor:
        some = slice(numbers[0], numbers[-1] + 1)
        return _texts(model, tokens[some].to(device), mask[some].to(device)).float()

    words = torch.cat(list(size.each(range(len(texts)), read)))
    similarity = torch.empty(len(pool.samples), len(texts))
    start = 0
    for part in pictures:
        similarity[start : start + len(part)] = torch.einsum("iqd,jd->iqj", part.to(device), words).amax(dim=1)
        start += len(part)
    owners = tuple(i for i, sample in enumerate(pool.samples) for _ in sample.references)
    return Searched(seen, tokens, mask, owners, similarity)


def _rank(scores: Tensor, own: Tensor) -> float | None:
    """Rank of the best of one's own among candidates. None: it is not among them; NaN: it has no finite score.

    What scores the same or has no finite score counts as before it, so that neither ties nor NaN help a model.
    """
    if not bool(own.any()):
        return None
    mine = scores[own & scores.isfinite()]
    if not len(mine):
        return math.nan
    behind = scores.isfinite() & (scores < mine.max())
    return 1 + int((~own & ~behind).sum())


def _best(similarity: Tensor, own: Tensor, count: int) -> Tensor:
    """Numbers of the `count` most similar; one's own come last among equals, what is not finite last of all."""
    order = own.int().argsort(stable=True)
    ranked = similarity.masked_fill(~similarity.isfinite(), float("-inf"))[order]
    return order[ranked.argsort(descending=True, stable=True)[:count]]


def candidates(pool: Pool, searched: Searched, number: int) -> tuple[Tensor, Tensor, list[int]]:
    """Pairs to match for one picture: pictures, texts, and how many pairs each query has.

    The first query is the picture among all texts, the others are its texts among all pictures.
    """
    similarity, own = searched.similarity, torch.tensor(searched.owners) == number
    best = _best(similarity[number], own, pool.candidates)
    pictures = [torch.full_like(best, number)]
    others = [best]
    itself = torch.arange(len(similarity)) == number
    for text in own.nonzero()[:, 0].tolist():
        best = _best(similarity[:, text], itself, pool.candidates)
        pictures.append(best)
        others.append(torch.full_like(best, text))
    return torch.cat(pictures), torch.cat(others), [len(part) for part in others]


def scored(
    model: Any, searched: Searched, pairs: tuple[Tensor, Tensor], device: torch.device, size: BatchSize
) -> Tensor:
    """Matching plus contrast of pairs, float32 `[n]`, on the CPU; a pair that comes twice is read once.

    pairs: numbers of pictures and of texts, int64 `[n]` each.
    """
    unique, back = torch.stack(pairs, dim=1).unique(dim=0, return_inverse=True)

    def read(numbers: Sequence[int]) -> Tensor:
        pictures, texts = unique[numbers[0] : numbers[-1] + 1].unbind(dim=1)
        longest = int(searched.mask[texts].sum(dim=1).max())
        tokens, mask = searched.tokens[texts, :longest], searched.mask[texts, :longest]
        few, which = pictures.unique(return_inverse=True)  # pairs of one picture come together
        seen = searched.seen[few].to(device)[which.to(device)]
        return match(model, seen, tokens.to(device), mask.to(device)).cpu() + searched.similarity[pictures, texts]

    return torch.cat(list(size.each(range(len(unique)), read, times=PAIRS)))[back]


@torch.inference_mode()
def ranked(
    model: Any, processor: Any, samples: Sequence[Sample], device: torch.device, size: BatchSize
) -> Iterator[dict[int, str]]:
    """Number of a sample -> where its texts and itself were found, a few pictures at a time.

    All samples are of one pool (ValueError).
    """
    pools = {id(sample.among): sample.among for sample in samples}
    pool = next(iter(pools.values()), None)
    if pool is None or len(pools) != 1:
        raise ValueError("samples of one pool are needed")
    searched = search(model, processor, pool, device, size)
    places = {sample.identity: number for number, sample in enumerate(pool.samples)}
    for start in range(0, len(samples), PIECE):
        numbers = [places[sample.identity] for sample in samples[start : start + PIECE]]
        wanted = [candidates(pool, searched, number) for number in numbers]
        pairs = torch.cat([one[0] for one in wanted]), torch.cat([one[1] for one in wanted])
        scores = scored(model, searched, pairs, device, size)
        shares = scores.split([sum(counts) for _, _, counts in wanted])
        yield {
            start + i: answer(searched, number, one, share)
            for i, (number, one, share) in enumerate(zip(numbers, wanted, shares, strict=True))
        }


def answer(searched: Searched, number: int, wanted: tuple[Tensor, Tensor, list[int]], scores: Tensor) -> str:
    """What a picture's `candidates` with their scores say, as `tasks.retrieval` reads it."""
    pictures, texts, counts = wanted
    owners = torch.tensor(searched.owners)
    queries = zip(scores.split(counts), (owners[texts] == pictures).split(counts), strict=True)
    found = [_rank(score, mine) for score, mine in queries]
    finite = searched.similarity[number, owners == number].isfinite()  # without it, it is no candidate for that reason
    known = [bool(finite.any()), *finite.tolist()]
    first, *others = [rank if good else math.nan for rank, good in zip(found, known, strict=True)]
    return format_answer(first, others)
