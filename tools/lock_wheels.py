"""Find the wheel that pip takes for every line of the CUDA lock, for each Python, without installing anything.

    python -m tools.lock_wheels

No test machine with a GPU installs the lock from an index. This shows that its versions exist: pip resolves each line
by itself from PyPI alone, for Linux x86_64 with glibc 2.28, and reports the wheel without installing it.
locks/linux-cuda.wheels.txt gets one line for each wheel: sha256, file name and the versions of Python that take it.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tools.lock import LOCKS

LOCK, WHEELS = LOCKS / "linux-cuda.txt", LOCKS / "linux-cuda.wheels.txt"
PYTHONS = ("3.11", "3.12", "3.13")
GLIBC = 28  # minor version; torch's wheels need it
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(GLIBC, 4, -1)]
PLATFORMS += [f"manylinux{year}_x86_64" for year in (2014, 2010, 1)]
HEAD = "# Written by `python -m tools.lock_wheels`: sha256, wheel, versions of Python that take it."


def report(python: str, lock: Path) -> dict[str, Any]:
    """pip's report of an installation of `lock` for a version of Python. Raises CalledProcessError if a wheel lacks."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        words = ["--isolated", "install", "--dry-run", "--quiet", "--disable-pip-version-check", "--no-deps"]
        words += ["--ignore-installed", "--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
        words += [*(f"--platform={platform}" for platform in PLATFORMS), f"--target={folder}", f"--report={file}"]
        subprocess.run([sys.executable, "-m", "pip", *words, "-r", str(lock)], check=True)
        return dict(json.loads(file.read_text()))


def wheels_of(plain: Mapping[str, Any]) -> dict[str, str]:
    """File name -> sha256 of every wheel in pip's report."""
    sources = [item["download_info"] for item in plain["install"]]
    return {unquote(urlsplit(s["url"]).path.rpartition("/")[2]): s["archive_info"]["hashes"]["sha256"] for s in sources}


def as_text(wheels_by_python: Mapping[str, Mapping[str, str]]) -> str:
    """The content of the file, sorted by wheel."""
    pairs = {(name, digest) for wheels in wheels_by_python.values() for name, digest in wheels.items()}
    lines = [
        f"{digest}  {name}  {','.join(p for p, wheels in wheels_by_python.items() if name in wheels)}"
        for name, digest in sorted(pairs)
    ]
    return "\n".join([HEAD, *lines]) + "\n"


def read_wheels(text: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """sha256, file name and versions of Python of every line of the file."""
    rows: Iterable[list[str]] = (line.split() for line in text.splitlines() if not line.startswith("#"))
    return [(digest, name, tuple(pythons.split(","))) for digest, name, pythons in rows]


def main() -> None:
    """Write the file."""
    WHEELS.write_text(as_text({python: wheels_of(report(python, LOCK)) for python in PYTHONS}))


if __name__ == "__main__":
    main()
