"""The reference programs of COCO's caption evaluation: Java archives inside the package pycocoevalcap (an extra)."""

import importlib.util
import shutil
from pathlib import Path

from exporter.errors import DataError

HINT = "install a Java runtime (apt-get install default-jre-headless) and pip install 'mmq[coco]'"


def archive(name: str) -> Path | None:
    """The file of `name` inside pycocoevalcap, like `meteor/meteor-1.5.jar`; None without Java or the package."""
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations or not shutil.which("java"):
        return None
    file = Path(spec.submodule_search_locations[0]) / name
    return file if file.is_file() else None


def failed(program: str, why: str) -> DataError:
    """The error of a program that did not answer as it should."""
    return DataError(f"{program} did not work: {why}", f"does `java -version` work? Else {HINT}")
