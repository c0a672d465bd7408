"""The first minutes of a user: commands to paste, names of folders, whole summaries, hints that a wheel can keep."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from exporter.artifact.output_folder import default_out
from exporter.commands import main, next_steps
from exporter.device import choose
from exporter.errors import EXIT_CODES
from exporter.events import Event
from exporter.model.embedded import MODELS
from exporter.pipeline.preparation import prepare
from exporter.planning.overrides import adjusted
from exporter.planning.recipe_file import built_in, load_recipe
from exporter.serving.launch import installation
from exporter.serving.preflight import needs_other_recipe

ROOT = Path(__file__).parent.parent
OUTSIDE = re.compile(r"\b(?:docs|bench|tests|tools|serving)/[\w./-]*\.(?:md|sh|py)\b|\bCONTRIBUTING|\bREADME\.md")
OF_AN_ARTIFACT = {"artifact/output_folder.py", "publishing/card.py"}  # they name the README.md of an artifact


def a_program(folder: Path, name: str = "mmq") -> Path:
    """An executable file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_a_suggested_command_starts_with_a_program_that_the_shell_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed, other = a_program(tmp_path / ".venv" / "bin"), a_program(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(installed)])
    monkeypatch.setenv("PATH", str(installed.parent))
    assert next_steps.program() == "mmq"
    monkeypatch.setenv("PATH", "/nowhere")
    assert next_steps.program() == ".venv/bin/mmq"
    monkeypatch.setenv("PATH", str(other.parent))  # another mmq
    assert next_steps.program() == ".venv/bin/mmq"
    monkeypatch.chdir("/")
    assert next_steps.program() == str(tmp_path / ".venv/bin/mmq").lstrip("/") or Path(next_steps.program()).is_file()
    monkeypatch.setattr(sys, "argv", ["/checkout/exporter/__main__.py"])
    monkeypatch.setenv("PATH", "/nowhere")
    ran = subprocess.run([*next_steps.program().split(), "--version"], cwd="/", capture_output=True, text=True)
    assert next_steps.program().endswith(" -m exporter")
    assert Path(ran.args[0]).is_file()


def test_suggested_commands_parse_and_quote_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my artifact"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(a_program(tmp_path / "bin").parent))
    monkeypatch.delenv("MMQ_VLLM", raising=False)
    lines = next_steps.next_steps(folder)
    assert any("vLLM" in line and "doctor" in line for line in lines)
    commands = [line for line in lines if line.startswith("  ")]
    assert [line.split()[1] for line in commands] == ["report", "ask", "serve", "check"]
    assert all(f"'{folder}'" in line for line in commands)
    a_program(tmp_path / "bin", "vllm")
    assert not any("vLLM" in line for line in next_steps.next_steps(folder))
    assert [line.split()[1] for line in next_steps.next_steps(folder, "not served")[1:2]] == ["report"]


