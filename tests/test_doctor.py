"""`mmq doctor`: extras, vLLM, Java, GPU and driver, each with what its absence costs and how to install it."""

import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from exporter.commands import doctor
from exporter.commands.main import cli
from exporter.device import choose

EXTRAS = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "optional-dependencies"
]


@pytest.fixture(autouse=True)
def empty_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """PATH with one empty folder, no MMQ_VLLM, and no GPU that torch sees."""
    monkeypatch.delenv("MMQ_VLLM", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "choose", lambda request: choose("cpu"))
    return tmp_path


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_every_extra_for_users_is_listed_with_its_packages() -> None:
    names = {extra: {line.split(">")[0].split(";")[0].strip() for line in lines} for extra, lines in EXTRAS.items()}
    assert {extra: set(packages) for extra, (packages, _) in doctor.EXTRAS.items()} == {
        extra: packages for extra, packages in names.items() if extra not in ("dev", "docs", "serve")
    }


def test_a_missing_package_of_an_extra_has_its_cost_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_version", lambda name: None if name == "shap" else "1.0")
    report = doctor.examine()
    assert report["extra verify"] == "compressed-tensors 1.0"
    assert report["extra study"].startswith("missing shap: no importance")
    assert "pip install '.[study]'" in report["extra study"]
    assert "scipy 1.0" in report["extra study"]


def test_the_vllm_that_serve_would_run_is_named(empty_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no `mmq serve`" in doctor.vllm_state()
    assert "pip install" in doctor.vllm_state()
    on_path = program(empty_path / "vllm", "echo 0.31.0")
    assert doctor.vllm_state() == f"0.31.0, GPU build, {on_path} (PATH)"
    other = program(empty_path / "other", "echo 0.32.0+cpu")
    monkeypatch.setenv("MMQ_VLLM", str(other))
    assert doctor.vllm_state() == f"0.32.0+cpu, CPU build, {other} (MMQ_VLLM)"
    program(empty_path / "other", "exit 1")
    assert doctor.vllm_state().startswith("BROKEN (MMQ_VLLM)")
    monkeypatch.setenv("MMQ_VLLM", "/nowhere/vllm")
    assert "'/nowhere/vllm' does not exist" in doctor.vllm_state()


def test_gpu_and_driver_are_those_of_nvidia_smi(empty_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.examine()["gpu"] == doctor.NO_GPU
    answers = 'case "$1" in *driver*) echo 575.57.08;; *) echo 9.0;; esac'
    program(empty_path / "nvidia-smi", answers)
    report = doctor.examine()
    assert report["gpu"].startswith("compute capability 9.0")
    assert report["gpu driver"] == "575.57.08"
    assert "torch does not see it" in report["gpu"]
    program(empty_path / "nvidia-smi", "echo NVIDIA-SMI has failed; exit 9")
    assert doctor.examine()["gpu"] == doctor.NO_GPU


def test_java_is_reported_as_unneeded() -> None:
    assert doctor.java_state().startswith("missing: no command needs it")


def test_the_text_has_one_line_a_label() -> None:
    lines = CliRunner().invoke(cli, ["doctor"]).output.splitlines()
    labels = list(doctor.examine())
    assert [line.split("  ")[0] for line in lines if not line.startswith(" ")] == labels
    assert {"extra verify", "vllm", "java", "device", "host memory free", "disk free here"} <= set(labels)
