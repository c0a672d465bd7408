"""Imports transformers without the packages that it only uses for what mmq never does.

Where scikit-learn and scipy are installed, transformers imports them, and pandas with them, for assisted generation and
for losses of object detection. That takes about a second of the start of a command. A program that uses mmq as a
library may need those parts of transformers, so only processes that mmq starts leave the packages out.
"""

import sys
from functools import cache
from types import ModuleType
from typing import Any, cast

UNUSED = ("sklearn", "scipy", "pandas")
_process = {"only mmq": False}


def only_mmq_runs_here() -> None:
    """State that no other program uses transformers in this process."""
    _process["only mmq"] = True


def import_transformers() -> Any:
    """The package. In a process of mmq's own it takes `UNUSED` for missing; other modules can import them as usual."""
    if _process["only mmq"]:
        return _import_without_unused()
    import transformers

    return transformers


@cache
def _import_without_unused() -> Any:
    """Import transformers, and let it look for the packages, while they cannot be found: it remembers the result."""
    hidden = [name for name in UNUSED if name not in sys.modules]
    sys.modules.update(cast(dict[str, ModuleType], dict.fromkeys(hidden)))  # None: not found
    try:
        import transformers
        from transformers.utils import import_utils

        for name in UNUSED:
            getattr(import_utils, f"is_{name}_available", bool)()
    finally:
        for name in hidden:
            del sys.modules[name]
    return transformers
