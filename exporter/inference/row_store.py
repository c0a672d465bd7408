"""Rows of one shape: in memory while they are few, beyond a bound in a file that the page cache holds.

An image-text retrieval keeps what every picture became, 1.9 MB each in 16 bits: 9.5 GB of COCO's 5,000.
"""

import errno
import os
import tempfile

import torch
from torch import Tensor

from exporter.errors import DataError

BOUND = 2**30  # bytes that are held in memory


class RowStore:
    """A tensor `[rows, ...]` on the CPU that is filled from its first row to its last.

    rows: how many there will be. bound: the most bytes to hold in memory; more go to a file without a name in the
    folder for temporary files (TMPDIR), which is gone when the store is (DataError when that disk lacks the room).
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
        """Some rows, by numbers int64 `[n]` or as a slice."""
        assert self._values is not None
        return self._values[numbers]


def _on_disk(shape: tuple[int, ...], dtype: torch.dtype, size: int) -> Tensor:
    folder = tempfile.gettempdir()
    with tempfile.NamedTemporaryFile(dir=folder, prefix="mmq-rows-") as file:  # the mapping outlives the name
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error now, not a signal later
        except OSError as error:
            reason = "has no room" if error.errno == errno.ENOSPC else error.strerror
            raise DataError(
                f"{folder}: {size / 2**30:.1f} GiB of picture features are to be kept there: {reason}",
                "set TMPDIR to a folder on a larger disk, or evaluate on fewer samples (--eval-samples)",
            ) from None
        values = torch.from_file(file.name, shared=True, size=size // dtype.itemsize, dtype=dtype)
    return values.view(shape)
