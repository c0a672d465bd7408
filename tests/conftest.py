"""What several test modules share."""

import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

from exporter.device import choose
from tests.browser import Browser, browser
from tests.headers.read import header, header_config, write_sparse_checkpoint
from tests.page_audit import need_browser

if TYPE_CHECKING:
    from exporter.pipeline.export import Export

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
_cache = TemporaryDirectory(prefix="mmq-cache-")  # no test reads what an earlier run kept
os.environ["MMQ_CACHE"] = _cache.name
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not choose("auto").is_cuda:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported: kernels then run on a CPU
settings.register_profile("no deadline", deadline=None)  # a loaded machine is no failure
settings.load_profile("no deadline")
gc.set_threshold(50_000, 20, 20)  # the libraries' objects are many, and looking through them takes a tenth of the time
CONFIGS = "transformers.configuration_utils"
_modules = [0]  # how many were imported at the last `gc.freeze`
torch.set_num_threads(1)  # tiny tensors: more threads are slower, and sums stay the same everywhere

__all__ = ["header", "header_config", "write_sparse_checkpoint"]


def pytest_runtest_setup() -> None:
    """Spare every test two costs of the libraries, which nothing in a test depends on.

    A full collection, which follows every evaluated model, looks through all that was imported: modules never go, so
    they are taken out of it. transformers formats a configuration for a log message where nothing is logged.
    """
    if len(sys.modules) > _modules[0] + 100:
        _modules[0] = len(sys.modules)
        gc.collect()
        gc.freeze()
    if CONFIGS in sys.modules:
        sys.modules[CONFIGS].PreTrainedConfig.__repr__ = object.__repr__


@pytest.fixture
def sparse_checkpoint(tmp_path: Path) -> Callable[[str], Path]:
    """`sparse_checkpoint(NAME)` writes that real checkpoint's sparse twin below the test's folder."""
    return lambda name: write_sparse_checkpoint(tmp_path / name, name)


@dataclass(frozen=True)
class FinishedExport:
    """An uninterrupted `quick_export` of the demo model. work: its finished blocks."""

    out: Path
    work: Path
    result: "Export"


@pytest.fixture(scope="session")
def finished_export(tmp_path_factory: pytest.TempPathFactory) -> FinishedExport:
    """Made once; tests read it, and change copies of it."""
    from tests.test_export import quick_export

    root = tmp_path_factory.mktemp("finished")
    out, work = root / "whole", root / "work"
    return FinishedExport(out, work, quick_export(out, work=work))


@pytest.fixture(scope="session")
def finished(finished_export: FinishedExport) -> Path:
    """The artifact of the uninterrupted export."""
    return finished_export.out


@pytest.fixture
def finished_work(finished_export: FinishedExport, tmp_path: Path) -> Path:
    """A copy of its work folder, `work` in the test's folder."""
    return Path(shutil.copytree(finished_export.work, tmp_path / "work"))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A browser for the tests of a file; they are skipped without one."""
    need_browser()
    with browser() as opened:
        yield opened
