"""Measure the overlap check: detected copies of each kind, of 20, and different pictures that it takes for copies.

    python -m bench.picture_copies [FOLDER ...]

Reads photographs of scikit-image and scikit-learn (`pip install scikit-image scikit-learn`; no network), the pictures
of every FOLDER, the demo scenes, the drawings of easy-vqa, drawn charts and drawn pages of text. Prints Markdown.
`docs/measurements/picture-copies.md` has the folders of its run.
"""

import io
import random
import sys
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

from exporter import data
from exporter.data.overlap import LookIndex
from exporter.data.picture_features import Look, is_copy, look

COPIES = 20
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
WORDS = ("lorem", "ipsum", "dolor", "sit", "amet", "consectetur", "elit", "sed", "do", "eiusmod", "tempor", "ut")
LEAST_BYTES = 12_000  # smaller files are icons
Picture = Image.Image


def jpeg(image: Picture, quality: int) -> Picture:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def crop(image: Picture, left: float, top: float, right: float, low: float) -> Picture:
    width, height = image.size
    return image.crop(
        (round(left * width), round(top * height), round(width - right * width), round(height - low * height))
    )


def border(image: Picture, share: float, color: tuple[int, int, int]) -> Picture:
    return ImageOps.expand(image, (round(share * image.width), round(share * image.height)), color)


