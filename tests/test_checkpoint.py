"""Checkpoints: damage is detected from headers, and writes are atomic."""

import hashlib
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.errors import CheckpointError
from exporter.files.safetensors_header import read_header
from exporter.files.shard_writer import ShardWriter
from exporter.files.writing import write_tensors, write_text
from exporter.model.checkpoint import Checkpoint


def small_checkpoint(folder: Path, shard_bytes: int = 600) -> dict[str, torch.Tensor]:
    """Three shards of random tensors."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    tensors = {f"block.{i}.weight": torch.randn(8, 16) for i in range(3)} | {"norm.bias": torch.randn(4)}
    writer = ShardWriter(folder, shard_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    (folder / "config.json").write_text("{}")
    return tensors


def test_shards_and_index_read_back(tmp_path: Path) -> None:
    tensors = small_checkpoint(tmp_path / "m")
    checkpoint = Checkpoint.open(tmp_path / "m")
    assert checkpoint.files() == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in tensors.values())
    assert load_file(tmp_path / "m" / index["weight_map"]["norm.bias"])["norm.bias"].shape == (4,)


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m", shard_bytes=10**9)
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]


def test_two_shards_have_an_index(tmp_path: Path) -> None:
    tensors = small_checkpoint(tmp_path / "m", shard_bytes=1024)
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict(zip(sorted(tensors), [shards[0]] * 2 + [shards[1]] * 2, strict=True))


@pytest.mark.parametrize("keep", [0, 4, 60, 0.5, 0.99])
def test_truncated_shard_is_refused_from_its_header(tmp_path: Path, keep: float) -> None:
    small_checkpoint(tmp_path / "m")
    shard = tmp_path / "m" / "model-00002-of-00003.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[: int(keep if keep >= 1 or keep == 0 else len(data) * keep)])
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        Checkpoint.open(tmp_path / "m")


def test_a_header_beyond_the_format_s_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.safetensors").open("wb") as file:  # sparse
        file.write(struct.pack("<Q", 100 * 2**20 + 1))
        file.truncate(101 * 2**20)
    with pytest.raises(CheckpointError, match="not a safetensors file, or truncated inside its header"):
        read_header(tmp_path / "a.safetensors")


def test_missing_shard_tensor_and_config_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    small_checkpoint(folder)
    index = folder / "model.safetensors.index.json"
    listing = json.loads(index.read_text())
    listing["weight_map"]["ghost.weight"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(listing))
    with pytest.raises(CheckpointError, match=r"ghost\.weight"):
        Checkpoint.open(folder)
    (folder / "model-00003-of-00003.safetensors").unlink()
    del listing["weight_map"]["ghost.weight"]
    index.write_text(json.dumps(listing))
    with pytest.raises(CheckpointError, match="missing"):
        Checkpoint.open(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/evil.safetensors", "sub/evil.safetensors"])
def test_index_paths_outside_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    small_checkpoint(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="is outside of the folder"):
        Checkpoint.open(tmp_path / "m")


def test_pickles_are_named_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert "not pickles" in (caught.value.hint or "")


def test_two_stored_names_must_not_map_to_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a.x": torch.ones(1), "b.x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="stored twice"):
        Checkpoint.open(tmp_path, rename=lambda name: name[2:])


def test_a_failed_write_leaves_the_old_file_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "unit.safetensors"
    write_tensors(target, {"a": torch.ones(3)}, {})
    before = target.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="disk is full"):
        write_tensors(target, {"a": torch.zeros(3)}, {})
    with pytest.raises(CheckpointError):
        write_text(tmp_path / "new.json", "{}")
    assert target.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["unit.safetensors"]


def test_digest_depends_on_weights_and_config(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "m", shard_bytes=10**9)
    first = Checkpoint.open(tmp_path / "m").digest()
    assert Checkpoint.open(tmp_path / "m").digest() == first
    path = tmp_path / "m" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert Checkpoint.open(tmp_path / "m").digest() != first


@pytest.mark.parametrize("damaged", [False, True])
def test_a_file_of_the_hub_s_cache_that_was_damaged_is_refused(damaged: bool, tmp_path: Path) -> None:
    """The cache keeps large files in `blobs`, each named by its sha256, and a snapshot links to them."""
    snapshot, blobs = tmp_path / "snapshots" / "0123", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    small_checkpoint(snapshot, shard_bytes=10**9)
    shard = snapshot / "model.safetensors"
    content = bytearray(shard.read_bytes())
    blob = blobs / hashlib.sha256(content).hexdigest()
    content[-1] ^= damaged
    blob.write_bytes(content)
    shard.unlink()
    shard.symlink_to(blob)
    checkpoint = Checkpoint.open(snapshot)
    if not damaged:
        assert checkpoint.shard_hashes() == {"model.safetensors": blob.name}
        return
    with pytest.raises(CheckpointError, match="differs from the hub's") as caught:
        checkpoint.digest()
    assert str(blob) in (caught.value.hint or "")
