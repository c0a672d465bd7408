"""What several test modules share."""

import functools
import gc
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from exporter.device import choose
from exporter.transformers_import import import_transformers, only_mmq_runs_here
from tests.browser import Browser, browser
from tests.headers.read import header, header_config, write_sparse_checkpoint
from tests.order import longest_first
from tests.page_audit import need_browser
from tests.session import made_once, once_a_picture

if TYPE_CHECKING:
    from exporter.pipeline.export import Export

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have the folder of the process that started them
    _cache = TemporaryDirectory(prefix="mmq-cache-")  # no test reads what an earlier run kept
    os.environ["MMQ_CACHE"] = _cache.name
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("COLUMNS", None)  # workers inherit a width, and output that is no terminal has none
if not choose("auto").is_cuda:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported: kernels then run on a CPU
settings.register_profile("no deadline", deadline=None)  # a loaded machine is no failure
settings.load_profile("no deadline")
gc.set_threshold(50_000, 20, 20)  # the libraries' objects are many, and looking through them takes a tenth of the time
CONFIGS = "transformers.configuration_utils"
_modules = [0]  # how many were imported at the last `gc.freeze`

__all__ = ["header", "header_config", "write_sparse_checkpoint"]


def pytest_configure(config: pytest.Config) -> None:
    """Tiny tensors: more threads are slower, and sums stay the same everywhere.

    The process that only starts xdist's workers need not import torch.
    """
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        import torch

        torch.set_num_threads(1)
        only_mmq_runs_here()
        import_transformers()
    # Every export and every plan asks for a dozen versions, and each answer parses a file.
    importlib.metadata.version = functools.cache(importlib.metadata.version)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest come first, so that no worker begins one when the others are done."""
    items.sort(key=lambda item: longest_first(item.path))


def pytest_runtest_setup() -> None:
    """Spare every test three costs of the libraries, which nothing in a test depends on.

    A full collection, which follows every evaluated model, looks through all that was imported: modules never go, so
    they are taken out of it. transformers formats a configuration for a log message where nothing is logged. Every
    export looks for copies among the same drawings.
    """
    if len(sys.modules) > _modules[0] + 100:
        _modules[0] = len(sys.modules)
        gc.collect()
        gc.freeze()
    if CONFIGS in sys.modules:
        sys.modules[CONFIGS].PreTrainedConfig.__repr__ = object.__repr__
    hashing = sys.modules.get("imagehash")
    if hashing and not hasattr(hashing.phash, "known"):
        hashing.phash = once_a_picture(hashing.phash)


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


@pytest.fixture(scope="session")
def random_artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model, w4, w3: a random LLaVA and two artifacts of it, for all workers. Tests read them, and change copies."""

    def make(place: Path) -> None:
        from tests.published_artifact import tiny_artifact, tiny_model

        model = tiny_model(place / "model")
        tiny_artifact(place / "w4", model)
        tiny_artifact(place / "w3", model, bits=3)

    return made_once(tmp_path_factory, "random", make)


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of the test verify files and codes, but run no block in transformers, which takes a third of the time."""
    from exporter.artifact.verify import verify

    monkeypatch.setattr("exporter.pipeline.make_artifact.verify", partial(verify, load="nothing"))


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