def hue(image: Picture, degrees: int) -> Picture:
    h, s, v = image.convert("HSV").split()
    return Image.merge("HSV", (h.point(lambda x: (x + degrees * 256 // 360) % 256), s, v)).convert("RGB")


def gamma(image: Picture, power: float) -> Picture:
    return image.point([round(255 * (value / 255) ** power) for value in range(256)] * 3)


KINDS: dict[str, Callable[[Picture], Picture]] = {
    "JPEG, quality 75": lambda i: jpeg(i, 75),
    "JPEG, quality 30": lambda i: jpeg(i, 30),
    "half the size, JPEG 80": lambda i: jpeg(i.resize((i.width // 2, i.height // 2)), 80),
    "squeezed to 224 x 224": lambda i: i.resize((224, 224)),
    "cropped, 5 % at each side": lambda i: crop(i, 0.05, 0.05, 0.05, 0.05),
    "cropped, 10 % at each side": lambda i: crop(i, 0.1, 0.1, 0.1, 0.1),
    "cropped, 10 % at the left": lambda i: crop(i, 0.1, 0, 0, 0),
    "cropped, 3, 7, 8 and 2 %": lambda i: crop(i, 0.03, 0.07, 0.08, 0.02),
    "black border, 5 %": lambda i: border(i, 0.05, (0, 0, 0)),
    "white border, 10 %": lambda i: border(i, 0.1, (255, 255, 255)),
    "black bars above and below, 15 %": lambda i: ImageOps.expand(i, (0, round(0.15 * i.height)), (0, 0, 0)),
    "white bar at the right, 10 %": lambda i: ImageOps.expand(i, (0, 0, round(0.1 * i.width), 0), (255, 255, 255)),
    "gray": lambda i: i.convert("L").convert("RGB"),
    "sepia": lambda i: ImageOps.colorize(i.convert("L"), (30, 20, 10), (255, 240, 210)),
    "brightness x 1.3": lambda i: ImageEnhance.Brightness(i).enhance(1.3),
    "brightness x 0.7": lambda i: ImageEnhance.Brightness(i).enhance(0.7),
    "contrast x 1.4": lambda i: ImageEnhance.Contrast(i).enhance(1.4),
    "gamma 1.5": lambda i: gamma(i, 1.5),
    "saturation x 1.8": lambda i: ImageEnhance.Color(i).enhance(1.8),
    "hue + 28 degrees": lambda i: hue(i, 28),
    "cropped 2 to 5 %, gamma 1.2, border 5 %, JPEG 60": lambda i: jpeg(
        border(gamma(crop(i, 0.04, 0.03, 0.05, 0.02), 1.2), 0.05, (255, 255, 255)), 60
    ),
    "mirrored": ImageOps.mirror,
    "rotated by 5 degrees": lambda i: i.rotate(5),
}


def read(files: Iterable[Path]) -> list[Picture]:
    """Pictures of at most 640 x 640 pixels without those of one color; of files of equal pixels the first."""
    pictures: dict[str, Picture] = {}
    for file in sorted(files):
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
        picture.thumbnail((640, 640))
        if look(picture).thumbnails:
            pictures.setdefault(data.image_key(picture), picture)
    return list(pictures.values())


def folder(path: Path, least_bytes: int = LEAST_BYTES) -> list[Path]:
    return [p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.stat().st_size >= least_bytes]


def package(name: str, inside: str, least_bytes: int = LEAST_BYTES) -> list[Path]:
    """Picture files that a Python package ships; none where it is not installed."""
    spec = find_spec(name)
    roots = spec.submodule_search_locations or [] if spec else []
    return [file for root in roots for file in folder(Path(root) / inside, least_bytes)]


def demo(split: str, count: int) -> list[Picture]:
    return [sample.image() for sample in data.samples("demo", None, "captioning", split, count, 3)]


def charts(count: int) -> list[Picture]:
    """Line and bar charts in one style."""
    from matplotlib import pyplot

    pyplot.switch_backend("agg")
    rng, drawn = np.random.default_rng(1), []
    for k in range(count):
        figure, axes = pyplot.subplots(figsize=(4, 3), dpi=60)
        if k % 2:
            axes.bar(range(6), rng.random(6) * 10)
        else:
            axes.plot(rng.random(12).cumsum())
        axes.set_title(f"Chart {k}")
        file = io.BytesIO()
        figure.savefig(file)
        pyplot.close(figure)
        drawn.append(Image.open(file).convert("RGB"))
    return drawn


def pages(count: int) -> list[Picture]:
    """Pages of random words with the same margins."""
    rng, font, drawn = random.Random(1), ImageFont.load_default(12), []
    for _ in range(count):
        page = Image.new("RGB", (480, 620), "white")
        for y in range(30, 590, 16):
            line = ""
            while rng.random() > 0.03 and font.getlength(line) < 400:
                line += rng.choice(WORDS) + " "
            ImageDraw.Draw(page).text((35, y), line, fill="black", font=font)
        drawn.append(page)
    return drawn


def detected(pictures: list[Picture], change: Callable[[Picture], Picture]) -> int:
    return sum(is_copy(look(picture), look(change(picture))) for picture in pictures)


def print_detected(photographs: list[Picture], drawings: list[Picture]) -> None:
    rich = [picture for picture in photographs if look(picture).rich]
    sets = {
        "photographs, detailed": random.Random(5).sample(rich, min(COPIES, len(rich))),
        "all pictures": random.Random(5).sample(photographs, min(COPIES, len(photographs))),
        "demo scenes": drawings[:COPIES],
    }
    print("| copy | " + " | ".join(f"{name} ({len(pictures)})" for name, pictures in sets.items()) + " |")
    print("|---|" + "---|" * len(sets))
    for kind, change in KINDS.items():
        print(f"| {kind} | " + " | ".join(str(detected(pictures, change)) for pictures in sets.values()) + " |")


def confused(name: str, pictures: list[Picture], others: list[Picture] | None = None) -> None:
    """Print the number of pairs that count as copies: of all pairs, or of each picture with each other one."""
    looks = [look(picture) for picture in pictures]
    pairs: list[tuple[Look, Look]] = []
    if others is None:
        count, pairs = len(looks) * (len(looks) - 1) // 2, [p for p in combinations(looks, 2) if is_copy(*p)]
        named = {id(look): picture for look, picture in zip(looks, pictures, strict=True)}
        for k, (first, second) in enumerate(pairs):
            _save(f"{name}-{k}", named[id(first)], named[id(second)])
        number = len(pairs)
    else:
        index = LookIndex((str(k), look) for k, look in enumerate(looks))
        count, number = len(looks) * len(others), sum(len(index.copies(look(other))) for other in others)
    rich = sum(look.rich for look in looks)
    print(
        f"| {name} | {len(pictures) + len(others or [])} | {rich / max(len(looks), 1):.0%} | {count:,} | {number} |",
        flush=True,
    )


def _save(name: str, first: Picture, second: Picture) -> None:
    """Both pictures side by side below build/picture-copies, to be looked at."""
    sheet = Image.new("RGB", (640, 320), "gray")
    sheet.paste(first.resize((310, 310)), (5, 5))
    sheet.paste(second.resize((310, 310)), (325, 5))
    target = Path("build/picture-copies") / f"{name.replace(' ', '-').replace(',', '')}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target)


def main() -> None:
    files = package("skimage", "data") + package("sklearn", "datasets/images")
    photographs = read([*files, *(file for path in sys.argv[1:] for file in folder(Path(path)))])
    scenes = demo("test", 1000)
    started = time.process_time()
    for picture in photographs:
        _ = look(picture).hashes
    print(
        f"{len(photographs)} pictures, {(time.process_time() - started) / len(photographs) * 1e3:.0f} ms of CPU each\n"
    )
    print_detected(photographs, scenes)
    print("\n| pictures | number | detailed | pairs | taken for copies |\n|---|---|---|---|---|")
    confused("photographs and wallpapers", photographs)
    confused("drawn charts", charts(300))
    confused("drawn pages of text", pages(300))
    confused("demo scenes, train beside test", demo("train", 4000), scenes)
    drawings = read(package("easy_vqa", "data/test/images", least_bytes=0))
    confused("drawings of easy-vqa", drawings[::2], drawings[1::2])


if __name__ == "__main__":
    main()
