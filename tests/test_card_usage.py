"""Sections of the model card about use: the command parses, the Python code runs, and hardware is that of the plan."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from exporter.commands.main import cli, export
from exporter.model.embedded.example import PICTURE
from exporter.publishing.artifact_summary import Summary, folder_reader, read_summary
from exporter.publishing.card import CardDeclarations, render
from exporter.publishing.card_usage import creation, hardware, python_example


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("card") / "out"
    words = ["export", "--recipe", "llava-w4-vit8", "--model", "demo-llava", "--out", str(out), "--skip-evaluation"]
    done = CliRunner().invoke(cli, [*words, "--samples", "2", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture
def summary(folder: Path) -> Summary:
    return read_summary("out", folder_reader(folder))


def of_hub(summary: Summary, data: str) -> Summary:
    """The summary of an artifact of a model on the hub with other calibration data."""
    source = summary.manifest.source.model_copy(update={"model": "org/llava@0123abc"})
    calibration = summary.manifest.provenance.calibration.model_copy(update={"data": data})
    provenance = summary.manifest.provenance.model_copy(update={"calibration": calibration})
    return replace(summary, manifest=summary.manifest.model_copy(update={"source": source, "provenance": provenance}))


def command_of(text: str) -> list[str]:
    return shlex.split(text.split("```")[1])


@pytest.mark.parametrize(
    ("data", "arguments"),
    [
        ("demo", []),
        ("coco train2017, hub org/x", ["--data", "coco:PATH"]),
        ("folder my images", ["--data", "PATH"]),
    ],
)
def test_the_command_makes_the_artifact_again(data: str, arguments: list[str], summary: Summary) -> None:
    words = command_of(creation(of_hub(summary, data), "org/llava"))
    expected = ["mmq", "export", "--recipe", "recipe.yaml", "--model", "org/llava", "--revision", "0123abc"]
    assert words == [*expected, *arguments]
    export.make_context("export", words[2:])  # raises for an unknown option


def test_a_source_that_is_not_on_the_hub_is_named(summary: Summary) -> None:
    demo = command_of(creation(summary, None))
    assert demo[demo.index("--model") + 1] == "demo-llava"
    source = summary.manifest.source.model_copy(update={"model": "my-llava"})
    local = replace(summary, manifest=summary.manifest.model_copy(update={"source": source}))
    assert "--model MODEL" in creation(local, None)
    assert "`my-llava`" in creation(local, None)


def code_of(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_python_code_runs(folder: Path, summary: Summary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("compressed_tensors")
    client, local = code_of(python_example(str(folder), summary))
    compile(client, "client", "exec")
    assert "add_special_tokens" not in client
    (tmp_path / "picture.jpg").write_bytes(PICTURE.read_bytes())
    monkeypatch.chdir(tmp_path)
    shown: list[str] = []
    exec(local, {"print": shown.append})
    assert shown[0].strip()


def test_hardware_names_the_kernels_of_the_plan(summary: Summary) -> None:
    text = hardware(summary)
    for part in summary.parts:
        assert part.kernels
        assert f"- {part.component}, {part.scheme}: {part.kernels}" in text
    assert "not on CPU" in text
    assert f"quantized on: {summary.manifest.provenance.device}" in text


def test_the_card_has_all_sections_in_order(summary: Summary) -> None:
    text = render("me/x", summary, CardDeclarations(), (), "")
    found = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert found[:5] == ["What was quantized", "Quality", "How it was made", "Serving", "Hardware"]
    assert "Limitations" in found
