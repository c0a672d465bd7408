"""Damaged artifacts for `bench.attack`: weights, configuration, manifest, report and recipe of an exported model."""

import atexit
import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

from bench.damage import damaged_bytes, damaged_json
from exporter.artifact.manifest import MANIFEST
from exporter.device import choose
from exporter.evaluation.report_file import REPORT
from exporter.events import ignore
from exporter.publishing import repository
from exporter.publishing.artifact_diff import difference
from exporter.publishing.artifact_summary import folder_reader, read_summary
from exporter.publishing.card import CardDeclarations
from exporter.publishing.proof import prove
from exporter.report import html
from exporter.report.content import collect
from tests.published_artifact import tiny_artifact, tiny_model, write_scores

NAME, SAMPLES = "artifact", 120
VALUES = ("max_drop", "passed", "lost", "files", "linears", "schemes", "samples", "scores", "version")


@cache
def proven() -> Path:
    """An exported artifact of a tiny model that may be published; made once in a process."""
    folder = Path(tempfile.mkdtemp(prefix="mmq-attack-artifact-"))
    atexit.register(shutil.rmtree, folder, True)
    made = tiny_artifact(folder / NAME, tiny_model(folder / "model"))
    write_scores(made, after=0.75, before=0.75, samples=SAMPLES)
    return made


def damage_artifact(folder: Path, random: Random) -> None:
    """Its weights or their header, its config.json, or a file that is gone."""
    place = Path(shutil.copytree(proven(), folder / NAME))
    what = random.choice(("header", "weights", "config", "config", "recipe", "gone"))
    path = place / {"config": "config.json", "recipe": "recipe.yaml"}.get(what, "model.safetensors")
    raw = path.read_bytes()
    if what == "gone":
        random.choice(sorted(place.iterdir())).unlink()
    elif what == "config":
        path.write_bytes(damaged_json(json.loads(raw), random, ("quantization_config", "dtype", "config_groups")))
    elif what == "header":
        (length,) = struct.unpack("<Q", raw[:8])
        made = damaged_json(json.loads(raw[8 : 8 + length]), random, ("dtype", "shape", "data_offsets"))
        path.write_bytes(struct.pack("<Q", len(made)) + made + raw[8 + length :])
    else:
        path.write_bytes(damaged_bytes(raw, random))


def damage_manifest(folder: Path, random: Random) -> None:
    """Its manifest."""
    _damage(folder, MANIFEST, random)


def damage_report(folder: Path, random: Random) -> None:
    """Its report: scores, verdicts, what was measured."""
    _damage(folder, REPORT, random)


def _damage(folder: Path, name: str, random: Random) -> None:
    path = Path(shutil.copytree(proven(), folder / NAME)) / name
    path.write_bytes(damaged_json(json.loads(path.read_bytes()), random, VALUES))


def try_artifact(folder: Path, accepted: Callable[[], None]) -> None:
    """Compare it with what it was, show its report, prove it, and make what `mmq publish` would send."""
    place = folder / NAME
    shown = read_summary(NAME, folder_reader(place))
    difference(read_summary(NAME, folder_reader(proven())), shown)
    html(collect(shown, {}))
    summary, problems = prove(place, choose("cpu"), ignore)
    repository.refuse_unproven(place, problems)
    accepted()
    repository.package(place, summary, "me/x", CardDeclarations(), problems, None)
