"""Commands import transformers without scikit-learn and scipy; programs that use mmq as a library are left alone."""

import importlib
import sys
from importlib.util import find_spec

import pytest

from exporter import transformers_import
from exporter.__main__ import main
from exporter.commands import interrupt
from exporter.study import worker_pool
from exporter.transformers_import import UNUSED, import_transformers, only_mmq_runs_here


@pytest.fixture(autouse=True)
def a_program_of_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of the tests is one that only mmq uses (tests/conftest.py)."""
    monkeypatch.setattr(transformers_import, "_process", {"only mmq": False})


def is_missing(name: str) -> bool:
    checks = importlib.import_module("transformers.utils.import_utils")
    return not getattr(checks, f"is_{name}_available")()


def test_transformers_misses_installed_packages_that_other_modules_can_import() -> None:
    """The process of the tests imported transformers as commands do."""
    assert all(find_spec(name) for name in UNUSED)
    assert [name for name in UNUSED if is_missing(name)] == list(UNUSED)
    assert importlib.import_module("scipy.optimize").milp


def test_hidden_packages_are_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in UNUSED:
        monkeypatch.delitem(sys.modules, name, raising=False)
    only_mmq_runs_here()
    transformers_import._import_without_unused.cache_clear()
    assert import_transformers() is sys.modules["transformers"]
    assert not set(UNUSED) & sys.modules.keys()


def test_a_library_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_import, "_import_without_unused", pytest.fail)
    assert import_transformers() is sys.modules["transformers"]


def test_commands_and_workers_of_studies_are_processes_of_mmq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_import, "_import_without_unused", lambda: "without")
    monkeypatch.setattr("exporter.__main__.install", interrupt.raise_if_interrupted)  # no signal handler
    monkeypatch.setattr(sys, "argv", ["mmq", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert import_transformers() == "without"
    transformers_import._process["only mmq"] = False
    monkeypatch.setattr(worker_pool.signal, "signal", lambda *handler: None)
    monkeypatch.setattr(worker_pool.multiprocessing, "parent_process", lambda: Parent())
    worker_pool._begin()
    assert import_transformers() == "without"


class Parent:
    """A process that does not end while the test runs."""

    def join(self) -> None:
        """Wait for ever: the thread that waits ends with this process."""
        importlib.import_module("threading").Event().wait()
