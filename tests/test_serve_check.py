"""`mmq export --serve-check`: refused before the work, or the same check as `mmq check`."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from exporter.commands.main import cli
from exporter.pipeline import serving_check
from exporter.serving import check as checking

EXPORT = ["export", "--recipe", "llava-w4", "--model", "demo-llava", "--samples", "4", "--skip-evaluation"]


@pytest.fixture
def vllm(tmp_path: Path) -> str:
    """A fake vLLM that reports a version but cannot serve."""
    path = tmp_path / "vllm"
    path.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && echo 0.32.0+cpu && exit 0\necho 'RuntimeError: no kernel'\nexit 1\n"
    )
    path.chmod(0o755)
    return str(path)


@pytest.fixture(autouse=True)
def processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the system lists of its processor: AVX-512."""
    (tmp_path / "cpuinfo").write_text("flags : avx2 avx512f avx512_vnni\n")
    monkeypatch.setattr("exporter.serving.cpu_instructions.CPUINFO", tmp_path / "cpuinfo")
    return tmp_path / "cpuinfo"


def export(tmp_path: Path, *more: str) -> Any:
    return CliRunner().invoke(cli, [*EXPORT, "--device", "cpu", "--out", str(tmp_path / "out"), *more])


def test_without_vllm_it_is_refused_before_the_work(tmp_path: Path) -> None:
    done = export(tmp_path, "--serve-check", "--vllm", str(tmp_path / "none"))
    assert done.exit_code == 1
    assert "does not exist" in done.output
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_this_vllm_cannot_serve_is_refused_before_the_work(tmp_path: Path, vllm: str) -> None:
    done = export(tmp_path, "--serve-check", "--vllm", vllm, "--recipe", "llava-w4-vit8")
    assert done.exit_code == 1
    assert "rule kernel: W8 row is not served on a CPU" in done.output
    assert not (tmp_path / "out").exists()


def test_a_processor_without_the_kernel_is_refused_before_the_work(tmp_path: Path, vllm: str, processor: Path) -> None:
    processor.write_text("flags : avx2\n")
    done = export(tmp_path, "--serve-check", "--vllm", vllm)
    assert done.exit_code == 1
    assert "needs AVX-512" in done.output
    assert not (tmp_path / "out").exists()


def test_an_engine_that_does_not_start_fails_the_export(tmp_path: Path, vllm: str) -> None:
    done = export(tmp_path, "--serve-check", "--vllm", vllm)
    assert done.exit_code == 1
    assert "RuntimeError: no kernel" in done.output
    assert "serving" not in json.loads((tmp_path / "out" / "mmq_manifest.json").read_text())


@pytest.mark.parametrize(("problems", "code"), [((), 0), (("too far",), 3)])
def test_the_result_of_the_check_is_stored_and_decides_the_exit_code(
    tmp_path: Path, vllm: str, monkeypatch: pytest.MonkeyPatch, problems: tuple[str, ...], code: int
) -> None:
    checks: list[tuple[Path, int]] = []

    def stand_in(folder: Path, samples: Any, processor: Any, session: Any, control: bool) -> checking.CheckResult:
        checks.append((folder, len(samples)))
        assert control
        return checking.CheckResult("0.32.0+cpu", "cpu", len(samples), 0.06, None, None, {}, (), 1.0, problems)

    monkeypatch.setattr(serving_check, "check", stand_in)
    done = export(tmp_path, "--serve-check", "--vllm", vllm, "--json")
    assert done.exit_code == code
    assert checks == [(tmp_path / "out", 16)]
    assert json.loads((tmp_path / "out" / "mmq_report.json").read_text())["serving"]["problems"] == list(problems)
    assert json.loads((tmp_path / "out" / "mmq_manifest.json").read_text())["serving"]["passed"] is not bool(problems)
