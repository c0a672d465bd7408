"""The order of the test files: those that take longest first."""

from pathlib import Path

LONGEST = (  # by CPU seconds of a file alone; the others follow by name
    "test_conformance",
    "test_allocate",
    "test_study",
    "test_proof",
    "test_publish",
    "test_bench",
    "test_blip2",
    "test_identity",
    "test_families",
    "test_study_pictures",
    "test_cli",
    "test_export",
    "test_retrieval",
    "test_evaluate",
    "test_smooth",
    "test_learned_rounding",
    "test_report",
    "test_kernels",
    "test_processor",
    "test_memory_limits",
    "test_float8",
    "test_demo",
    "test_output",
    "test_backends",
    "test_study_identity",
    "test_mutants",
    "test_attack",
    "test_verify",
    "test_data",
    "test_adapter",
    "test_api",
    "test_updates",
)


def longest_first(path: Path) -> int:
    """Sorting key of a test file."""
    return LONGEST.index(path.stem) if path.stem in LONGEST else len(LONGEST)
