"""Demo scenes: one to four small dotted objects on a 3 x 3 grid, and the lexicon of their names.

Scene `i` of a split is a pure function of (split, i): every choice is a hash of both, and pixels are drawn with the
signed distances below. Pictures therefore do not depend on a random generator or a drawing library.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Split = Literal["train", "validation", "test"]

SIDE = 64  # pixels
MOST_OBJECTS = 4
COLORS: dict[str, tuple[int, int, int]] = {  # similar on purpose, so that 3 bits confuse some
    "red": (214, 32, 38),
    "orange": (243, 134, 30),
    "yellow": (250, 226, 50),
    "olive": (128, 128, 16),
    "green": (36, 150, 50),
    "lime": (150, 230, 60),
    "teal": (12, 124, 124),
    "cyan": (70, 220, 235),
    "blue": (40, 80, 220),
    "navy": (16, 22, 104),
    "purple": (122, 40, 160),
    "magenta": (225, 45, 205),
    "pink": (250, 168, 196),
    "brown": (120, 68, 28),
    "gray": (108, 110, 112),
    "black": (16, 16, 18),
}
SIZES: dict[str, float] = {"small": 4.2, "medium": 5.9, "large": 8.0}  # radius in pixels, +-0.5
TINT, NOISE = 20, 12  # largest deviation of an object's color and of a pixel, in 0..255
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "bar")
CELLS = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
DOTS = ("red", "orange", "yellow", "olive")  # colors of the dot inside an object
FIRST_WORDS = tuple(a + b for a in "bdfgjkmnrtvz" for b in ("abo", "eki", "omi"))
SECOND_WORDS = tuple(
    a + b for a in ("br", "cl", "dr", "fl", "gr", "pl", "st", "tr") for b in ("azz", "eld", "isp", "oam")
)

_SPLITS: dict[str, int] = {"train": 1, "validation": 2, "test": 3}
_GOLDEN, _MIX1, _MIX2 = -7046029254386353131, -4658895280553007687, -7723592293110705685  # splitmix64, signed
_NAMES = len(FIRST_WORDS) * len(SECOND_WORDS)


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes. cell, color, size, shape, dot: int64 `[n, 4]`, in reading order; cell -1 means no object."""

    split: Split
    index: Tensor
    cell: Tensor
    color: Tensor
    size: Tensor
    shape: Tensor
    dot: Tensor


@dataclass(frozen=True)
class SceneObject:
    """One object, described in words."""

    cell: str
    color: str
    size: str
    shape: str
    dot: str

    @property
    def name(self) -> str:
        """Its made-up two-word name."""
        return lexicon()[self.color, self.size, self.shape, self.dot]


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """The finalizer of splitmix64 on int64 of any shape (with overflow)."""
    x = (x ^ _logical_shift(x, 30)) * _MIX1
    x = (x ^ _logical_shift(x, 27)) * _MIX2
    return x ^ _logical_shift(x, 31)


def dice(split: Split, index: Tensor, start: int, count: int) -> Tensor:
    """Random numbers `start .. start+count-1` of scenes `index` `[n]`: int64 `[n, count]` in `0 .. 2**31 - 1`."""
    scene = mix(index * 4 + _SPLITS[split])
    slots = torch.arange(start + 1, start + count + 1, device=index.device)
    return _logical_shift(mix(scene[:, None] + slots * _GOLDEN), 33)


@cache
def lexicon() -> dict[tuple[str, str, str, str], str]:
    """Fixed random table: (color, size, shape, dot color) -> a unique two-word name."""
    order = torch.argsort(_logical_shift(mix(torch.arange(1, _NAMES + 1) * _GOLDEN), 1), stable=True).tolist()
    kinds = [(color, size, shape, dot) for color in COLORS for size in SIZES for shape in SHAPES for dot in DOTS]
    words = [f"{first} {second}" for first in FIRST_WORDS for second in SECOND_WORDS]
    return {kind: words[order[i]] for i, kind in enumerate(kinds)}


def scenes(split: Split, index: Tensor) -> Scenes:
    """Scenes `index` int64 `[n]` of a split.

    Splits are disjoint: a weighted sum of colors, sizes, shapes, dots and cells of a scene is 0 (test), 1 (validation)
    or 2..7 (train) modulo 8; the first object's color is shifted to reach it.
    """
    rolls = dice(split, index, 0, 32)
    count = 1 + (rolls[:, 0] % 20 >= 3).long() + (rolls[:, 0] % 20 >= 8).long() + (rolls[:, 0] % 20 >= 14).long()
    cells = torch.argsort(rolls[:, 1:10], dim=1, stable=True)[:, :MOST_OBJECTS]
    absent = torch.arange(MOST_OBJECTS, device=index.device) >= count[:, None]
    cell = cells.masked_fill(absent, len(CELLS)).sort(dim=1).values
    cell = cell.masked_fill(cell == len(CELLS), -1)
    present = (cell >= 0).long()
    color, size = rolls[:, 10:14] % len(COLORS) * present, rolls[:, 14:18] % len(SIZES) * present
    shape, dot = rolls[:, 18:22] % len(SHAPES) * present, rolls[:, 22:26] % len(DOTS) * present
    zero = rolls[:, 26] * 0
    target = {"test": zero, "validation": zero + 1, "train": 2 + rolls[:, 26] % 6}[split]
    total = color.sum(1) + (3 * size + 5 * shape + 7 * dot + cell * present).sum(1)
    color = torch.cat([(color[:, :1] + (target - total)[:, None] % 8) % len(COLORS), color[:, 1:]], dim=1)
    return Scenes(split, index, cell, color, size, shape, dot)


