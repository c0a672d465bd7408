"""Tokenized captions, computed on the training device; equal to `language.captions` after retrieval's `prepare`.

Retrieval training needs a new hard negative (a caption that nearly fits) for every picture and step. Table lookups
replace the tokenizer, which would be too slow.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from exporter.data.demo.scenes import CELLS, COLORS, DOTS, MOST_OBJECTS, SHAPES, SIZES, Scenes, lexicon
from tools.demo_training.folder import BOS, PAD, tokenizer

LENGTH = 40  # tokens: 1 for <s>, 3 of an opening, 9 for each of four objects; a multiple of 8
OPENINGS = ("", "there is", "an image with", "an image with")  # with the last, objects are in reverse order
NAMED = len(OPENINGS)  # styles 0..3 use names, as `language.captions` does; 4..7 use plain words
STYLES = 2 * NAMED
COUNTS = {"color": len(COLORS), "size": len(SIZES), "shape": len(SHAPES), "dot": len(DOTS)}


@dataclass(frozen=True)
class Lexicon:
    """Token ids, int64; -1 means no token.

    names `[16, 3, 6, 4, 3]`, colors `[16]`, sizes `[3]`, shapes `[6]`, cells `[9, 2]`, openings `[4, 3]`, and words.
    """

    names: Tensor
    colors: Tensor
    sizes: Tensor
    shapes: Tensor
    cells: Tensor
    openings: Tensor
    words: dict[str, int]


def lexicon_tokens(device: torch.device) -> Lexicon:
    """The token ids of every word of a caption, on a device."""
    coder = tokenizer()
    coder.post_processor = None

    def padded(text: str, length: int) -> list[int]:
        ids = list(coder.encode(text).ids)
        return ids + [-1] * (length - len(ids))

    objects = [(c, s, f, d) for c in COLORS for s in SIZES for f in SHAPES for d in DOTS]
    names = torch.tensor([padded(lexicon()[key], 3) for key in objects]).view(*COUNTS.values(), 3)
    colors, sizes, shapes = (torch.tensor([padded(word, 1)[0] for word in kinds]) for kinds in (COLORS, SIZES, SHAPES))
    cells = torch.tensor([padded(cell, 2) for cell in CELLS])
    openings = torch.tensor([padded(text, 3) for text in OPENINGS])
    words = {word: coder.encode(word).ids[-1] for word in ("a", "at", "the", "and", ",")}
    words[","] = coder.token_to_id(",")
    names, colors, sizes, shapes, cells, openings = (
        table.to(device) for table in (names, colors, sizes, shapes, cells, openings)
    )
    return Lexicon(names, colors, sizes, shapes, cells, openings, words)


@dataclass(frozen=True)
class CaptionTokens:
    """Captions. tokens: int64 `[n, 40]`, `<s>` first, right-padded.

    objects: int64 `[n, 4, 5]`, cell, color, size, shape and dot of every object in caption order; cell -1 for none.
    at_positions: int64 `[n, 4]`, the position of each object's token "at", between its description and its cell.
    """

    tokens: Tensor
    objects: Tensor
    at_positions: Tensor


def texts(batch: Scenes, style: Tensor, lex: Lexicon) -> CaptionTokens:
    """The caption of every scene in style `[n]` (0..7)."""
    n, words = style.shape[0], lex.words
    order = torch.arange(MOST_OBJECTS, device=style.device)
    order = torch.where(style[:, None] % NAMED == NAMED - 1, order.flip(0), order)  # [n, 4]
    cell, color, size, shape, dot = (
        t.gather(1, order) for t in (batch.cell, batch.color, batch.size, batch.shape, batch.dot)
    )
    present = cell >= 0
    rank, last = present.cumsum(1), present.sum(1, keepdim=True)
    link = torch.full_like(cell, words[","]).masked_fill(rank == last, words["and"]).masked_fill(rank == 1, -1)
    plain = torch.stack([lex.sizes[size], lex.colors[color], lex.shapes[shape]], dim=-1)
    described = torch.where((style < NAMED)[:, None, None], lex.names[color, size, shape, dot], plain)
    columns = [link, torch.full_like(cell, words["a"]), *described.unbind(-1)]
    columns += [torch.full_like(cell, words[w]) for w in ("at", "the")] + list(lex.cells[cell.clamp(min=0)].unbind(-1))
    phrases = torch.stack(columns, dim=-1).masked_fill(~present[:, :, None], -1)
    start = torch.full((n, 1), BOS, device=style.device)
    tokens = torch.cat([start, lex.openings[style % NAMED], phrases.flatten(1)], dim=1)
    at_positions = ((tokens >= 0).cumsum(1) - 1)[:, 4:].view(n, MOST_OBJECTS, len(columns))[:, :, 5]
    tokens = tokens.gather(1, (tokens < 0).long().argsort(dim=1, stable=True))
    objects = torch.stack([cell, color, size, shape, dot], dim=-1)
    return CaptionTokens(tokens.masked_fill(tokens < 0, PAD), objects, at_positions)


def _random_index(valid: Tensor, generator: torch.Generator) -> Tensor:
    """The index of a random true element of each row of `valid` `[n, k]`, int64 `[n, 1]`."""
    scores = torch.rand(valid.shape, device=valid.device, generator=generator)
    return scores.masked_fill(~valid, -1).argmax(1, keepdim=True)


def hard_negatives(batch: Scenes, style: Tensor, generator: torch.Generator) -> Scenes:
    """Scenes with one difference: a property, all properties of an object, its cell, or two objects swapped.

    style `[n]`: the style of the captions; plain words omit dots, so with them a dot is never the only difference.
    """
    present, device = batch.cell >= 0, batch.cell.device
    n, target = batch.cell.shape[0], _random_index(present, generator)

    def roll(sides: int) -> Tensor:
        return torch.randint(sides, (n, 1), device=device, generator=generator)

    change, prop, single = roll(4), roll(len(COUNTS)), present.sum(1, keepdim=True) < 2
    prop = torch.where(style[:, None] < NAMED, prop, prop % (len(COUNTS) - 1))
    change = torch.where((change == 3) & single, torch.zeros_like(change), change)
    other = _random_index(present.scatter(1, target, False) | (single & present), generator)
    changed = {}
    for i, (name, sides) in enumerate(COUNTS.items()):
        values = getattr(batch, name)
        new = (values.gather(1, target) + 1 + roll(sides - 1)) % sides
        edit = ((change == 0) & (prop == i)) | (change == 1)
        edited = values.scatter(1, target, torch.where(edit, new, values.gather(1, target)))
        swapped = values.scatter(1, target, values.gather(1, other)).scatter(1, other, values.gather(1, target))
        changed[name] = torch.where(change == 3, swapped, edited)
    free = torch.ones(n, len(CELLS) + 1, dtype=torch.bool, device=device)
    free = free.scatter(1, torch.where(present, batch.cell, len(CELLS)), False)[:, : len(CELLS)]
    moved = torch.where(change == 2, _random_index(free, generator), batch.cell.gather(1, target))
    cell = batch.cell.scatter(1, target, moved)
    order = torch.where(present, cell, len(CELLS)).argsort(dim=1)  # reading order, absent objects last
    color, size, shape, dot = (changed[name].gather(1, order) for name in COUNTS)
    return replace(batch, cell=cell.gather(1, order), color=color, size=size, shape=shape, dot=dot)
