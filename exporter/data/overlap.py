"""No picture may be both calibrated on and evaluated on. Pictures are compared by what they show, not by their names.

Equal pixels are found by a hash of them, and copies that were scaled or compressed again by their look: a 64-bit hash
of the signs of low frequencies (after Zauner, 2010, "pHash"), then a 16 x 16 thumbnail in color. The hash alone would
not do: among drawings on the same background it is equal for pictures that differ in a color. Bounds are measured in
`docs/explanation/evaluation.md`; copies that were cropped, turned, mirrored or recolored pass.
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

SHOWN = 5
SIDE, LOW = 32, 8  # of the gray picture that is transformed, and how many frequencies of it are kept each way
THUMBNAIL = 16
BITS_BYTES = 8
MOST_BITS = 4  # of 64 that may differ
MOST_STEPS = 2.5  # mean difference of thumbnails, in steps of 0..255
FLAT = 2.0  # standard deviation below which a picture has no look: its hash would be chance


@dataclass(frozen=True)
class Look:
    """How a picture looks. bits: uint8 `[8]`, 64 signs. thumbnail: f32 `[16, 16, 3]`, 0..255. flat: no features."""

    bits: NDArray[np.uint8]
    thumbnail: NDArray[np.float32]
    flat: bool


@dataclass(frozen=True)
class Trace:
    """What a manifest keeps of a picture that was calibrated on.

    identity: the sample's. key: `image_key`. look: None when the manifest is older than looks, or the picture is flat.
    """

    identity: str
    key: str
    look: Look | None

    def as_json(self) -> dict[str, str]:
        """Plain data; the look is base64 of its bits and its thumbnail, 776 bytes."""
        kept = {"id": self.identity, "image": self.key}
        if self.look is None or self.look.flat:
            return kept
        content = self.look.bits.tobytes() + self.look.thumbnail.astype(np.uint8).tobytes()
        return kept | {"look": base64.b64encode(content).decode()}

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> "Trace":
        """The inverse of `as_json`, but for flat looks. DataError when the look is none."""
        if "look" not in kept:
            return cls(kept["id"], kept["image"], None)
        try:
            content = np.frombuffer(base64.b64decode(kept["look"], validate=True), np.uint8)
            thumbnail = content[BITS_BYTES:].reshape(THUMBNAIL, THUMBNAIL, 3).astype(np.float32)
        except (TypeError, ValueError):
            raise DataError(
                f"the manifest's look of sample {kept['id']} is damaged", "export the artifact again"
            ) from None
        return cls(kept["id"], kept["image"], Look(content[:BITS_BYTES], thumbnail, False))


def image_key(image: Image) -> str:
    """sha256 over size and RGB pixels: the same picture in another lossless file has the same key."""
    pixels = image.convert("RGB")
    digest = hashlib.sha256(f"{pixels.width}x{pixels.height}:".encode())
    digest.update(pixels.tobytes())
    return digest.hexdigest()


def look(image: Image) -> Look:
    """Hash and thumbnail; both are nearly the same for another size or compression of the picture."""
    gray = np.asarray(image.convert("L").resize((SIDE, SIDE), Resampling.LANCZOS), np.float64)
    low = _cosines() @ gray @ _cosines().T  # [9, 9]: the discrete cosine transform's lowest frequencies
    chosen = np.append(low[:LOW, :LOW].ravel()[1:], low[LOW, 0])  # 64 without the mean
    small = image.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Resampling.BOX)
    return Look(np.packbits(chosen > np.median(chosen)), np.asarray(small, np.float32), bool(gray.std() < FLAT))


@cache
def _cosines() -> NDArray[np.float64]:
    """Rows of the transform, `[9, 32]`."""
    frequency, place = np.arange(LOW + 1)[:, None], np.arange(SIDE)[None, :]
    return np.cos(np.pi * (2 * place + 1) * frequency / (2 * SIDE))


def alike(one: Look, other: Look) -> bool:
    """Whether two pictures are taken for copies of each other."""
    return bool(_Seen([("", one)]).find(other))


class _Seen:
    """Looks of many pictures, to compare with one after the other."""

    def __init__(self, named: Iterable[tuple[str, Look]]) -> None:
        kept = [(name, seen) for name, seen in named if not seen.flat]
        self._names = [name for name, _ in kept]
        self._bits = np.array([seen.bits for _, seen in kept], np.uint8).reshape(-1, 8)
        self._thumbnails = [seen.thumbnail for _, seen in kept]

    def find(self, other: Look) -> list[str]:
        """Names of the pictures that `other` is taken for a copy of."""
        if other.flat:
            return []
        differing = np.unpackbits(self._bits ^ other.bits, axis=1).sum(axis=1)
        near = np.flatnonzero(differing <= MOST_BITS)
        return [self._names[i] for i in near if np.abs(self._thumbnails[i] - other.thumbnail).mean() <= MOST_STEPS]


def traces(samples: Iterable[Sample]) -> list[Trace]:
    """What is kept of every sample's picture; each is opened once."""
    found = []
    for sample in samples:
        image = sample.image()
        found.append(Trace(sample.identity, image_key(image), look(image)))
    return found


def check_disjoint(calibration: Sequence[Trace], evaluation: Sequence[Sample]) -> None:
    """DataError naming the first evaluation samples whose picture is also calibrated on, and how many there are."""
    keys = {trace.key: trace.identity for trace in calibration}
    seen, shared = _Seen((trace.identity, trace.look) for trace in calibration if trace.look), []
    for sample in evaluation if calibration else ():
        image = sample.image()
        same = keys.get(image_key(image))
        copies = [] if same else seen.find(look(image))
        if same or copies:
            shared.append(_told(sample.identity, same, copies))
    if not shared:
        return
    named = ", ".join(shared[:SHOWN]) + (f" and {len(shared) - SHOWN} more" if len(shared) > SHOWN else "")
    raise DataError(
        f"{len(shared)} evaluation samples show a picture that is also calibrated on: {named}",
        "a score on data the model was fitted to proves nothing; keep train and test pictures apart",
    )


def _told(tested: str, same: str | None, copies: Sequence[str]) -> str:
    if same is None:
        return f"{tested} (looks like {copies[0]})"
    return tested if tested == same else f"{tested} (calibrated on as {same})"
