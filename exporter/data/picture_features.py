"""Features of a picture by which its copies are detected: thumbnails, their perceptual hashes, and how well two fit.

A copy may be re-encoded, scaled, recolored, cropped by up to a tenth at each side, or have a border of one color. The
hash (`imagehash.phash`: signs of 64 low frequencies) selects candidates; `fit` then aligns the two thumbnails and fits
the colors of one to the other. `bench/picture_copies.py` measures the limits (docs/measurements/picture-copies.md).
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import product

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Resampling

SIDE = 32  # side of a thumbnail in pixels; phash reads 32 x 32
COMPARED = 24  # side at which two thumbnails are compared
FLAT = 2.0  # pictures of a smaller standard deviation are not compared: their hash would be noise
RICH = 0.36  # smallest spread of edges (`_edge_spread`) of a picture whose crops and recolored copies are detected
MOST_BITS = 12  # most differing bits of 64 for a candidate
RICH_FIT, EXACT_FIT = 0.93, 0.985  # smallest share of variance that a copy explains: of rich pictures, of others
FAINT = 26.0  # contrast (standard deviation of the colors) below which EXACT_FIT holds for rich pictures too
MOST_STEPS = 2.5  # largest mean difference of pictures that are not rich, in steps of 0..255
LEAST_ALIKE = 0.75  # smallest correlation of a candidate before the alignment
BORDER = 0.25  # widest border at one side, as a share of the side
BORDER_STEPS = 6.0  # a line of a border differs by at most this from the outermost one, in steps of 0..255

Window = tuple[float, float, float, float]  # shares cut off left, top, right, bottom
WHOLE: Window = (0.0, 0.0, 0.0, 0.0)
_CUTS = ((0.0, 0.0), (0.05, 0.05), (0.1, 0.1), (0.1, 0.0), (0.0, 0.1), (0.05, 0.0), (0.0, 0.05))
WINDOWS: tuple[Window, ...] = tuple((left, top, right, low) for (left, right), (top, low) in product(_CUTS, _CUTS))
MOST_SHIFT, SHIFTS = 0.03, (0.02, 0.01, 0.005)  # how far the alignment moves an edge, and its steps


@dataclass(frozen=True)
class Look:
    """Thumbnails of a picture, uint8 `[32, 32, 3]`: of the whole and, if it has a border, of what is inside.

    No thumbnail for a picture without contrast.
    """

    thumbnails: tuple[NDArray[np.uint8], ...]

    @cached_property
    def images(self) -> list[Image.Image]:
        """The thumbnails as pictures."""
        return [Image.fromarray(thumbnail) for thumbnail in self.thumbnails]

    @cached_property
    def whole(self) -> NDArray[np.uint8]:
        """Hash of each thumbnail, `[thumbnails, 8]`."""
        return np.array([_phash(image) for image in self.images], np.uint8).reshape(-1, 8)

    @cached_property
    def rich(self) -> bool:
        """Whether the pattern is detailed enough to recognize a part of it, or the pattern in other colors."""
        return bool(self.images) and min(_edge_spread(image) for image in self.images) >= RICH

    @cached_property
    def windows(self) -> list[tuple[int, Window]]:
        """(thumbnail, window) of every row of `hashes`; only the whole for a picture that is not rich."""
        return [(i, window) for i in range(len(self.images)) for window in (WINDOWS if self.rich else (WHOLE,))]

    @cached_property
    def hashes(self) -> NDArray[np.uint8]:
        """Hashes of all windows, `[windows, 8]`."""
        return np.array([_phash(_cut(self.images[i], w, SIDE)) for i, w in self.windows], np.uint8).reshape(-1, 8)


def look(image: Image.Image) -> Look:
    """Thumbnails of a picture."""
    picture = image.convert("RGB")
    if np.asarray(picture.convert("L").resize((SIDE, SIDE), Resampling.LANCZOS), np.float32).std() < FLAT:
        return Look(())
    border = _border(picture)
    return Look(tuple(_thumbnail(picture, window) for window in (WHOLE, *([border] if any(border) else []))))


def is_copy(first: Look, other: Look) -> bool:
    """Whether one picture is a copy of the other; the order does not matter."""
    rich = first.rich and other.rich
    for part, whole in ((first, other), (other, first)):
        for k, bits in enumerate(whole.whole):
            for row in _candidates(part.hashes, bits):
                i, window = part.windows[row]
                if (rich or window == WHOLE) and _fits(part.images[i], whole.images[k], window, rich):
                    return True
    return False


def differing_bits(hashes: NDArray[np.uint8], bits: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Number of differing bits between every row of hashes `[..., 8]` and bits `[8]`."""
    return np.asarray(np.unpackbits(hashes ^ bits, axis=-1).sum(axis=-1), np.int64)


def _candidates(hashes: NDArray[np.uint8], bits: NDArray[np.uint8]) -> list[int]:
    """Rows of at most MOST_BITS differing bits, the six nearest ones."""
    distance = differing_bits(hashes, bits)
    return [int(row) for row in np.argsort(distance, kind="stable")[:6] if distance[row] <= MOST_BITS]


