"""Pictures of any mode as 8-bit RGB, and what may not be opened: too many pixels, or sides that are too unlike.

Pillow's own conversion to RGB cuts 16-bit and float values at 255 and shows what lies under transparent pixels.
"""

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

MOST_ASPECT = 200  # processors scale the shorter side to their size: the longer one must stay small enough for memory
WIDE = ("I;16", "I;16L", "I;16B", "I;16N", "I;16S", "I")  # whole numbers of more than 8 bits
SCALED_BY_READER = ("PNG", "PPM")  # formats whose wide numbers Pillow gives as 0 to 65535


class PictureError(Exception):
    """Why a picture cannot be used."""


def open_picture(path: Path) -> Image.Image:
    """The picture in 8-bit RGB, turned as its EXIF data says; of an animated one the first frame.

    PictureError when its values have no known range or its sides are too unlike, before it is decoded. Pillow's own
    errors pass through.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            check_sides(image.size)
            return to_rgb(ImageOps.exif_transpose(image), image.format or "")


def check_sides(size: tuple[int, int]) -> None:
    """PictureError when one side is more than `MOST_ASPECT` times as long as the other."""
    if max(size) > MOST_ASPECT * min(size):
        raise PictureError(f"it has {size[0]} x {size[1]} pixels; one side may be {MOST_ASPECT} times the other")


def to_rgb(image: Image.Image, file_format: str = "") -> Image.Image:
    """8-bit RGB of a picture of any mode. Transparent pixels show white, as vLLM shows them.

    file_format: Pillow's name of the format it was read from, which may tell the range of its values.
    """
    if image.mode in WIDE:
        return _gray(_whole_numbers(np.asarray(image), file_format if image.mode == "I" else "PNG"))
    if image.mode == "F":
        return _gray(_fractions(np.asarray(image)))
    if image.has_transparency_data or image.mode in ("La", "RGBa"):
        whole = image.convert("RGBA")
        white = Image.new("RGBA", whole.size, "white")
        return Image.alpha_composite(white, whole).convert("RGB")
    return image.convert("RGB")


def _gray(values: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(values).convert("RGB")


def _whole_numbers(values: NDArray[np.generic], file_format: str) -> NDArray[np.uint8]:
    """Whole numbers as 8 bits: of 16, or of 8 in a wider type. PictureError for others, whose range nobody knows."""
    least, most = (int(values.min()), int(values.max())) if values.size else (0, 0)
    if least < 0 or most > 65535:
        raise PictureError(f"its values go from {least} to {most}; save it with 8 or 16 bits")
    if most <= 255 and file_format not in SCALED_BY_READER:
        return values.astype(np.uint8)
    return ((values.astype(np.int32) * 255 + 32767) // 65535).astype(np.uint8)


def _fractions(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Floats from 0 to 1, or from 0 to 255, as 8 bits. PictureError for others."""
    wide = values.astype(np.float64)
    if not np.isfinite(wide).all() or wide.min() < 0 or wide.max() > 255:
        raise PictureError("its values are floats beyond 0 to 1 and 0 to 255; save it with 8 or 16 bits")
    return np.rint(wide * 255 if wide.max() <= 1 else wide).astype(np.uint8)
