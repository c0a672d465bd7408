"""What a test session does once: folders that all workers share, and hashes of pictures.

The worker that needs a folder first makes it; the others wait for it.
"""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` that `make` has filled, in this process or in another worker of the session."""
    base = factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder = shared / name
    shared.mkdir(exist_ok=True)
    with (shared / f"{name}.lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not lock.tell():
            shutil.rmtree(folder, ignore_errors=True)  # of an attempt that failed
            folder.mkdir()
            make(folder)
            lock.write("made")
    return folder


def once_a_picture(hash_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A hash of PIL images that remembers its results."""
    known: dict[tuple[Any, ...], Any] = {}

    def remembered(image: Any) -> Any:
        key = image.mode, image.size, image.tobytes()
        if key not in known:
            known[key] = hash_of(image)
        return known[key]

    remembered.known = known  # type: ignore[attr-defined]
    return remembered
