"""Rows are returned unchanged from memory or disk; a full disk is an error before any work."""

import errno
import os
import tempfile
from pathlib import Path

import pytest
import torch

from exporter.errors import DataError
from exporter.model.inference.row_store import RowStore


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bound", [2**20, 0], ids=["memory", "disk"])
def test_rows_are_returned_unchanged(
    bound: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rows = torch.randn(11, 3, 5).to(dtype)
    store = RowStore(11, bound)
    for part in rows.split(4):
        store.append(part)
    assert len(store) == 11
    assert torch.equal(store[torch.tensor([7, 0, 7, 10])], rows[[7, 0, 7, 10]])
    assert torch.equal(store[2:6], rows[2:6])
    assert not any(tmp_path.iterdir())  # the file has no name, so that a kill leaves nothing


def test_large_stores_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    reserved: list[int] = []
    monkeypatch.setattr(os, "posix_fallocate", lambda fd, start, size: (reserved.append(size), os.truncate(fd, size)))
    for bound in (80, 79):
        RowStore(4, bound).append(torch.zeros(2, 5))
    assert reserved == [4 * 5 * 4]


def test_rows_may_come_one_by_one() -> None:
    store = RowStore(2)
    for value in (1.0, 2.0):
        store.append(torch.full((1, 3), value))
    assert store[:].tolist() == [[1.0] * 3, [2.0] * 3]


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match="no space left on the disk") as caught:
        RowStore(4, bound=0).append(torch.zeros(2, 5))
    assert "TMPDIR" in str(caught.value.hint)