def _fits(image: Image.Image, other: Image.Image, window: Window, rich: bool) -> bool:
    """Whether `other` shows the window of `image`."""
    first, shown = _cut(image, window, COMPARED), _cut(other, WHOLE, COMPARED)
    if not rich:
        difference = np.abs(np.asarray(first, np.float32) - np.asarray(shown, np.float32)).mean()
        return bool(difference <= MOST_STEPS) and _explained(first, shown) > EXACT_FIT
    limit = EXACT_FIT if min(_contrast(first), _contrast(shown)) < FAINT else RICH_FIT
    aligned = _align(image, other, window)
    return aligned is not None and _explained(_cut(image, aligned, COMPARED), shown) > limit


def _align(image: Image.Image, other: Image.Image, start: Window) -> Window | None:
    """The window near `start` whose gray values correlate best with `other`; None if they hardly do at the start."""
    target = _gray(_cut(other, WHOLE, COMPARED))

    def alike(window: Window) -> float:
        return _correlation(_gray(_cut(image, window, COMPARED)), target)

    best, value = start, alike(start)
    if value < LEAST_ALIKE:
        return None
    for step in SHIFTS:
        for edge, move in product(range(4), (-step, step)):
            tried = tuple(cut + move * (k == edge) for k, cut in enumerate(best))
            if tried[edge] < 0 or abs(tried[edge] - start[edge]) > MOST_SHIFT:
                continue
            window: Window = (tried[0], tried[1], tried[2], tried[3])
            correlation = alike(window)
            if correlation > value:
                best, value = window, correlation
    return best


def _explained(first: Image.Image, second: Image.Image) -> float:
    """Share of one's variance that the other's colors explain by the best linear map; the larger of both directions."""
    a, b = (np.asarray(image, np.float64).reshape(-1, 3) for image in (first, second))
    return max(_regression(a, b), _regression(b, a))


def _regression(given: NDArray[np.float64], target: NDArray[np.float64]) -> float:
    design = np.c_[given, np.ones(len(given))]
    weights = np.linalg.lstsq(design, target, rcond=None)[0]
    variance = ((target - target.mean(axis=0)) ** 2).sum()
    return float(1 - ((target - design @ weights) ** 2).sum() / variance) if variance else 0.0


def _correlation(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    a, b = first - first.mean(), second - second.mean()
    norm = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / norm if norm else 0.0


def _cut(image: Image.Image, window: Window, side: int) -> Image.Image:
    """The window of a thumbnail, scaled to `side`."""
    left, top, right, low = window
    box = (left * image.width, top * image.height, (1 - right) * image.width, (1 - low) * image.height)
    return image.resize((side, side), Resampling.BICUBIC, box=box)


def _contrast(image: Image.Image) -> float:
    return float(np.asarray(image, np.float32).std(axis=(0, 1)).mean())


def _gray(image: Image.Image) -> NDArray[np.float32]:
    return np.asarray(image.convert("L"), np.float32)


def _phash(image: Image.Image) -> NDArray[np.uint8]:
    """64 bits as uint8 `[8]`."""
    return np.packbits(imagehash.phash(image).hash.ravel())


def _edge_spread(image: Image.Image) -> float:
    """Participation ratio of the gradient: 1 if all pixels lie on equally strong edges, near 0 for a lone outline."""
    gray = _gray(image)
    gradient = np.abs(np.diff(gray, axis=1))[:-1] + np.abs(np.diff(gray, axis=0))[:, :-1]
    squares = float((gradient * gradient).sum())
    return float(gradient.sum()) ** 2 / squares / gradient.size if squares else 0.0


def _thumbnail(picture: Image.Image, window: Window) -> NDArray[np.uint8]:
    left, top, right, low = window
    width, height = picture.size
    box = (left * width, top * height, (1 - right) * width, (1 - low) * height)
    large = min(width, height) > 2 * SIDE
    return np.asarray(picture.resize((SIDE, SIDE), Resampling.BOX if large else Resampling.LANCZOS, box=box))


def _border(picture: Image.Image) -> Window:
    """Shares of the sides that a border of one color takes; 0 where there is none, or a wider one than BORDER."""
    size = (min(picture.width, 256), min(picture.height, 256))
    pixels = np.asarray(picture.resize(size, Resampling.BOX), np.float32)
    columns = pixels.swapaxes(0, 1)
    left, top, right, low = (_rim(lines) for lines in (columns, pixels, columns[::-1], pixels[::-1]))
    return left, top, right, low


def _rim(lines: NDArray[np.float32]) -> float:
    """Share of the first lines, `[lines, pixels, 3]`, that have the mean color of the first one."""
    most = int(len(lines) * BORDER)
    steps = np.abs(lines[:most] - lines[:1].mean(axis=(0, 1))).mean(axis=(1, 2))
    width = int(np.argmax(steps > BORDER_STEPS)) if (steps > BORDER_STEPS).any() else most
    if width in (0, most):
        return 0.0
    return (width + (len(lines) > 100)) / len(lines)  # one more line: the scaled edge of the border mixes both sides