@pytest.mark.parametrize(
    ("recipe", "flags", "gpu", "words"),
    [
        ("llava-w4-vit8", "avx2", None, "export --recipe llava-fp8-vit16 --model demo-llava"),
        ("llava-w4-vit8", "avx2 avx512f avx512_vnni", None, "export --recipe llava-w4-vit8a8 --model demo-llava"),
        ("llava-w4-vit8a8", "avx2", None, "export --recipe llava-fp8-vit16 --model demo-llava"),
        ("llava-w4-vit8a8", "avx2 avx512f avx512_vnni", None, None),
        ("llava-w4-vit8a8", "avx2 avx_vnni", None, "export --recipe llava-fp8-vit16 --model demo-llava"),
        ("llava-w4-vit8a8", "avx2 avx512f", None, "export --recipe llava-w4-vit4 --model demo-llava"),
        ("llava-fp8-vit16-cache8", "avx2", None, "export --recipe llava-fp8-vit16 --model demo-llava"),
        ("llava-fp8-vit16-cache8", "avx2 avx512f", None, None),
        ("llava-fp8-vit16", "avx2", None, None),
        ("llava-w4-vit8", "avx2", (9, 0), None),
    ],
)
def test_an_export_that_this_machine_cannot_serve_leads_to_one_that_it_can(
    recipe: str, flags: str, gpu: tuple[int, int] | None, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.serving.cpu_instructions.processor_flags", lambda: frozenset(flags.split()))
    monkeypatch.setattr("exporter.serving.preflight.capability", lambda: gpu)
    plan, _ = prepare(adjusted(load_recipe(recipe), "demo-llava"), choose("cpu"), headers_only=True)
    other = needs_other_recipe(plan)
    assert (None if other is None else " ".join(other)) == words
    lines = next_steps.next_steps(Path("out"), other=other)
    assert any("serve out" in line for line in lines) == (words is None)
    assert words is None or lines[-1].endswith(f" {words}")


@pytest.mark.parametrize("model", MODELS)
def test_no_default_folder_repeats_a_word(model: str) -> None:
    for name in built_in():
        words = default_out(adjusted(load_recipe(name), model)).name.split("-")
        assert len(words) == len(set(words)), words
    assert default_out(adjusted(load_recipe("llava-w4-vit8"), "demo-llava")).name == "demo-llava-w4-vit8"


def test_the_help_names_completion_and_exit_codes() -> None:
    text = " ".join(CliRunner().invoke(main.cli, ["--help"]).output.split())
    assert "_MMQ_COMPLETE=bash_source" in text
    assert all(f"{code} " in text.partition("Exit codes:")[2] for code in EXIT_CODES)


def texts_of(path: Path) -> list[str]:
    """String constants of a module, with docstrings of commands (their help) and without all other docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    quiet = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            shown = isinstance(node, ast.FunctionDef) and any("command" in ast.unparse(d) for d in node.decorator_list)
            quiet |= set() if shown else {id(node.body[0].value)}  # type: ignore[attr-defined]
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in quiet]
    return [node.value for node in constants if isinstance(node.value, str)]


def commands_of(path: Path) -> list[str]:
    """The commands of mmq between backticks in the texts of a module; {} stands for a value that is filled in."""
    texts = texts_of(path)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values))  # type: ignore[misc]
    return [command for text in texts for command in re.findall(r"`(mmq [^`]*)`", text)]


def test_no_hint_has_a_command_with_a_placeholder() -> None:
    """Only the user knows SOURCE, the place of the test data; COMMAND is the one that was wrong."""
    named = {path: commands_of(path) for path in sorted((ROOT / "exporter").rglob("*.py"))}
    assert sum(map(len, named.values())) > 20
    words = [(path.name, word) for path, commands in named.items() for text in commands for word in text.split()]
    assert {pair for pair in words if re.fullmatch(r"[A-Z]{3,}", pair[1])} == {
        ("errors.py", "COMMAND"),
        ("prove.py", "SOURCE"),
    }


def test_a_hint_starts_with_the_program_that_the_shell_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(a_program(tmp_path / ".venv" / "bin"))])
    monkeypatch.setenv("PATH", "/nowhere")
    shown = CliRunner().invoke(main.cli, ["plan", "--recipe", "llava-w9", "--model", "demo-llava"]).stderr
    assert "`.venv/bin/mmq recipes` describes them" in shown


def test_no_message_names_a_file_that_a_wheel_lacks() -> None:
    named = {
        path.relative_to(ROOT / "exporter").as_posix(): outside
        for path in (ROOT / "exporter").rglob("*.py")
        if (outside := [text for text in texts_of(path) if OUTSIDE.search(text)])
    }
    assert set(named) == OF_AN_ARTIFACT, named


def test_the_wheel_has_the_script_that_the_hint_names() -> None:
    script = Path(re.findall(r"bash (\S+) DIR", installation())[0])
    assert script.is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    for path in (ROOT / "serving" / "cpu").glob("*.*"):
        assert included[f"serving/cpu/{path.name}"] == f"exporter/serving/cpu/{path.name}"
    copied = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert all(
        f"COPY {folder} {folder}\n" in copied for folder in {str(Path(name).parent) for name in included} - {"."}
    )


def test_planning_reports_its_check_of_model_and_processor() -> None:
    events: list[Event] = []
    recipe = adjusted(load_recipe("llava-w4-vit8"), "demo-llava")
    prepare(recipe, choose("cpu"), headers_only=True, on_event=events.append)
    assert [event.done for event in events if "processor" in event.message] == [0, 1]


def test_make_demo_says_how_to_activate_the_environment() -> None:
    shown = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "source .venv/bin/activate" in shown
