"""Damaged artifacts for `bench.attack`: weights, configuration, manifest, report and recipe of an exported model."""

import atexit
import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from random import Random

from bench.damage import damaged_bytes, damaged_json
from exporter.artifact.artifact import Artifact
from exporter.artifact.manifest import MANIFEST
from exporter.device import choose
from exporter.errors import MmqError
from exporter.evaluation.backends import weights_digest
from exporter.evaluation.report_file import REPORT
from exporter.events import ignore
from exporter.files.file_hashes import sha256
from exporter.publishing import repository
from exporter.publishing.artifact_diff import difference
from exporter.publishing.artifact_summary import folder_reader, read_summary
from exporter.publishing.card import CardDeclarations
from exporter.publishing.proof.prove import prove
from exporter.publishing.report import html
from exporter.publishing.report.content import collect
from tests.published_artifact import tiny_artifact, tiny_model, write_scores

NAME, SAMPLES = "artifact", 120
VALUES = ("max_drop", "passed", "lost", "files", "linears", "schemes", "samples", "scores", "version")


@cache
def proven() -> Path:
    """An exported, publishable artifact of a tiny model; exported once per process."""
    folder = Path(tempfile.mkdtemp(prefix="mmq-attack-artifact-"))
    atexit.register(shutil.rmtree, folder, True)
    artifact = tiny_artifact(folder / NAME, tiny_model(folder / "model"))
    write_scores(artifact, after=0.75, before=0.75, samples=SAMPLES)
    return artifact


def damage_artifact(folder: Path, random: Random) -> None:
    """Damage weights, header, config.json or recipe, or remove a file."""
    artifact = Path(shutil.copytree(proven(), folder / NAME))
    part = random.choice(("header", "weights", "config", "config", "recipe", "removed"))
    path = artifact / {"config": "config.json", "recipe": "recipe.yaml"}.get(part, "model.safetensors")
    raw = path.read_bytes()
    if part == "removed":
        random.choice(sorted(artifact.iterdir())).unlink()
    elif part == "config":
        path.write_bytes(damaged_json(json.loads(raw), random, ("quantization_config", "dtype", "config_groups")))
    elif part == "header":
        (length,) = struct.unpack("<Q", raw[:8])
        header = damaged_json(json.loads(raw[8 : 8 + length]), random, ("dtype", "shape", "data_offsets"))
        path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])
    else:
        path.write_bytes(damaged_bytes(raw, random))
    if random.random() < 0.6:
        _renew_hashes(artifact)


def _renew_hashes(place: Path) -> None:
    """Let the manifest name the hashes of the files that are there, and the report these weights."""
    if not (place / MANIFEST).exists() or not (place / REPORT).exists():
        return
    manifest, report = (json.loads((place / name).read_bytes()) for name in (MANIFEST, REPORT))
    manifest["files"] = {name: sha256(place / name) for name in manifest["files"] if (place / name).is_file()}
    (place / MANIFEST).write_text(json.dumps(manifest))
    with suppress(MmqError):  # then it cannot be opened
        report["evaluation"]["models"]["artifact"]["weights"] = weights_digest(Artifact.open(place))
        (place / REPORT).write_text(json.dumps(report))


def damage_manifest(folder: Path, random: Random) -> None:
    """Damage the manifest."""
    _damage(folder, MANIFEST, random)


def damage_report(folder: Path, random: Random) -> None:
    """Damage the report: scores, verdicts, measurements."""
    _damage(folder, REPORT, random)


def _damage(folder: Path, name: str, random: Random) -> None:
    path = Path(shutil.copytree(proven(), folder / NAME)) / name
    path.write_bytes(damaged_json(json.loads(path.read_bytes()), random, VALUES))


def try_artifact(folder: Path, accepted: Callable[[], None]) -> None:
    """Compare it with the undamaged artifact, render its report, prove it, and build the files of `mmq publish`."""
    artifact = folder / NAME
    damaged = read_summary(NAME, folder_reader(artifact))
    difference(read_summary(NAME, folder_reader(proven())), damaged)
    html(collect(damaged, {}))
    summary, problems = prove(artifact, choose("cpu"), ignore)
    repository.refuse_unproven(artifact, problems)
    accepted()
    repository.package(artifact, summary, "me/x", CardDeclarations(), problems, None)
