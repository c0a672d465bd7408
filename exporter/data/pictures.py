"""Opening of pictures: conversion of any mode to 8-bit RGB, limits on pixels and aspect ratio.

Pillow's own conversion to RGB clips 16-bit and float values at 255 and shows the colors under transparent pixels. For
some formats, Pillow runs another program (Ghostscript for EPS): mmq opens only `FORMATS`, whatever a file is called.
"""

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from exporter.out_of_memory import is_shortage

MOST_LETTERS = 120  # of a reason
MOST_ASPECT = 200  # processors scale the shorter side to a fixed size, so the longer side must be limited
WIDE = ("I;16", "I;16L", "I;16B", "I;16N", "I;16S", "I")  # integer modes of more than 8 bits
SCALED_BY_READER = ("PNG", "PPM")  # formats for which Pillow scales wide integers to 0..65535


FORMATS = (
    *("AVIF", "BMP", "DDS", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF"),
    *("WEBP", "XBM"),
)
SAMPLE_FORMAT, SIGNED = 339, 2  # a tag of TIFF, and its value for signed integers


class PictureError(Exception):
    """A picture cannot be used; the message gives the reason."""


def open_picture(path: Path) -> Image.Image:
    """Open a picture as 8-bit RGB, rotated by its EXIF orientation; the first frame of an animation.

    PictureError if it cannot be read, if the range of its values is unknown, or, before decoding, if it has too many
    pixels or its aspect ratio is too large. A lack of memory passes through.
    """
    if path.exists() and not path.is_file():  # opening a pipe would block forever
        raise PictureError("it is not a file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with opened(path) as image:
                return _decoded(image)
    except PictureError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise PictureError(f"it has more than {Image.MAX_IMAGE_PIXELS} pixels") from None
    except UnidentifiedImageError:
        raise PictureError("it cannot be read as a picture") from None
    except Exception as error:  # Pillow's readers raise many kinds on damaged files
        if is_shortage(error):
            raise
        reason = " ".join(str(error).split())[:MOST_LETTERS]
        raise PictureError(f"it cannot be read ({reason or type(error).__name__})") from None


def _decoded(image: Image.Image) -> Image.Image:
    check_sides(image.size)
    if SIGNED in getattr(image, "tag_v2", {}).get(SAMPLE_FORMAT, ()) and image.mode not in WIDE:
        raise PictureError("its values are signed; save it with 8 or 16 unsigned bits")
    return to_rgb(ImageOps.exif_transpose(image), image.format or "")


def opened(source: Path | BinaryIO) -> Image.Image:
    """Pillow's image of a file in one of `FORMATS`; its pixels are decoded later. Pillow's errors pass through."""
    Image.init()
    return Image.open(source, formats=[name for name in FORMATS if name in Image.OPEN])


def check_sides(size: tuple[int, int]) -> None:
    """PictureError if one side is more than `MOST_ASPECT` times as long as the other."""
    if max(size) > MOST_ASPECT * min(size):
        raise PictureError(f"{size[0]} x {size[1]} pixels; one side may be at most {MOST_ASPECT} times the other")


def to_rgb(image: Image.Image, file_format: str = "") -> Image.Image:
    """Convert a picture of any mode to 8-bit RGB. Transparent pixels become white, as in vLLM.

    file_format: Pillow's name of the file format, which may determine the range of the values.
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
    """Convert 16-bit integers, or 8-bit ones in a wider type, to 8 bits. PictureError for values of another range."""
    least, most = (int(values.min()), int(values.max())) if values.size else (0, 0)
    if least < 0 or most > 65535:
        raise PictureError(f"its values range from {least} to {most}; save it with 8 or 16 bits")
    if most <= 255 and file_format not in SCALED_BY_READER:
        return values.astype(np.uint8)
    return ((values.astype(np.int32) * 255 + 32767) // 65535).astype(np.uint8)


def _fractions(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Convert floats from 0 to 1, or from 0 to 255, to 8 bits. PictureError for values of another range."""
    wide = values.astype(np.float64)
    if not np.isfinite(wide).all() or wide.min() < 0 or wide.max() > 255:
        raise PictureError("its float values are outside of 0 to 1 and 0 to 255; save it with 8 or 16 bits")
    return np.rint(wide * 255 if wide.max() <= 1 else wide).astype(np.uint8)
