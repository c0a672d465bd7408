"""Hashes of whole files: every byte counts, and no hash is reused for a file that changed."""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.errors import CheckpointError
from exporter.files import file_hashes
from exporter.files.file_hashes import SMALL_BYTES, FileState, hash_files, start_hashing
from exporter.model.checkpoint import Checkpoint
from tests.headers.read import shards, write_sparse_shard

PAGE_BYTES = 4096
READ = 2**16  # bytes read at once in these tests


def settle(path: Path) -> None:
    """Wait until the file's last change lies long enough back for its hash to be reused."""
    while time.time_ns() - path.stat().st_ctime_ns <= 2 * file_hashes.SETTLED_NS:
        time.sleep(0.02)


SIZES = (0, 1, READ - 1, READ, READ + 1, 3 * READ, SMALL_BYTES, SMALL_BYTES + 1)


@pytest.mark.parametrize("size", SIZES)
def test_hashes_are_those_of_hashlib(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_hashes, "READ_BYTES", READ)
    content = (bytes(range(251)) * (size // 251 + 1))[:size]
    (tmp_path / "file").write_bytes(content)
    assert hash_files([tmp_path / "file"]) == {tmp_path / "file": hashlib.sha256(content).hexdigest()}


def test_a_byte_of_any_tensor_of_a_7b_checkpoint_changes_its_digest(tmp_path: Path) -> None:
    """Names and shards of LLaVA-1.5-7B; every tensor is a page, so that sampling a shard would miss most of them."""
    weight_map = small_7b(tmp_path)
    contents = {file: (tmp_path / file).read_bytes() for file in set(weight_map.values())}
    checkpoint = Checkpoint.open(tmp_path)
    digests = {checkpoint.digest()}
    for number, (name, file) in enumerate(weight_map.items(), 1):
        data = contents[file]
        length = int.from_bytes(data[:8], "little")
        start, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
        place = 8 + length + start + (number * 977) % (end - start)
        put_byte(tmp_path / file, place, data[place] ^ 1)
        digests.add(checkpoint.digest())
        put_byte(tmp_path / file, place, data[place])
        assert len(digests) == number + 1, name
    assert len(weight_map) > 600
    assert Checkpoint.open(tmp_path).digest() in digests  # nothing but the bytes counts


def put_byte(path: Path, place: int, value: int) -> None:
    """Overwrite one byte of a file."""
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes([value]))


def small_7b(folder: Path) -> dict[str, str]:
    """The shards of LLaVA-1.5-7B with a page of zeros for every tensor; tensor name -> shard."""
    weight_map = {}
    for number, part in enumerate(shards("llava-hf--llava-1.5-7b-hf"), 1):
        file = f"model-{number:05d}.safetensors"
        write_sparse_shard(folder / file, {name: ("F16", (PAGE_BYTES // 2,)) for name in part})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return weight_map


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    settle(path)
    reads = []
    whole = file_hashes._Hashing._digest
    monkeypatch.setattr(file_hashes._Hashing, "_digest", lambda hashing: reads.append(1) or whole(hashing))
    start_hashing([path])
    first = hash_files([path])
    assert hash_files([path]) == first
    assert len(reads) == 1
    times = path.stat()
    path.write_bytes(b"new")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # the same size, inode and mtime
    assert hash_files([path])[path] == hashlib.sha256(b"new").hexdigest()
    assert len(reads) == 2


def test_another_file_in_its_place_is_read(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_bytes(b"one")
    other.write_bytes(b"two")
    settle(other)
    hash_files([path])
    other.replace(path)
    assert hash_files([path])[path] == hashlib.sha256(b"two").hexdigest()


@pytest.mark.parametrize("settled", [False, True])
def test_a_change_within_one_tick_of_the_clock_is_seen(
    settled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coarse clock may give two contents the same times; only of a file that rests are they believed."""
    path = tmp_path / "file"
    path.write_bytes(b"one")
    state = FileState.of(path)._replace(ctime_ns=time.time_ns() - (10**9 if settled else 0))
    monkeypatch.setattr(FileState, "of", lambda path: state)
    first = hash_files([path])
    path.write_bytes(b"two")
    assert (hash_files([path]) == first) is settled


def test_a_file_that_changes_while_it_is_read_is_an_error_that_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    settle(path)
    real = hashlib.sha256

    def changing() -> object:
        path.write_bytes(b"longer than before")
        return real()

    monkeypatch.setattr(hashlib, "sha256", changing)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        hash_files([path])
    monkeypatch.undo()
    assert hash_files([path])[path] == real(b"longer than before").hexdigest()


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone"):
        hash_files([tmp_path / "gone"])


def test_progress_counts_the_bytes_of_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_hashes, "REPORT_SECONDS", 0.0005)
    monkeypatch.setattr(file_hashes, "READ_BYTES", READ)
    size = 20 * SMALL_BYTES
    paths = [tmp_path / str(number) for number in range(3)]
    for path in paths:
        path.write_bytes(bytes(size))
    progress: list[tuple[int, int]] = []
    reported, real = threading.Event(), file_hashes.sha256

    def held(path: Path, on_read: Callable[[int], None]) -> str:
        digest = real(path, on_read)
        assert reported.wait(60)  # a fast machine would finish before the first report
        return digest

    def record(done: int, total: int) -> None:
        progress.append((done, total))
        reported.set()

    monkeypatch.setattr(file_hashes, "sha256", held)
    hash_files(paths, record)
    assert {total for _, total in progress} == {3 * size}
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert all(0 <= done <= 3 * size for done, _ in progress)