def scene_objects(batch: Scenes) -> list[tuple[SceneObject, ...]]:
    """The objects of every scene, in words and in reading order."""
    colors, sizes = tuple(COLORS), tuple(SIZES)
    rows = torch.stack([batch.cell, batch.color, batch.size, batch.shape, batch.dot], dim=-1).tolist()
    return [
        tuple(SceneObject(CELLS[c], colors[k], sizes[s], SHAPES[f], DOTS[d]) for c, k, s, f, d in row if c >= 0)
        for row in rows
    ]


def _distance(shape: int, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Signed distance in pixels (negative inside) of one shape of radius `r`, at offsets `x`, `y` from its center."""
    ax, ay = x.abs(), y.abs()
    if shape == 0:  # circle
        return _root(x * x + y * y) - r
    if shape == 1:  # square
        return torch.maximum(ax, ay) - 0.86 * r
    if shape == 2:  # triangle, apex up
        return torch.maximum(y - 0.72 * r, 0.87 * ax - 0.5 * y - 0.52 * r)
    if shape == 3:  # diamond
        return 0.7071 * (ax + ay - 1.12 * r)
    if shape == 4:  # cross
        wide, thin = 1.0 * r, 0.34 * r
        return torch.minimum(torch.maximum(ax - wide, ay - thin), torch.maximum(ax - thin, ay - wide))
    return torch.maximum(ax - 1.1 * r, ay - 0.52 * r)  # bar


def _root(x: Tensor) -> Tensor:
    """Correctly rounded square root. On a CPU uses NumPy, since torch's threads cost milliseconds on a busy machine."""
    return x.sqrt() if x.is_cuda else torch.from_numpy(np.sqrt(x.numpy()))


def draw(batch: Scenes) -> Tensor:
    """Pixels uint8 `[n, 3, 64, 64]` of a batch, on the device of its tensors."""
    device, n = batch.index.device, batch.index.shape[0]
    rolls = dice(batch.split, batch.index, 64, 64)
    grid = torch.arange(SIDE, device=device, dtype=torch.float32) + 0.5
    back = 188 + rolls[:, 0:1] % 29 + rolls[:, 1:4] % 13  # [n, 3], light with a slight tint
    image = back.float()[:, :, None, None].expand(n, 3, SIDE, SIDE).clone()
    palette = torch.tensor(list(COLORS.values()), device=device)
    dots = torch.tensor([COLORS[name] for name in DOTS], device=device)
    radii = torch.tensor(list(SIZES.values()), device=device)
    for k in range(MOST_OBJECTS):
        jitter = rolls[:, 8 + 12 * k : 20 + 12 * k]
        r = radii[batch.size[:, k]] + (jitter[:, 0] % 101 - 50).float() / 100
        room = (10.4 - r).clamp(0.5, 4.0)
        cell = batch.cell[:, k].clamp(min=0)
        x0 = 10.67 + 21.33 * (cell % 3) + room * (jitter[:, 1] % 201 - 100).float() / 100
        y0 = 10.67 + 21.33 * (cell // 3) + room * (jitter[:, 2] % 201 - 100).float() / 100
        x, y = grid[None, None, :] - x0[:, None, None], grid[None, :, None] - y0[:, None, None]
        radius = r[:, None, None]
        distance = torch.stack([_distance(s, x, y, radius) for s in range(len(SHAPES))], dim=1)  # [n, 6, 64, 64]
        own_shape = batch.shape[:, k][:, None, None, None].expand(n, 1, SIDE, SIDE)
        cover = (0.5 - distance.gather(1, own_shape)).clamp(0, 1) * (batch.cell[:, k] >= 0)[:, None, None, None]
        color = (palette[batch.color[:, k]] + jitter[:, 3:6] % (2 * TINT + 1) - TINT).float()[:, :, None, None]
        image = image + cover * (color - image)
        inner = (0.5 - (_root(x * x + y * y) - 0.42 * radius)).clamp(0, 1) * (batch.cell[:, k] >= 0)[:, None, None]
        color = (dots[batch.dot[:, k]] + jitter[:, 6:9] % (2 * TINT + 1) - TINT).float()[:, :, None, None]
        image = image + inner[:, None] * (color - image)
    noise = dice(batch.split, batch.index, 4096, SIDE * SIDE).view(n, 1, SIDE, SIDE) % (2 * NOISE + 1) - NOISE
    return (image + noise).round().clamp(0, 255).to(torch.uint8)
