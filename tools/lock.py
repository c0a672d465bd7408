"""Write the lock files: every version of an installation of mmq on Linux x86_64, for CUDA and for a CPU.

    python -m tools.lock [--check]

uv resolves pyproject.toml with the versions of constraints.txt, which the tests use, for Python 3.11 to 3.13. The lock
for a CPU is the same without CUDA's packages, and with PyTorch's CPU build. `--check` only compares: it exits 1 where a
lock and constraints.txt or pyproject.toml disagree, and needs no network.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
LOCKS = ROOT / "locks"
EXTRAS = ("verify", "study", "hub", "report")
CUDA_ONLY = re.compile(r"^(nvidia-|cuda-|triton\b)")
PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)( ;.*)?$")
MARKER = " ; platform_machine == 'x86_64' and sys_platform == 'linux'"  # holds for every line
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
HEADERS = {
    "linux-cuda.txt": "pip install -r locks/linux-cuda.txt && pip install --no-deps .",
    "linux-cpu.txt": f"pip install -r locks/linux-cpu.txt --extra-index-url {CPU_INDEX} && pip install --no-deps .",
}


def normalized(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, str]:
    """Distribution -> version of the lines `NAME==VERSION`."""
    matches = (PIN.match(line.strip()) for line in text.splitlines())
    return {normalized(match[1]): match[2] for match in matches if match}


def resolved() -> str:
    """uv's resolution, one pin per line."""
    words = ["uv", "pip", "compile", "pyproject.toml", "--universal", "--python-version", "3.11", "--no-header"]
    words += ["--no-annotate", "--constraints", "constraints.txt", *(f"--extra={extra}" for extra in EXTRAS)]
    done = subprocess.run(
        [str(Path(sys.executable).parent / words[0]), *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"uv could not resolve pyproject.toml:\n{done.stderr}")
    return done.stdout.replace(MARKER, "")


def without_cuda(text: str) -> str:
    """The lock for a CPU from the one for CUDA."""
    kept = [line for line in text.splitlines() if not CUDA_ONLY.match(line)]
    return "\n".join(re.sub(r"^(torch==[^+\s]+)", r"\1+cpu", line) for line in kept) + "\n"


def problems() -> list[str]:
    """Where the stored locks contradict constraints.txt, or lack a dependency of pyproject.toml or leave its range."""
    tested = pins((ROOT / "constraints.txt").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *(need for extra in EXTRAS for need in project["optional-dependencies"][extra])]
    requirements = [Requirement(need) for need in needed]
    names = {normalized(requirement.name) for requirement in requirements}
    lines = []
    for file in HEADERS:
        locked = pins((LOCKS / file).read_text())
        lines += [f"{file} lacks {name}" for name in sorted(names - locked.keys())]
        lines += [
            f"{file} has {name} {version}, constraints.txt {tested[name]}"
            for name, version in locked.items()
            if name in tested and version.removesuffix("+cpu") != tested[name]
        ]
        lines += [
            f"{file} has {name} {locked[name]}, pyproject.toml needs {requirement.specifier}"
            for requirement in requirements
            if (name := normalized(requirement.name)) in locked and not requirement.specifier.contains(locked[name])
        ]
    return lines


def main() -> None:
    """Write the files, or compare them."""
    if "--check" in sys.argv[1:]:
        if lines := problems():
            raise SystemExit("\n".join([*lines, "run `make lock`"]))
        return
    cuda = resolved()
    LOCKS.mkdir(exist_ok=True)
    for (file, install), text in zip(HEADERS.items(), (cuda, without_cuda(cuda)), strict=True):
        (LOCKS / file).write_text(f"# Written by `make lock`. {install}\n{text}")


if __name__ == "__main__":
    main()
