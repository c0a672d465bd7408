"""Size and shape of the package at several commits, as a table: files at the top, lines, words of the documentation.

python -m bench.structure edcc456 HEAD
"""

import argparse
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent


def files_of(commit: str) -> dict[PurePosixPath, str]:
    """Path -> text of the Python and Markdown files of a commit."""
    listed = _git("ls-tree", "-r", "--name-only", commit).splitlines()
    paths = [path for path in listed if path.endswith((".py", ".md"))]
    return {PurePosixPath(path): _git("show", f"{commit}:{path}") for path in paths}


def rows(files: dict[PurePosixPath, str]) -> dict[str, str]:
    """Name of a figure -> its value."""
    package = {path: text for path, text in files.items() if path.parts[0] == "exporter" and path.suffix == ".py"}
    lines = sorted(text.count("\n") for text in package.values())
    tests = [text for path, text in files.items() if path.parts[0] == "tests"]
    prose = [text for path, text in files.items() if path.suffix == ".md" and path.parts[0] in ("docs", "README.md")]
    top = {path.name for path in package if len(path.parts) == 2}
    packages = {path.parts[1] for path in package} - top
    return {
        "modules at the top of `exporter/`": f"{len(top)}",
        "packages at the top of `exporter/`": f"{len(packages)}",
        "files of the package": f"{len(package)}",
        "lines of the package": f"{sum(lines):,}",
        "median file, lines": f"{statistics.median(lines):.0f}",
        "longest file, lines": f"{lines[-1]}",
        "words of README and docs": f"{sum(len(text.split()) for text in prose):,}",
        "test functions": f"{sum(line.startswith('def test_') for text in tests for line in text.splitlines()):,}",
    }


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="+")
    commits = parser.parse_args(arguments).commits
    columns = [rows(files_of(commit)) for commit in commits]
    print(f"| | {' | '.join(commits)} |\n|---|{'---:|' * len(commits)}")
    for name in columns[0]:
        print(f"| {name} | {' | '.join(column[name] for column in columns)} |")


if __name__ == "__main__":
    main()
