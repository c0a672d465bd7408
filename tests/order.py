"""The order of the test files: those that take longest first."""

from pathlib import Path

LONGEST = (  # by CPU seconds of a file alone; the others follow by name
    "test_conformance",
    "test_memory_limits",  # five processes that import everything
    "test_study",
    "test_publish",
    "test_proof",
    "test_allocate",
    "test_kernels",
    "test_blip2",
    "test_identity",
    "test_study_identity",
    "test_evaluate",
    "test_export",
    "test_bench",
    "test_whole_forward",
    "test_families",
    "test_output",
    "test_check",
    "test_cli",
    "test_learned_rounding",
    "test_processor",
    "test_retrieval",
    "test_attack",
    "test_backends",
    "test_data",
)


def longest_first(path: Path) -> int:
    """Sorting key of a test file."""
    return LONGEST.index(path.stem) if path.stem in LONGEST else len(LONGEST)
