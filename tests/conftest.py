"""What several test modules share."""

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import settings

from exporter.device import choose
from tests.headers.read import header, header_config, write_sparse_checkpoint

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
_cache = TemporaryDirectory(prefix="mmq-cache-")  # no test reads what an earlier run kept
os.environ["MMQ_CACHE"] = _cache.name
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not choose("auto").is_cuda:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported: kernels then run on a CPU
settings.register_profile("no deadline", deadline=None)  # a loaded machine is no failure
settings.load_profile("no deadline")
torch.set_num_threads(1)  # tiny tensors: more threads are slower, and sums stay the same everywhere

__all__ = ["header", "header_config", "write_sparse_checkpoint"]


@pytest.fixture
def sparse_checkpoint(tmp_path: Path) -> Callable[[str], Path]:
    """`sparse_checkpoint(NAME)` writes that real checkpoint's sparse twin below the test's folder."""
    return lambda name: write_sparse_checkpoint(tmp_path / name, name)
