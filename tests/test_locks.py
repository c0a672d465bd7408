"""The lock files of `make lock` agree with pyproject.toml and with constraints.txt, the versions of the tests."""

from pathlib import Path

import pytest

from tools import lock


def test_the_locks_agree_with_what_the_tests_run_with() -> None:
    assert lock.problems() == []


def test_the_lock_for_a_cpu_has_no_cuda() -> None:
    cpu, cuda = (lock.pins((lock.LOCKS / f"linux-{kind}.txt").read_text()) for kind in ("cpu", "cuda"))
    assert cpu["torch"] == f"{cuda['torch']}+cpu"
    assert not [name for name in cpu if lock.CUDA_ONLY.match(name)]
    assert [name for name in cuda if name.startswith("nvidia-")]
    assert cpu.keys() == {name for name in cuda if not lock.CUDA_ONLY.match(name)}


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("numpy==", "numpy==1.", "linux-cpu.txt has numpy 1."),
        ("imagehash==", "other==", "linux-cpu.txt lacks imagehash"),
    ],
)
def test_differences_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, problem: str
) -> None:
    for file in lock.HEADERS:
        (tmp_path / file).write_text((lock.LOCKS / file).read_text().replace(old, new))
    monkeypatch.setattr(lock, "LOCKS", tmp_path)
    assert any(line.startswith(problem) for line in lock.problems())
