"""No picture may be both calibrated on and evaluated on. Pictures are compared by their pixels, not their names."""

import hashlib
from collections.abc import Sequence

from PIL.Image import Image

from exporter.errors import DataError
from exporter.tasks.sample import Sample

SHOWN = 5


def image_key(image: Image) -> str:
    """sha256 over size and RGB pixels: the same picture in another lossless file has the same key."""
    pixels = image.convert("RGB")
    digest = hashlib.sha256(f"{pixels.width}x{pixels.height}:".encode())
    digest.update(pixels.tobytes())
    return digest.hexdigest()


def check_disjoint(calibration: Sequence[Sample], evaluation: Sequence[Sample]) -> None:
    """DataError naming the first evaluation samples whose picture is also calibrated on, and how many there are.

    It finds equal pixels only: a picture that was resized or compressed again passes.
    """
    keys = {image_key(sample.image()): sample.identity for sample in calibration}
    shared = [(s.identity, keys[key]) for s in evaluation if (key := image_key(s.image())) in keys]
    if not shared:
        return
    names = ", ".join(
        f"{tested} (calibrated on as {seen})" if tested != seen else tested for tested, seen in shared[:SHOWN]
    )
    rest = f" and {len(shared) - SHOWN} more" if len(shared) > SHOWN else ""
    raise DataError(
        f"{len(shared)} evaluation samples show a picture that is also calibrated on: {names}{rest}",
        "a score on data the model was fitted to proves nothing; keep train and test pictures apart",
    )
