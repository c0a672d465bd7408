"""Loads one module of the package from its mutated code, in a process and in the Python processes that it starts.

It imports little, because every child process of a mutant's tests imports it (`in_children/sitecustomize.py`).
"""

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import linecache
import os
import sys
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from bench.mutation_operators import mutated

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "exporter"
IN_CHILDREN = Path(__file__).parent / "in_children"
VARIABLE = "MMQ_MUTANT"  # `MODULE:NUMBER` of the mutant, for child processes


class _Changed(importlib.abc.Loader, importlib.abc.MetaPathFinder):
    """Import hook that loads one module from its changed code."""

    def __init__(self, name: str, path: Path, code: CodeType) -> None:
        self.name, self.path, self.code = name, path, code

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        package = self.path.name == "__init__.py"
        return importlib.util.spec_from_file_location(
            name, self.path, loader=self, submodule_search_locations=[str(self.path.parent)] if package else None
        )

    def get_code(self, name: str) -> CodeType:
        """The changed code, for `python -m MODULE`, which executes it itself."""
        return self.code

    def exec_module(self, module: ModuleType) -> None:
        exec(self.code, module.__dict__)


def load_changed(module: str, number: int) -> None:
    """Load `module` (path below `exporter`, without suffix) with mutation `number` from now on, also in children."""
    os.environ[VARIABLE] = f"{module}:{number}"
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, IN_CHILDREN)))
    sys.path.append(str(IN_CHILDREN))  # a test may give a child this process' path
    _install(module, number)


def load_from_environment() -> None:
    """Load the mutant that the parent process named; nothing without one."""
    module, _, number = os.environ.get(VARIABLE, "").rpartition(":")
    if module:
        _install(module, int(number))


def _install(module: str, number: int) -> None:
    path = PACKAGE / f"{module}.py"
    name = "exporter." + module.removesuffix("/__init__").replace("/", ".")
    text = ast.unparse(mutated(path.read_text(encoding="utf-8"), number))
    # Triton compiles kernels from the source that `inspect` finds here; an entry without a time is not read again
    linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
    sys.meta_path.insert(0, _Changed(name, path, compile(text, str(path), "exec")))
