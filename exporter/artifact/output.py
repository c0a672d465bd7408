"""Where an export writes: places that are refused, what is there already, and how an artifact gets its name.

A new artifact is completed in `.NAME.mmq-tmp` and then renamed. An older one at its place is exchanged with it in one
step, or, where the file system cannot do that, waits as `.NAME.mmq-old` until the new one has its name.
"""

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from exporter.artifact.manifest import MANIFEST, read_manifest
from exporter.errors import ArtifactError
from exporter.events import Event, Listener
from exporter.files.folder_lock import hold

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h


@dataclass(frozen=True)
class Destination:
    """The artifact folder of an export, its work folder, and whether another artifact may be replaced."""

    out: Path
    work: Path
    overwrite: bool

    def refuse_places(self, model: Path | None = None, adapter: Path | None = None) -> None:
        """ArtifactError when artifact and work folder, and the folders that are read, are in each other's way."""
        if self.out.name in ("", ".."):
            raise ArtifactError(f"--out {self.out} names no folder of its own", "give a new folder, like ./artifact")
        for path in {self.out, default_work(self.out)}:
            if path.is_symlink():
                raise ArtifactError(
                    f"{path} is a symbolic link, and mmq replaces whole folders", f"give its target {path.resolve()}"
                )
        written = {"--out": self.out, "--work": self.work}
        read = {name: path for name, path in (("the model", model), ("the adapter", adapter)) if path}
        for first, second in [("--out", "--work"), *((first, second) for first in written for second in read)]:
            paths = written[first], (written | read)[second]
            if _nested(paths[0].resolve(), paths[1].resolve()):
                raise ArtifactError(
                    f"{first} {paths[0]} and {second} {paths[1]} are the same folder, or one is in the other",
                    f"give another {first}",
                )

    def refuse_occupied(self, recipe: str, fingerprint: str | None = None) -> None:
        """ArtifactError unless `out` is absent, empty, the artifact of this same job, or may be replaced.

        recipe, fingerprint: as the manifest of this job names them; the fingerprint may not be known yet.
        """
        if not self.out.exists() or _is_empty(self.out):
            return
        if not self.out.is_dir():
            raise ArtifactError(f"{self.out} is a file", "give another --out")
        if not (self.out / MANIFEST).exists():
            raise ArtifactError(
                f"{self.out} holds something that mmq did not write; it is not replaced", "give another --out"
            )
        if self.overwrite or self.is_made(recipe, fingerprint):
            return
        raise ArtifactError(
            f"{self.out} is not empty: it holds an artifact of {_described(self.out, recipe)}",
            "give another --out, or --overwrite to replace it",
        )

    def is_made(self, recipe: str, fingerprint: str | None) -> bool:
        """Whether `out` holds the artifact of this job already: an earlier run was stopped after it wrote it."""
        if not (self.out / MANIFEST).is_file():
            return False
        manifest = read_manifest(self.out)
        return manifest.recipe.sha256 == recipe and fingerprint in (None, manifest.fingerprint)

    @contextmanager
    def reserved(self, on_event: Listener) -> Iterator[None]:
        """Keep other processes from `out` inside the block, and first clear up after one that was killed."""
        with hold(_lock_of(self.out), self.out, on_event=on_event):
            restore(self.out, on_event)
            shutil.rmtree(temporary_folder(self.out), ignore_errors=True)
            yield


def reading(folder: Path, on_event: Listener) -> AbstractContextManager[None]:
    """Keep an export from replacing an artifact inside the block, while others may read it too.

    LockedError when an export writes to it.
    """
    return hold(_lock_of(folder.resolve()), folder, shared=True, on_event=on_event)


def _lock_of(out: Path) -> Path:
    return out.parent / f".{out.name}.mmq-lock"


def default_work(out: Path) -> Path:
    """Where finished blocks are kept when the user names no folder: beside the artifact."""
    return out.parent / f"{out.name}.work"


def temporary_folder(out: Path) -> Path:
    """Where an artifact is completed before it gets its name."""
    return out.with_name(f".{out.name}.mmq-tmp")


def restore(out: Path, on_event: Listener) -> None:
    """End an exchange of folders that was stopped in the middle: the older artifact gets its name back, or goes."""
    old = _aside(out)
    if old.exists() and not out.exists():
        old.rename(out)
        on_event(Event("note", 0, 0, f"{out} was being replaced when that run was stopped; the older artifact is back"))
    shutil.rmtree(old, ignore_errors=True)


def put_in_place(new: Path, out: Path, overwrite: bool) -> None:
    """Give a complete artifact its name; ArtifactError when another one has it and may not be replaced.

    At every moment `out` is the older artifact or the new one, where the system can exchange two names in one step.
    """
    if not out.exists() or _is_empty(out):
        try:
            new.rename(out)
            return
        except OSError:
            if not out.exists() or _is_empty(out):
                raise
    if not overwrite or not (out / MANIFEST).is_file():
        raise ArtifactError(
            f"{out} was made by another run meanwhile; it is not replaced",
            "finished blocks are kept: give another --out and their folder as --work, or --overwrite to replace it",
        )
    if _exchange(new, out):
        shutil.rmtree(new)
        return
    old = _aside(out)
    out.rename(old)
    try:
        new.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old)


def _aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.mmq-old")


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return bool(renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0)


def _nested(first: Path, second: Path) -> bool:
    return first == second or first in second.parents or second in first.parents


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _described(out: Path, recipe: str) -> str:
    """The artifact in `out`, which is of another job than one of `recipe`."""
    made = read_manifest(out).recipe
    return f"recipe '{made.name}'" if made.sha256 != recipe else f"recipe '{made.name}' made from other inputs"
