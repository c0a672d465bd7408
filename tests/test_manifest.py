"""The manifest schema: round trip, older files, and errors for invalid values."""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.artifact.artifact import Artifact, described_groups
from exporter.artifact.manifest import (
    MANIFEST,
    VERSION,
    Document,
    Manifest,
    parse_manifest,
    read_manifest,
    write_manifest,
)
from exporter.artifact.manifest_coverage import _listed
from exporter.artifact.verify import verify
from exporter.device import choose
from exporter.errors import ArtifactError, MmqError
from exporter.events import ignore
from exporter.files.file_hashes import sha256
from exporter.publishing.artifact_summary import folder_reader, read_summary

HASH = "0" * 64


@pytest.fixture(scope="module")
def folder(random_artifacts: Path) -> Path:
    return random_artifacts / "w4"


@pytest.fixture
def plain(folder: Path) -> dict[str, Any]:
    """Content of the file; a test may change it."""
    return json.loads((folder / MANIFEST).read_text())


def parse(plain: Any) -> Manifest:
    return parse_manifest(json.dumps(plain).encode(), "the manifest")


def test_a_written_manifest_is_read_back_unchanged(folder: Path, tmp_path: Path) -> None:
    manifest = read_manifest(folder)
    write_manifest(tmp_path, manifest)
    assert (tmp_path / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()
    assert manifest.linears.keys() == manifest.errors.keys()
    assert {"config.json", "recipe.yaml", "model.safetensors"} <= manifest.files.keys()


def required(kind: type[Document], path: str = "") -> Iterator[str]:
    """Paths of all required keys, including those of nested documents."""
    for name, field in kind.model_fields.items():
        inner = field.annotation
        if field.is_required():
            yield path + name
        if field.is_required() and isinstance(inner, type) and issubclass(inner, Document):
            yield from required(inner, f"{path}{name}.")


@pytest.mark.parametrize("path", list(required(Manifest)))
def test_every_required_key_must_be_there(plain: dict[str, Any], path: str) -> None:
    holder, *outer = plain, *path.split(".")
    for part in outer[:-1]:
        holder = holder[part]
    del holder[outer[-1]]
    with pytest.raises(
        ArtifactError, match=rf"the manifest is damaged, or a newer mmq wrote it:\n  {path}: Field required"
    ):
        parse(plain)


def test_keys_that_an_older_version_did_not_write_are_absent(plain: dict[str, Any]) -> None:
    for key in ("format_version", "fingerprint", "shards", "notes"):
        del plain[key]
    calibration = plain["provenance"]["calibration"]
    calibration["samples"] = [{"id": "a", "image": HASH}]
    del calibration["batch"], calibration["vision_weight"], plain["source"]["shards"], plain["recipe"]["name"]
    manifest = parse(plain)
    assert manifest.format_version == 1
    assert (manifest.fingerprint, manifest.shards, manifest.notes, manifest.serving) == (None, (), (), None)
    calibration = manifest.provenance.calibration
    assert (calibration.batch, calibration.vision_weight, calibration.samples[0].look) == (None, None, None)
    assert manifest.source.shards == {}


def test_an_unknown_key_is_ignored(plain: dict[str, Any]) -> None:
    assert parse(plain | {"colour": "red"}) == parse(plain)


INVALID: list[tuple[str, Any, str]] = [
    ("format_version", VERSION + 1, "format_version"),
    ("format_version", "1", "format_version"),
    ("format_version", 0, "format_version"),
    ("family", "gpt", "unknown family"),
    ("format", "gguf", "unknown format"),
    ("files", ["a"], "files"),
    ("files", {"a": 1}, "files.a"),
    ("files", {"a": "0" * 63}, "files.a"),
    ("files", {"a": "G" * 64}, "files.a"),
    *(
        ("files", {name: HASH}, "files")
        for name in ("../a", "/etc/passwd", "a/b", "a\\b", "..", ".", "", "a\0", "a\nb")
    ),
    ("files", {"x" * 256: HASH}, "files"),
    ("shards", ["../model.safetensors"], "shards"),
    ("source", {"model": "m", "shards": {"../x": HASH}}, "source.shards"),
    ("source", {"model": "m\n# A heading"}, "source.model"),
    ("linears", {"a b": HASH}, "linears"),
    ("linears", {"a": "b"}, "linears.a"),
    ("linears", [], "linears"),
    ("errors", {"a": float("nan")}, "errors.a"),
    ("errors", {"a": float("inf")}, "errors.a"),
    ("errors", {"a": -0.1}, "errors.a"),
    ("errors", {"a": True}, "errors.a"),
    ("errors", {"a": "0.1"}, "errors.a"),
    ("units", ["a/b"], "units"),
    ("units", "abc", "units"),
    ("bytes", {"before": 0, "after": 1}, "bytes.before"),
    ("bytes", {"before": "x", "after": True}, "bytes.before"),
    ("bytes", {"before": 2**60, "after": 1}, "bytes.before"),
    ("bits_per_weight", float("nan"), "bits_per_weight"),
    ("bits_per_weight", 1e9, "bits_per_weight"),
    ("bits_per_weight", 0, "bits_per_weight"),
    ("recipe", {"name": "x", "sha256": "x"}, "recipe.sha256"),
    ("versions", {"mmq": 1}, "versions.mmq"),
    ("notes", ["a\nb"], "notes"),
    ("notes", ["a" * 4001], "notes"),
    ("provenance", {"device": "cpu", "calibration": {"data": "d", "seed": 0, "samples": [{"id": "a"}]}}, "image"),
    ("provenance", {"device": "cpu", "calibration": {"data": "d", "seed": float("inf"), "samples": []}}, "seed"),
    ("provenance", {"device": "cpu\r\n", "calibration": {"data": "d", "seed": 0, "samples": []}}, "device"),
    ("serving", {"engine": "vllm", "build": "cpu", "passed": "yes"}, "serving.passed"),
]


@pytest.mark.parametrize(("key", "value", "fragment"), INVALID)
def test_invalid_values_are_refused_with_their_key(plain: dict[str, Any], key: str, value: Any, fragment: str) -> None:
    with pytest.raises(ArtifactError, match="is damaged, or a newer mmq wrote it") as refused:
        parse(plain | {key: value})
    assert fragment in refused.value.message.partition("\n")[2]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "1e999", '{"a": ' * 100_000, "\xff", '{"a": 1, "a": 1}'])
