"""Cases that repeat what a faster case proves: `make test` leaves them out, `make test-slow` runs them."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pytest


def some(names: Iterable[str], fast: Collection[str]) -> list[Any]:
    """Parameters of a test: every name; those beside `fast` are marked slow."""
    names = list(names)
    assert set(fast) <= set(names), f"no case is called {set(fast) - set(names)}"
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


def some_of(cases: Mapping[str, tuple[Any, ...]], fast: Collection[str]) -> list[Any]:
    """The same for a test of several arguments: name -> arguments."""
    assert set(fast) <= set(cases), f"no case is called {set(fast) - set(cases)}"
    marks = {name: () if name in fast else pytest.mark.slow for name in cases}
    return [pytest.param(*values, id=name, marks=marks[name]) for name, values in cases.items()]
