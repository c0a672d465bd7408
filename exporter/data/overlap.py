"""Overlap check: no picture may be used for both calibration and evaluation. Compares contents, not names.

Identical pixels are detected by their hash; re-encoded, scaled, recolored, slightly cropped and bordered copies by
`picture_features`. Rotated and mirrored copies are not detected.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL.Image import Image, Resampling, fromarray

from exporter.data.picture_features import MOST_BITS, SIDE, Look, differing_bits, is_copy, look
from exporter.data.tasks.sample import Sample
from exporter.errors import DataError

SHOWN = 5  # samples named in an error
OLD_BITS, OLD_SIDE = 8, 16  # looks of mmq 0.1 before imagehash: a hash, then one smaller thumbnail


@dataclass(frozen=True)
class Trace:
    """Record of a calibration picture in a manifest.

    identity: the sample's. key: `image_key`. look: without thumbnails for a flat picture or an old manifest.
    """

    identity: str
    key: str
    look: Look

    def as_json(self) -> dict[str, str]:
        """As plain data; the look is base64 of its thumbnails, 3,072 bytes each."""
        entry = {"id": self.identity, "image": self.key}
        if not self.look.thumbnails:
            return entry
        content = b"".join(thumbnail.tobytes() for thumbnail in self.look.thumbnails)
        return entry | {"look": base64.b64encode(content).decode()}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Trace":
        """The inverse of `as_json`; also reads looks of older manifests. DataError if the look cannot be decoded."""
        try:
            content = base64.b64decode(entry.get("look", ""), validate=True)
            return cls(entry["id"], entry["image"], _decoded(np.frombuffer(content, np.uint8)))
        except (TypeError, ValueError):
            raise DataError(
                f"the manifest's look of sample {entry['id']} is damaged", "export the artifact again"
            ) from None


def _decoded(content: np.typing.NDArray[np.uint8]) -> Look:
    """ValueError if the length fits neither this version's looks nor older ones."""
    if len(content) == OLD_BITS + OLD_SIDE * OLD_SIDE * 3:
        small = fromarray(content[OLD_BITS:].reshape(OLD_SIDE, OLD_SIDE, 3))
        return Look((np.asarray(small.resize((SIDE, SIDE), Resampling.BICUBIC)),))
    return Look(tuple(content.reshape(-1, SIDE, SIDE, 3)))


def image_key(image: Image) -> str:
    """sha256 over size and RGB pixels, equal for the same picture in different lossless files."""
    pixels = image.convert("RGB")
    digest = hashlib.sha256(f"{pixels.width}x{pixels.height}:".encode())
    digest.update(pixels.tobytes())
    return digest.hexdigest()


class LookIndex:
    """Looks of many pictures, for comparison with single pictures."""

    def __init__(self, named: Iterable[tuple[str, Look]]) -> None:
        self._looks = [(name, look) for name, look in named if look.thumbnails]
        looks = [look for _, look in self._looks]
        self._hashes = np.concatenate([np.empty((0, 8), np.uint8), *(look.hashes for look in looks)])
        self._owners = np.repeat(np.arange(len(looks)), [len(look.hashes) for look in looks])
        self._whole = np.concatenate([np.empty((0, 8), np.uint8), *(look.whole for look in looks)])
        self._whole_owners = np.repeat(np.arange(len(looks)), [len(look.whole) for look in looks])

    def copies(self, other: Look) -> list[str]:
        """Names of the pictures that `other` is a copy of."""
        near = [self._owners[differing_bits(self._hashes, bits) <= MOST_BITS] for bits in other.whole]
        near += [self._whole_owners[differing_bits(self._whole, bits) <= MOST_BITS] for bits in other.hashes]
        candidates = np.unique(np.concatenate(near)) if near else np.empty(0, np.int64)
        return [name for name, look in (self._looks[k] for k in candidates) if is_copy(look, other)]


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
    looks, shared = LookIndex((trace.identity, trace.look) for trace in calibration), []
    for sample in evaluation if calibration else ():
        image = sample.image()
        match = keys.get(image_key(image))
        copies = [] if match else looks.copies(look(image))
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