def test_a_file_that_is_not_a_manifest_gives_one_error(folder: Path, content: str) -> None:
    with pytest.raises(ArtifactError, match="the manifest is damaged:\n"):
        parse_manifest(content.encode("latin-1"), "the manifest")


def test_many_problems_are_counted(plain: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="and 32 more"):
        parse(plain | {"errors": {str(i): -1.0 for i in range(40)}})


def test_every_reader_refuses_a_damaged_manifest(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=f"has no {MANIFEST}: it is not an mmq artifact"):
        Artifact.open(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ArtifactError, match="is damaged"):
        Artifact.open(tmp_path)


DAMAGED_CONFIGS = {
    '{"text_config": 3}': "describe the model|does not describe weights",
    '{"quantization_config": null, "text_config": {}}': "describe",
    "{": "cannot be read as JSON",
    "[]": "expected a JSON object",
    '{"a": ' * 100_000: "nested too deeply",
    "\xff": "not UTF-8",
}


@pytest.mark.parametrize("content", DAMAGED_CONFIGS, ids=range(len(DAMAGED_CONFIGS)))
def test_every_reader_refuses_a_damaged_config(folder: Path, tmp_path: Path, content: str) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "a"))
    (place / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(MmqError, match=DAMAGED_CONFIGS[content]):
        Artifact.open(place)
    if "describe" not in DAMAGED_CONFIGS[content]:
        with pytest.raises(ArtifactError, match=r"config\.json (or recipe is damaged|does not describe)"):
            read_summary("a", folder_reader(place))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("num_bits", value) for value in ("8", 8.0, True, 0, 9, 10**30, None, [4])],
        *[("group_size", value) for value in (0, -5, "x", 16.0, True, None, [16])],
        *[("symmetric", value) for value in (1, None, "yes")],
        ("targets", [3]),
    ],
)
def test_schemes_of_impossible_values_are_refused_when_an_artifact_is_opened(
    folder: Path, tmp_path: Path, key: str, value: Any
) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "a"))
    config = json.loads((place / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    (group if key == "targets" else group["weights"])[key] = value
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"config\.json does not describe weights of format compressed_tensors"):
        Artifact.open(place)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gptq", {"bits": "4", "group_size": 128, "sym": True}),
        ("gptq", {"bits": 4, "group_size": 0, "sym": True}),
        ("gptq", {"bits": 4, "group_size": 128, "sym": "no"}),
        ("gptq", {"bits": 4, "group_size": 128, "sym": True, "dynamic": {"+:x": {"bits": None}}}),
        ("awq", {"bits": 4, "group_size": 0}),
        ("awq", {"bits": 4, "group_size": "x"}),
    ],
)
def test_schemes_of_impossible_values_are_refused_in_every_format(name: str, config: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=f"does not describe weights of format {name}"):
        described_groups(name, {"quantization_config": config}, "here")


def test_a_group_may_have_one_column() -> None:
    (group,) = described_groups("awq", {"quantization_config": {"bits": 4, "group_size": 1}}, "here")
    assert group.scheme.group_size == 1


def test_the_first_modules_of_a_problem_are_named_and_the_others_are_counted() -> None:
    lines = [f"m{i}: packed" for i in range(5)]
    assert _listed({f"m{i}" for i in range(5)}, "packed") == lines
    assert _listed({f"m{i}" for i in range(7)}, "packed") == [*lines, "2 more: packed"]


def test_packed_weights_of_another_shape_are_a_difference(folder: Path, tmp_path: Path) -> None:
    """Its hash is renewed, so that the codes are unpacked."""
    place = Path(shutil.copytree(folder, tmp_path / "a"))
    stored = load_file(place / "model.safetensors")
    name = next(name for name in stored if name.endswith(".weight_packed"))
    for changed in (stored[name][:, :-1], stored[name].to(torch.int64), stored[name][0], stored[name].float()):
        save_file(stored | {name: changed.contiguous()}, place / "model.safetensors", {"format": "pt"})
        plain = json.loads((place / MANIFEST).read_text())
        plain["files"]["model.safetensors"] = sha256(place / "model.safetensors")
        (place / MANIFEST).write_text(json.dumps(plain))
        with pytest.raises(ArtifactError, match=name.removesuffix(".weight_packed")):
            verify(place, choose("cpu"), ignore, load="nothing")


def test_a_config_without_one_component_is_refused_when_it_is_opened(folder: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "a"))
    config = json.loads((place / "config.json").read_text())
    for key in ("text_config", "vision_config"):
        (place / "config.json").write_text(json.dumps({name: config[name] for name in config if name != key}))
        with pytest.raises(
            ArtifactError, match=rf"config\.json does not describe the model: {key}: expected an object"
        ):
            Artifact.open(place)


def test_manifests_compare_by_content(plain: dict[str, Any]) -> None:
    assert parse(plain) == parse(copy.deepcopy(plain))
    assert parse(plain) != parse(plain | {"bits_per_weight": 1.5})
