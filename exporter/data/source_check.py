"""Whether a named data source exists: checked before a job reads it, with what to write instead."""

from collections.abc import Collection
from pathlib import Path

from exporter.data import folder, hub
from exporter.data.conventions import CONVENTIONS
from exporter.errors import SourceError, did_you_mean

BUILT_IN = ("demo", "drawings")  # same scenes: "demo" uses the made-up names of the demo models, "drawings" plain words
ALLOWED = (
    f"a source is a folder of pictures, {' or '.join(BUILT_IN)}, a JSON file of LLaVA's conversations, NAME:PATH "
    f"of a public data set ({', '.join(CONVENTIONS)}), or hub:ORG/NAME; `mmq datasets` describes them"
)


def unknown_source(written: str, name: str, known: Collection[str]) -> SourceError:
    """The error for a source whose name mmq does not know."""
    return SourceError(f"unknown data source '{written}'.{did_you_mean(name, known)}", ALLOWED)


def refuse_missing(written: str, name: str, path: Path | None, known: Collection[str]) -> None:
    """SourceError if the source has no path but needs one, or if nothing is at its path.

    written: as the user gave it. name: of the kind of source, one of `known`.
    """
    if name in BUILT_IN or (name == "hub" and path and hub.repo_of(path.as_posix())):
        return
    if path is None:
        raise SourceError(
            f"data source {name} needs a folder", f"pass {name}:PATH; `mmq datasets {name}` shows its layout"
        )
    if not path.exists():
        guess = did_you_mean(written, [n for n in known if n != "folder"]) if name == "folder" else ""
        raise SourceError(f"data source '{written}' does not exist: there is no {path.absolute()}.{guess}", ALLOWED)
    if path.is_file() and name != "llava":
        where = f"pass its folder: {path.parent}" if path.name in folder.METADATA_FILES else ALLOWED
        raise SourceError(f"data source '{written}' is a file, not a folder", where)
    if path.is_dir() and not any(path.iterdir()):
        raise SourceError(f"data source '{written}' is an empty folder", f"`mmq datasets {name}` shows its layout")
    if name == "folder" and not folder.has_pictures(path):
        raise SourceError(
            f"data source '{written}' has neither {folder.METADATA} nor pictures "
            f"({', '.join(sorted(folder.SUFFIXES))})",
            f"`mmq datasets {name}` shows its layout; {ALLOWED}",
        )
