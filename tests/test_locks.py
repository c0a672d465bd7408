"""The lock files of `make lock` agree with pyproject.toml and with constraints.txt, the versions of the tests."""

import re
from collections import Counter
from pathlib import Path

import pytest
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename
from packaging.version import Version

from tools import lock, lock_wheels


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
        ("torch==2", "torch==3", "linux-cpu.txt has torch 3.13.0+cpu, pyproject.toml needs <2.15,>=2.11"),
        ("compressed-tensors==0.", "compressed-tensors==0.0.", "linux-cuda.txt has compressed-tensors 0.0."),
    ],
)
def test_differences_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, problem: str
) -> None:
    for file in lock.HEADERS:
        (tmp_path / file).write_text((lock.LOCKS / file).read_text().replace(old, new))
    monkeypatch.setattr(lock, "LOCKS", tmp_path)
    assert any(line.startswith(problem) for line in lock.problems())


def missing_wheels(lock_text: str, wheels_text: str) -> list[str]:
    """Lines of a lock that a version of Python has no wheel for, or more than one."""
    counts = Counter[tuple[str, str, str]]()
    for digest, file, pythons in lock_wheels.read_wheels(wheels_text):
        name, version, _, tags = parse_wheel_filename(file)
        assert re.fullmatch("[0-9a-f]{64}", digest), file
        for python in pythons:
            tag_names = {str(tag) for tag in tags}
            usable = tag_names & {str(tag) for tag in tags_of(python)}
            counts[str(name), str(version), python] += bool(usable)
    return [
        f"{name} {version} for {python}"
        for name, version in lock.pins(lock_text).items()
        for python in lock_wheels.PYTHONS
        if counts[name, str(Version(version)), python] != 1
    ]


def tags_of(python: str) -> list[Tag]:
    """Tags of wheels that CPython of a version takes on Linux x86_64."""
    numbers = [int(part) for part in python.split(".")]
    cpython = cpython_tags(numbers, platforms=lock_wheels.PLATFORMS)
    return [*cpython, *compatible_tags(numbers, f"cp{''.join(map(str, numbers))}", lock_wheels.PLATFORMS)]


def test_every_line_of_the_lock_for_cuda_has_a_wheel_for_every_python() -> None:
    """pip reported them from PyPI (`make lock-wheels`); no wheel is of another version than the lock's."""
    locked, wheels = lock_wheels.LOCK.read_text(), lock_wheels.WHEELS.read_text()
    assert missing_wheels(locked, wheels) == []
    assert len(lock.pins(locked)) > 80
    names = {str(parse_wheel_filename(file)[0]) for _, file, _ in lock_wheels.read_wheels(wheels)}
    assert names == set(lock.pins(locked))


def test_a_missing_or_foreign_wheel_is_noticed() -> None:
    locked, wheels = lock_wheels.LOCK.read_text(), lock_wheels.WHEELS.read_text()
    foreign = wheels.replace("safetensors-0.8.0-cp310-abi3-manylinux", "safetensors-0.8.0-cp314-cp314-manylinux")
    assert foreign != wheels
    assert missing_wheels(locked, foreign) == [f"safetensors 0.8.0 for {python}" for python in lock_wheels.PYTHONS]
    assert missing_wheels(locked.replace("rich==15.0.0", "rich==15.0.1"), wheels)[0] == "rich 15.0.1 for 3.11"


def test_wheels_are_read_from_pip_s_report() -> None:
    def reported(file: str, digest: str) -> dict[str, object]:
        source = {"url": f"https://a/b/{file}", "archive_info": {"hashes": {"sha256": digest}}}
        return {"download_info": source}

    old = lock_wheels.wheels_of({"install": [reported("torch-2%2Bcpu-cp311.whl", "aa"), reported("rich-1.whl", "cc")]})
    new = lock_wheels.wheels_of({"install": [reported("torch-2%2Bcpu-cp312.whl", "bb"), reported("rich-1.whl", "cc")]})
    text = lock_wheels.as_text({"3.11": old, "3.12": new})
    assert lock_wheels.read_wheels(text) == [
        ("cc", "rich-1.whl", ("3.11", "3.12")),
        ("aa", "torch-2+cpu-cp311.whl", ("3.11",)),
        ("bb", "torch-2+cpu-cp312.whl", ("3.12",)),
    ]
