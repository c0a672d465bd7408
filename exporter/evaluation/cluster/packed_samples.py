"""Samples as one file: a zip archive of their texts in JSON and of every picture once as PNG, without loss."""

import hashlib
import io
import json
import threading
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from exporter.data.tasks.sample import Pool, Sample

TEXTS = "samples.json"
_PLAIN = tuple(field.name for field in fields(Sample) if field.name not in ("image", "among"))


def pack_samples(groups: Mapping[str, Sequence[Sample]], path: Path) -> None:
    """Write named groups of samples."""
    pictures: dict[tuple[tuple[int, int], bytes], int] = {}  # (size, sha256 of the pixels) -> number

    def described(sample: Sample) -> dict[str, Any]:
        image = sample.image()
        assert image.mode == "RGB"
        key = (image.size, hashlib.sha256(image.tobytes()).digest())
        if key not in pictures:
            pictures[key] = len(pictures)
            buffer = io.BytesIO()
            image.save(buffer, "PNG", compress_level=1)
            archive.writestr(f"{pictures[key]}.png", buffer.getvalue())
        return {name: getattr(sample, name) for name in _PLAIN} | {"picture": pictures[key]}

    pools: dict[int, tuple[int, Pool]] = {}
    with zipfile.ZipFile(path, "w") as archive:
        listed = {}
        for name, samples in groups.items():
            listed[name] = [
                described(sample)
                | {"pool": pools.setdefault(id(sample.among), (len(pools), sample.among))[0] if sample.among else None}
                for sample in samples
            ]
        searched = [
            {"candidates": pool.candidates, "samples": [described(sample) for sample in pool.samples]}
            for _, pool in pools.values()
        ]
        archive.writestr(TEXTS, json.dumps({"groups": listed, "pools": searched}))


def packed_groups(path: Path) -> dict[str, list[Sample]]:
    """The groups of samples in a file that `pack_samples` wrote; pictures are decoded when they are used."""
    archive, lock = zipfile.ZipFile(path), threading.Lock()
    content = json.loads(archive.read(TEXTS))

    def picture(number: int) -> Image.Image:
        with lock:
            data = archive.read(f"{number}.png")
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")

    def sample(described: dict[str, Any]) -> Sample:
        plain = {name: described[name] for name in _PLAIN}
        plain |= {name: tuple(plain[name]) for name in ("references", "metrics")}
        return Sample(image=partial(picture, described["picture"]), **plain)

    pools = [Pool(tuple(map(sample, pool["samples"])), pool["candidates"]) for pool in content["pools"]]
    return {
        name: [
            replace(sample(entry), among=None if entry["pool"] is None else pools[entry["pool"]]) for entry in entries
        ]
        for name, entries in content["groups"].items()
    }
