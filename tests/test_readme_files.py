"""Files that README and the quick start say their commands write are there after these commands."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from exporter.commands.main import cli

ROOT = Path(__file__).parent.parent


def mmq(*words: str) -> int:
    return CliRunner().invoke(cli, list(words)).exit_code


def test_the_named_files_exist_after_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    quickstart = (ROOT / "docs" / "tutorial" / "quickstart.md").read_text(encoding="utf-8")
    (export,) = re.findall(r"^mmq (export .*--model demo-llava)$", quickstart, re.MULTILINE)
    (report,) = re.findall(r"^mmq (report .*)$", quickstart, re.MULTILINE)
    files = re.findall(r"^\| `(mmq_[\w.]+)` \|", readme, re.MULTILINE)
    assert len(files) == 2
    monkeypatch.chdir(tmp_path)
    assert mmq(*shlex.split(export), "--samples", "2", "--eval-samples", "2", "--device", "cpu") in (0, 5)
    artifact, _, page = shlex.split(report, comments=True)[1:]
    assert [name for name in files if not (tmp_path / artifact / name).is_file()] == []
    assert mmq(*shlex.split(report, comments=True)) == 0
    assert (tmp_path / page).is_file()
