"""Pictures of every mode become the same 8-bit RGB; what would take all memory is refused before it is decoded."""

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from exporter.data import samples
from exporter.data.pictures import PictureError, check_sides, open_picture, to_rgb
from exporter.errors import DataError
from exporter.pipeline.picture_question import question
from tests import layouts

RAMP = np.linspace(0, 255, 256).round().astype(np.uint8).reshape(16, 16)
WIDE = (RAMP.astype(np.uint16)) * 257  # 0 to 65535


def saved(folder: Path, image: Image.Image, name: str, **options: Any) -> Path:
    image.save(folder / name, **options)
    return folder / name


def pixels(path: Path) -> np.ndarray[Any, Any]:
    picture = open_picture(path)
    assert picture.mode == "RGB"
    return np.asarray(picture)


SAVED = {
    "a.png": Image.fromarray(RAMP),
    "16-bit.png": Image.fromarray(WIDE),
    "16-bit.tif": Image.fromarray(WIDE),
    "16-bit.pgm": Image.fromarray(WIDE),
    "32-bit of 16.tif": Image.fromarray(WIDE.astype(np.int32)),
    "32-bit of 8.tif": Image.fromarray(RAMP.astype(np.int32)),
    "float to 1.tif": Image.fromarray(RAMP.astype(np.float32) / 255),
    "float to 255.tif": Image.fromarray(RAMP.astype(np.float32)),
    "gray and alpha.png": Image.merge("LA", (Image.fromarray(RAMP), Image.new("L", (16, 16), 255))),
    "palette.gif": Image.fromarray(RAMP).convert("P"),
    "color.bmp": Image.fromarray(RAMP).convert("RGB"),
    "inks.tif": Image.fromarray(RAMP).convert("RGB").convert("CMYK"),
}


@pytest.mark.parametrize("name", SAVED)
def test_every_mode_shows_the_same_ramp(tmp_path: Path, name: str) -> None:
    shown = pixels(saved(tmp_path, SAVED[name], name))
    assert (shown == RAMP[:, :, None]).all()


def test_big_endian_sixteen_bits(tmp_path: Path) -> None:
    rows = WIDE.astype(">u2").tobytes()
    content = {256: 16, 257: 16, 258: 16, 259: 1, 262: 1, 273: 8, 277: 1, 278: 16, 279: len(rows)}
    entries = b"".join(
        struct.pack(">HHI", tag, 4, 1) + struct.pack(">I", value) for tag, value in sorted(content.items())
    )
    header = b"MM\0*" + struct.pack(">I", 8 + len(rows))
    (tmp_path / "b.tif").write_bytes(header + rows + struct.pack(">H", len(content)) + entries + struct.pack(">I", 0))
    with Image.open(tmp_path / "b.tif") as image:
        assert image.mode == "I;16B"
    assert (pixels(tmp_path / "b.tif") == RAMP[:, :, None]).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparent_pixels_show_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (10, 10, 10, 0))
    image.paste((10, 10, 10, 255), (0, 0, 4, 2))
    converted = image.convert(mode)
    name = "a.tif" if mode == "PA" else "a.png"
    shown = pixels(saved(tmp_path, converted, name))
    assert (shown[:2] == 10).all()
    assert (shown[2:] == (255 if mode != "P" or converted.has_transparency_data else 10)).all()


def test_a_palette_with_one_transparent_color(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    shown = pixels(saved(tmp_path, image, "a.gif", transparency=1))
    assert (shown == 255).all()


def test_of_an_animated_picture_the_first_frame_counts(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert tuple(pixels(tmp_path / "a.gif")[0, 0]) == (255, 0, 0)


@pytest.mark.parametrize(
    "values",
    [np.array([[-1, 5]], np.int32), np.array([[0, 70000]], np.int32), np.array([[0, 256.5]], np.float32),
     np.array([[-0.1, 1]], np.float32), np.array([[np.nan, 1]], np.float32), np.array([[np.inf, 1]], np.float32)],
)  # fmt: skip
def test_values_without_a_known_range_are_refused(values: Any) -> None:
    with pytest.raises(PictureError, match="save it with 8 or 16 bits"):
        to_rgb(Image.fromarray(values))


def bomb(width: int, height: int) -> bytes:
    """A PNG of some hundred bytes that claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def test_all_pictures_that_cannot_be_used_are_named_at_once(tmp_path: Path) -> None:
    contents = {
        "bomb.png": (bomb(60_000, 60_000), "has more than"),
        "large.png": (bomb(10_000, 10_000), "has more than"),
        "thin.png": (bomb(1, 100_000), "1 x 100000 pixels; one side may be at most 200 times the other"),
        "torn.png": (bomb(64, 64), "cannot be read"),
        "text.png": (b"hello", "cannot be read"),
        "empty.jpg": (b"", "cannot be read"),
    }
    (tmp_path / "train").mkdir()
    for name, (content, _) in contents.items():
        (tmp_path / "train" / name).write_bytes(content)
    Image.fromarray(np.array([[-7, 5]], np.int32)).save(tmp_path / "train" / "wide.tif")
    lines = [f'{{"file_name": "{name}", "caption": "c"}}' for name in [*contents, "wide.tif"]]
    layouts.write(tmp_path / "train" / "metadata.jsonl", "\n".join(lines))
    with pytest.raises(DataError, match="7 problems") as caught:
        samples("folder", tmp_path, "captioning", "train", 99, 0)
    for name, (_, reason) in contents.items():
        (line,) = [line for line in caught.value.message.splitlines() if f"{name}'" in line]
        assert reason in line
    assert "its values range from -7 to 5" in caught.value.message


def test_sides_may_differ_within_reason() -> None:
    check_sides((200, 1))
    check_sides((3, 600))
    with pytest.raises(PictureError, match="201 x 1"):
        check_sides((201, 1))
    with pytest.raises(PictureError, match="0 x 5"):
        check_sides((0, 5))


def test_no_picture_makes_pillow_run_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow decodes EPS with Ghostscript, which executes the file; its name may end with .png."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(PictureError, match="it cannot be read as a picture"):
        open_picture(tmp_path / "a.png")
    assert not (tmp_path / "ran").exists()


def test_signed_bytes_are_refused(tmp_path: Path) -> None:
    """Pillow reads them as unsigned: -1 would be 255."""
    Image.fromarray(RAMP).save(tmp_path / "a.tif", tiffinfo={339: 2})
    with pytest.raises(PictureError, match="its values are signed"):
        open_picture(tmp_path / "a.tif")


@pytest.mark.parametrize("content", [bomb(60_000, 60_000), bomb(10_000, 10_000), bomb(64, 64), b"", b"hello"])
def test_a_question_about_a_damaged_picture_is_one_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png cannot be used: it (has more than|cannot be read)"):
        question(tmp_path / "a.png", "what?", 9, False)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"torn")])
def test_a_picture_that_changes_after_it_was_selected_is_one_error(damage: Any, tmp_path: Path) -> None:
    layouts.picture(tmp_path / "train" / "a.png")
    layouts.write(tmp_path / "train" / "metadata.jsonl", '{"file_name": "a.png", "caption": "c"}')
    (sample,) = samples("folder", tmp_path, "captioning", "train", 1, 0)
    damage(tmp_path / "train" / "a.png")
    with pytest.raises(DataError, match=r"a\.png changed while the job ran: it cannot be read"):
        sample.image()


def test_a_pipe_is_no_picture(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", tmp_path, Path("/dev/zero")):
        with pytest.raises(PictureError, match="it is not a file"):
            open_picture(path)
