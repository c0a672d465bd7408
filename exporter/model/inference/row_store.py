"""Stores tensor rows of one shape, in memory up to a limit and beyond it in a temporary file.

Image-text retrieval stores the ViT features of every picture, 1.9 MB each in 16 bits: 9.5 GB for COCO's 5,000 pictures.
"""

from __future__ import annotations

import errno
import os
import tempfile
from typing import TYPE_CHECKING

from exporter.errors import DataError
from exporter.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

BOUND = 2**30  # bytes; a larger store is a file


class RowStore:
    """A tensor `[rows, ...]` on the CPU that is filled from its first row to its last.

    rows: the final number of rows. bound: the largest size in bytes that is kept in memory. A larger store is an
    unnamed file in the folder for temporary files (TMPDIR), which the system deletes with the store (DataError when the
    disk lacks space).
    """

    def __init__(self, rows: int, bound: int = BOUND) -> None:
        self._rows = rows
        self._bound = bound
        self._filled = 0
        self._values: Tensor | None = None

    def __len__(self) -> int:
        return self._filled

    def append(self, rows: Tensor) -> None:
        """Add rows `[n, ...]` from any device; all have the shape and dtype of the first."""
        if self._values is None:
            shape = (self._rows, *rows.shape[1:])
            size = self._rows * rows[0].numel() * rows.itemsize
            small = size <= self._bound
            self._values = torch.empty(shape, dtype=rows.dtype) if small else _on_disk(shape, rows.dtype, size)
        self._values[self._filled : self._filled + len(rows)] = rows
        self._filled += len(rows)

    def __getitem__(self, numbers: Tensor | slice) -> Tensor:
        """Rows by number, int64 `[n]`, or as a slice."""
        assert self._values is not None
        return self._values[numbers]


def _on_disk(shape: tuple[int, ...], dtype: torch.dtype, size: int) -> Tensor:
    folder = tempfile.gettempdir()
    # The file is unlinked at the end of this block; its mapping stays valid.
    with tempfile.NamedTemporaryFile(dir=folder, prefix="mmq-rows-") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk raises here, instead of a signal on a later write
        except OSError as error:
            reason = "no space left on the disk" if error.errno == errno.ENOSPC else error.strerror
            raise DataError(
                f"{folder}: cannot store {size / 2**30:.1f} GiB of picture features: {reason}",
                "set TMPDIR to a folder on a larger disk, or evaluate on fewer samples (--eval-samples)",
            ) from None
        values = torch.from_file(file.name, shared=True, size=size // dtype.itemsize, dtype=dtype)
    return values.view(shape)
