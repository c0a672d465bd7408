"""Overlap check: no picture may be used for both calibration and evaluation. Compares contents, not names.

Identical pixels are detected by their hash. Rescaled or recompressed copies are detected by a 64-bit perceptual hash of
low frequencies (after Zauner, 2010, "pHash"), then by a 16 x 16 color thumbnail, because drawings on the same
background that differ only in a color have equal perceptual hashes. `docs/explanation/evaluation.md` measures the
thresholds; cropped, rotated, mirrored or recolored copies are not detected.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image, Resampling

from exporter.errors import DataError
from exporter.tasks.sample import Sample

SHOWN = 5  # samples named in an error
SIDE, LOW = 32, 8  # side of the transformed gray picture; frequencies used per axis
THUMBNAIL = 16  # side of the thumbnail in pixels
BITS_BYTES = 8
MOST_BITS = 4  # most differing bits of 64 for a copy
MOST_STEPS = 2.5  # largest mean difference of thumbnails for a copy, in steps of 0..255
FLAT = 2.0  # pictures of a smaller standard deviation are not compared: their hash would be noise


@dataclass(frozen=True)
class Look:
    """Features of a picture. bits: uint8 `[8]`, 64 signs. thumbnail: f32 `[16, 16, 3]`, 0..255. flat: no contrast."""

    bits: NDArray[np.uint8]
    thumbnail: NDArray[np.float32]
    flat: bool


@dataclass(frozen=True)
class Trace:
    """Record of a calibration picture in a manifest.

    identity: the sample's. key: `image_key`. look: None for a flat picture or an old manifest without looks.
    """

    identity: str
    key: str
    look: Look | None

    def as_json(self) -> dict[str, str]:
        """As plain data; the look is base64 of bits and thumbnail, 776 bytes."""
        entry = {"id": self.identity, "image": self.key}
        if self.look is None or self.look.flat:
            return entry
        content = self.look.bits.tobytes() + self.look.thumbnail.astype(np.uint8).tobytes()
        return entry | {"look": base64.b64encode(content).decode()}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Trace":
        """The inverse of `as_json`, except for flat looks. DataError if the look cannot be decoded."""
        if "look" not in entry:
            return cls(entry["id"], entry["image"], None)
        try:
            content = np.frombuffer(base64.b64decode(entry["look"], validate=True), np.uint8)
            thumbnail = content[BITS_BYTES:].reshape(THUMBNAIL, THUMBNAIL, 3).astype(np.float32)
        except (TypeError, ValueError):
            raise DataError(
                f"the manifest's look of sample {entry['id']} is damaged", "export the artifact again"
            ) from None
        return cls(entry["id"], entry["image"], Look(content[:BITS_BYTES], thumbnail, False))


def image_key(image: Image) -> str:
    """sha256 over size and RGB pixels, equal for the same picture in different lossless files."""
    pixels = image.convert("RGB")
    digest = hashlib.sha256(f"{pixels.width}x{pixels.height}:".encode())
    digest.update(pixels.tobytes())
    return digest.hexdigest()


def look(image: Image) -> Look:
    """Perceptual hash and thumbnail; both are nearly equal for rescaled or recompressed copies."""
    gray = np.asarray(image.convert("L").resize((SIDE, SIDE), Resampling.LANCZOS), np.float64)
    low = _cosines() @ gray @ _cosines().T  # [9, 9]: lowest frequencies of the discrete cosine transform
    coefficients = np.append(low[:LOW, :LOW].ravel()[1:], low[LOW, 0])  # 64 coefficients without the mean
    small = image.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Resampling.BOX)
    return Look(
        np.packbits(coefficients > np.median(coefficients)), np.asarray(small, np.float32), bool(gray.std() < FLAT)
    )


@cache
def _cosines() -> NDArray[np.float64]:
    """Rows of the discrete cosine transform, `[9, 32]`."""
    frequency, place = np.arange(LOW + 1)[:, None], np.arange(SIDE)[None, :]
    return np.cos(np.pi * (2 * place + 1) * frequency / (2 * SIDE))


class LookIndex:
    """Looks of many pictures, for comparison with single pictures."""

    def __init__(self, named: Iterable[tuple[str, Look]]) -> None:
        looks = [(name, look) for name, look in named if not look.flat]
        self._names = [name for name, _ in looks]
        self._bits = np.array([look.bits for _, look in looks], np.uint8).reshape(-1, 8)
        self._thumbnails = [look.thumbnail for _, look in looks]

    def find(self, other: Look) -> list[str]:
        """Names of the pictures that `other` is a copy of."""
        if other.flat:
            return []
        differing = np.unpackbits(self._bits ^ other.bits, axis=1).sum(axis=1)
        near = np.flatnonzero(differing <= MOST_BITS)
        return [self._names[i] for i in near if np.abs(self._thumbnails[i] - other.thumbnail).mean() <= MOST_STEPS]


def traces(samples: Iterable[Sample]) -> list[Trace]:
    """Traces of all samples; opens each picture once."""
    result = []
    for sample in samples:
        image = sample.image()
        result.append(Trace(sample.identity, image_key(image), look(image)))
    return result


def check_disjoint(calibration: Sequence[Trace], evaluation: Sequence[Sample]) -> None:
    """DataError if an evaluation picture is also a calibration picture; names the first ones and their number."""
    keys = {trace.key: trace.identity for trace in calibration}
    looks, shared = LookIndex((trace.identity, trace.look) for trace in calibration if trace.look), []
    for sample in evaluation if calibration else ():
        image = sample.image()
        match = keys.get(image_key(image))
        copies = [] if match else looks.find(look(image))
        if match or copies:
            shared.append(_describe(sample.identity, match, copies))
    if not shared:
        return
    named = ", ".join(shared[:SHOWN]) + (f" and {len(shared) - SHOWN} more" if len(shared) > SHOWN else "")
    raise DataError(
        f"{len(shared)} evaluation samples use a picture that is also used for calibration: {named}",
        "scores on calibration data are not valid; use different pictures for calibration and evaluation",
    )


def _describe(tested: str, match: str | None, copies: Sequence[str]) -> str:
    if match is None:
        return f"{tested} (looks like {copies[0]})"
    return tested if tested == match else f"{tested} (calibration sample {match})"
