"""Output folders of an export: checks of --out and --work, locks, and the atomic replacement of an artifact.

A new artifact is completed in `.NAME.mmq-tmp` and then renamed. An older artifact is exchanged with it in one step;
where the file system cannot exchange names, the older one is `.NAME.mmq-old` until the new one has its name.
"""

import ctypes
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path

from exporter.artifact.manifest import MANIFEST, read_manifest
from exporter.errors import ArtifactError
from exporter.events import Listener, notice
from exporter.files.folder_lock import hold
from exporter.planning.recipe import Recipe

OWN = ("mmq_report.json", "README.md")  # files of an artifact that its manifest does not name
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@dataclass(frozen=True)
class Destination:
    """Artifact folder and work folder of an export. overwrite: whether it may replace another artifact."""

    out: Path
    work: Path
    overwrite: bool

    def refuse_places(self, model: Path | None = None, adapter: Path | None = None) -> None:
        """ArtifactError when one of artifact, work, model and adapter folder is the same as or inside another one."""
        if self.out.name in ("", ".."):
            raise ArtifactError(
                f"--out {self.out} is not the name of a new folder", "give a new folder, like ./artifact"
            )
        for path in (self.out, default_work(self.out), temporary_folder(self.out), _aside(self.out)):
            if _is_link(path):
                hint = f"give its target {path.resolve()}" if path == self.out else "remove it, or give another --out"
                raise ArtifactError(f"{path} is a symbolic link, and mmq replaces folders, not links", hint)
        written = {"--out": self.out, "--work": self.work}
        read = {name: path for name, path in (("the model", model), ("the adapter", adapter)) if path}
        for first, second in [("--out", "--work"), *((first, second) for first in written for second in read)]:
            paths = written[first], (written | read)[second]
            if _nested(paths[0].resolve(), paths[1].resolve()):
                raise ArtifactError(
                    f"{first} {paths[0]} and {second} {paths[1]} are the same folder, or one is in the other",
                    f"give another {first}",
                )

    def refuse_inputs(self, inputs: Iterable[Path]) -> None:
        """ArtifactError when a file or folder that the job reads lies in a folder that it replaces or deletes.

        The job may write beside its data and below them, but nothing that it reads may be lost.
        """
        replaced = {"--out": self.out, "--work": self.work}
        replaced |= {"a folder that mmq replaces,": temporary_folder(self.out), "that folder,": _aside(self.out)}
        for path in inputs:
            for name, folder in replaced.items():
                place, target = folder.resolve(), path.resolve()
                if target == place or place in target.parents:
                    raise ArtifactError(
                        f"the job reads {path}, which lies in {name} {folder} and would be deleted with it",
                        f"move it, or give another {name}" if name.startswith("--") else "move it",
                    )

    def refuse_occupied(self, recipe: str, fingerprint: str | None = None) -> None:
        """ArtifactError unless `out` is absent, empty, the artifact of this same job, or may be replaced.

        recipe: sha256 of the recipe. fingerprint: fingerprint of the job, or None when it is not known yet.
        """
        if not self.out.exists() or _is_empty(self.out):
            return
        if not self.out.is_dir():
            raise ArtifactError(f"{self.out} is a file", "give another --out")
        if not (self.out / MANIFEST).exists():
            raise ArtifactError(
                f"{self.out} holds files that mmq did not write; mmq does not replace it", "give another --out"
            )
        if self.is_made(recipe, fingerprint):
            return
        if self.overwrite:
            return refuse_foreign(self.out)
        raise ArtifactError(
            f"{self.out} is not empty: it holds an artifact of {_described(self.out, recipe)}",
            "give another --out, or --overwrite to replace it",
        )

    def is_made(self, recipe: str, fingerprint: str | None) -> bool:
        """Whether `out` already holds the artifact of this job, from an earlier run."""
        if not (self.out / MANIFEST).is_file():
            return False
        manifest = read_manifest(self.out)
        return manifest.recipe.sha256 == recipe and fingerprint in (None, manifest.fingerprint)

    @contextmanager
    def reserved(self, on_event: Listener) -> Iterator[None]:
        """Lock `out` against other processes inside the `with` block; first remove the remains of a killed run."""
        with hold(_lock_of(self.out), self.out, on_event=on_event):
            restore(self.out, on_event)
            shutil.rmtree(temporary_folder(self.out), ignore_errors=True)
            yield


