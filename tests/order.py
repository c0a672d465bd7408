"""The order of the test files: those that take longest first, whatever else they have in their names."""

from pathlib import Path

# CPU seconds of a file alone, more than 10, by `make test PARALLEL=` with pytest's --durations. The others follow.
LONGEST = ("test_conformance",)


def longest_first(path: Path) -> int:
    """Sorting key of a test file."""
    return LONGEST.index(path.stem) if path.stem in LONGEST else len(LONGEST)
