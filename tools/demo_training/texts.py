"""Captions as tokens, made on the device that trains: twins of `language.captions` under retrieval's `prepare`.

A training of retrieval needs wrong captions that nearly fit, a fresh one for every picture and step, so words are
looked up in tables instead of being tokenized.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from exporter.demo.scenes import CELLS, COLORS, DOTS, MOST_OBJECTS, SHAPES, SIZES, Scenes, lexicon
from tools.demo_training.folder import BOS, PAD, tokenizer

LENGTH = 40  # tokens: <s>, an opening of three words, four objects of nine: a multiple of 8
OPENINGS = ("", "there is", "an image with", "an image with")  # the last tells the objects in reverse order
NAMED = len(OPENINGS)  # styles 0..3 use names, as `language.captions`; 4..7 say the same in plain words
STYLES = 2 * NAMED
COUNTS = {"color": len(COLORS), "size": len(SIZES), "shape": len(SHAPES), "dot": len(DOTS)}


@dataclass(frozen=True)
class Lexicon:
    """Token ids, int64; -1 is no token.

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
    """Look every word up once."""
    coder = tokenizer()
    coder.post_processor = None

    def padded(text: str, length: int) -> list[int]:
        ids = list(coder.encode(text).ids)
        return ids + [-1] * (length - len(ids))

    objects = [(c, s, f, d) for c in COLORS for s in SIZES for f in SHAPES for d in DOTS]
    names = torch.tensor([padded(lexicon()[one], 3) for one in objects]).view(*COUNTS.values(), 3)
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
class Said:
    """Captions. tokens: int64 `[n, 40]`, `<s>` first, padded behind.

    things: int64 `[n, 4, 5]`, cell, color, size, shape and dot of every object in the order told, cell -1 for none.
    spots: int64 `[n, 4]`, the place of each object's "at", which stands between what it is and where.
    """

    tokens: Tensor
    things: Tensor
    spots: Tensor


def texts(batch: Scenes, style: Tensor, known: Lexicon) -> Said:
    """The caption of every scene in style `[n]` (0..7)."""
    n, words = style.shape[0], known.words
    turn = torch.arange(MOST_OBJECTS, device=style.device)
    turn = torch.where(style[:, None] % NAMED == NAMED - 1, turn.flip(0), turn)  # [n, 4]
    cell, color, size, shape, dot = (
        t.gather(1, turn) for t in (batch.cell, batch.color, batch.size, batch.shape, batch.dot)
    )
    here = cell >= 0
    rank, last = here.cumsum(1), here.sum(1, keepdim=True)
    link = torch.full_like(cell, words[","]).masked_fill(rank == last, words["and"]).masked_fill(rank == 1, -1)
    plain = torch.stack([known.sizes[size], known.colors[color], known.shapes[shape]], dim=-1)
    called = torch.where((style < NAMED)[:, None, None], known.names[color, size, shape, dot], plain)
    said = [link, torch.full_like(cell, words["a"]), *called.unbind(-1)]
    said += [torch.full_like(cell, words[w]) for w in ("at", "the")] + list(known.cells[cell.clamp(min=0)].unbind(-1))
    objects = torch.stack(said, dim=-1).masked_fill(~here[:, :, None], -1).flatten(1)
    start = torch.full((n, 1), BOS, device=style.device)
    tokens = torch.cat([start, known.openings[style % NAMED], objects], dim=1)
    spots = ((tokens >= 0).cumsum(1) - 1)[:, 4:].view(n, MOST_OBJECTS, len(said))[:, :, 5]
    tokens = tokens.gather(1, (tokens < 0).long().argsort(dim=1, stable=True))
    return Said(tokens.masked_fill(tokens < 0, PAD), torch.stack([cell, color, size, shape, dot], dim=-1), spots)


def _chosen(here: Tensor, chance: torch.Generator) -> Tensor:
    """One of the objects that are there, int64 `[n, 1]`."""
    return torch.rand(here.shape, device=here.device, generator=chance).masked_fill(~here, -1).argmax(1, keepdim=True)


def spoil(batch: Scenes, style: Tensor, chance: torch.Generator) -> Scenes:
    """Scenes that differ in one thing: a property, a whole object, a place, or two objects that changed places.

    style `[n]`: how it will be said; dots are not told in plain words.
    """
    here, device = batch.cell >= 0, batch.cell.device
    n, one = batch.cell.shape[0], _chosen(here, chance)

    def roll(sides: int) -> Tensor:
        return torch.randint(sides, (n, 1), device=device, generator=chance)

    how, which, lonely = roll(4), roll(len(COUNTS)), here.sum(1, keepdim=True) < 2
    which = torch.where(style[:, None] < NAMED, which, which % (len(COUNTS) - 1))
    how = torch.where((how == 3) & lonely, torch.zeros_like(how), how)
    other = _chosen(here.scatter(1, one, False) | (lonely & here), chance)
    changed = {}
    for i, (name, sides) in enumerate(COUNTS.items()):
        values = getattr(batch, name)
        new = (values.gather(1, one) + 1 + roll(sides - 1)) % sides
        told = ((how == 0) & (which == i)) | (how == 1)
        edited = values.scatter(1, one, torch.where(told, new, values.gather(1, one)))
        swapped = values.scatter(1, one, values.gather(1, other)).scatter(1, other, values.gather(1, one))
        changed[name] = torch.where(how == 3, swapped, edited)
    free = torch.ones(n, len(CELLS) + 1, dtype=torch.bool, device=device)
    free = free.scatter(1, torch.where(here, batch.cell, len(CELLS)), False)[:, : len(CELLS)]
    cell = batch.cell.scatter(1, one, torch.where(how == 2, _chosen(free, chance), batch.cell.gather(1, one)))
    order = torch.where(here, cell, len(CELLS)).argsort(dim=1)  # reading order again, absent ones last
    color, size, shape, dot = (changed[name].gather(1, order) for name in COUNTS)
    return replace(batch, cell=cell.gather(1, order), color=color, size=size, shape=shape, dot=dot)