def reading(folder: Path, on_event: Listener) -> AbstractContextManager[None]:
    """Shared lock on an artifact: inside the `with` block no export can replace it.

    LockedError when an export is writing to it.
    """
    return hold(_lock_of(folder.resolve()), folder, shared=True, on_event=on_event)


@contextmanager
def updating(folder: Path) -> Iterator[None]:
    """Exclusive section around reading and rewriting the report or the manifest of an artifact; waits for its turn.

    Processes with a shared lock (`reading`) may update at once. It locks the folder itself, so that no file is left in
    the artifact; on a file system without such locks it excludes nobody.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def refuse_foreign(out: Path) -> None:
    """ArtifactError when an artifact's folder holds files that no mmq command wrote. Hidden files do not count."""
    known = {MANIFEST, *OWN, *read_manifest(out).files}
    paths = (path.relative_to(out) for path in sorted(out.rglob("*")) if path.is_symlink() or not path.is_dir())
    foreign = [str(path) for path in paths if str(path) not in known and not path.parts[0].startswith(".")]
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise ArtifactError(
            f"{out} holds files that mmq did not write ({foreign[0]}{more}), which --overwrite would delete",
            "move them, or give another --out",
        )


def _lock_of(out: Path) -> Path:
    return out.parent / f".{out.name}.mmq-lock"


def default_out(recipe: Recipe) -> Path:
    """Folder of the artifact when the user names none: `artifacts/MODEL-RECIPE`.

    Leading words of the recipe's name that the model's name already has are left out: the recipe `llava-w4-vit8` of
    `demo-llava` gives `demo-llava-w4-vit8`.
    """
    made_of = [Path(path).name for path in (recipe.model.repo, recipe.model.adapter) if path]
    words, known = recipe.name.split("-"), set(made_of[0].lower().split("-"))
    new = list(dropwhile(lambda word: word.lower() in known, words)) or words
    return Path("artifacts") / "-".join([*made_of, *new])


def default_work(out: Path) -> Path:
    """Default work folder for finished blocks: beside the artifact."""
    return out.parent / f"{out.name}.work"


def temporary_folder(out: Path) -> Path:
    """Folder in which an artifact is completed before the rename."""
    return out.with_name(f".{out.name}.mmq-tmp")


def restore(out: Path, on_event: Listener) -> None:
    """Repair an interrupted exchange of folders: rename the older artifact back if `out` is missing, else delete it."""
    old = _aside(out)
    if old.exists() and not out.exists():
        old.rename(out)
        on_event(notice(f"a run was stopped while it replaced {out}; mmq restored the older artifact"))
    shutil.rmtree(old, ignore_errors=True)


def put_in_place(new: Path, out: Path, overwrite: bool) -> None:
    """Rename a complete artifact to `out`; ArtifactError when `out` exists and may not be replaced.

    Where the system can exchange two names in one step, `out` is the older or the new artifact at every moment.
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
            f"another run wrote {out} in the meantime; mmq does not replace it",
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
    """Exchange two names in one step; False where the operating system or the file system does not support it."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return bool(renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0)


def _is_link(path: Path) -> bool:
    """Whether a path is a symbolic link; ArtifactError when the file system refuses its name."""
    try:
        return path.is_symlink()
    except OSError as error:  # the names of the folders beside --out are longer than its own
        raise ArtifactError(f"{path}: {error.strerror}", "give a shorter --out") from None


def _nested(first: Path, second: Path) -> bool:
    return first == second or first in second.parents or second in first.parents


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _described(out: Path, recipe: str) -> str:
    """Description of the artifact in `out` for an error: its recipe, or that its inputs differ."""
    existing = read_manifest(out).recipe
    return (
        f"recipe '{existing.name}'" if existing.sha256 != recipe else f"recipe '{existing.name}' made from other inputs"
    )
