"""Commands of README and documentation: each parses, a newcomer's pages name what is there, the example runs."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from exporter.artifact.output_folder import default_out
from exporter.commands.main import cli
from exporter.planning.overrides import adjusted
from exporter.planning.recipe_file import built_in, load_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "serving" / "README.md"]
FIRST_PAGES = ("README.md", "docs/tutorial/quickstart.md", "docs/how-to/serve-on-cpu.md")  # pasted line by line
OWN = ("./", "~/", "/", "me/")  # places that only the user has
BLANK = re.compile(r"[A-Z]{3,}(?:/[A-Z]+)?")
ONLY_THE_USER_KNOWS = {"docs/how-to/publish.md": {"ORG/NAME", "hub:ORG/NAME"}}


def commands(page: Path) -> Iterator[list[str]]:
    """Words of every line of a code block that starts with `mmq`, without its comment."""
    inside = False
    for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            inside = not inside
        elif inside and line.startswith("mmq "):
            yield shlex.split(line, comments=True)[1:]


ALL = [(str(page.relative_to(ROOT)), words) for page in PAGES for words in commands(page)]


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Name and parameters of a command. Raises UsageError for what the command line does not take."""
    command, name = cli, []
    while isinstance(command, click.Group) and words:
        child = command.get_command(click.Context(command), words[0])
        if child is None:
            break
        command, name, words = child, [*name, words[0]], words[1:]
    assert name, words
    return " ".join(name), command.make_context(name[-1], list(words)).params


@pytest.mark.parametrize(("page", "words"), ALL, ids=[f"{page}: {' '.join(words)}"[:80] for page, words in ALL])
def test_a_documented_command_parses(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(click.Path, "convert", lambda self, value, *_: Path(value))  # the user's files are not here
    parsed(words)
    blanks = {word for word in words if BLANK.fullmatch(word.removeprefix("hub:"))}
    assert blanks <= ONLY_THE_USER_KNOWS.get(page, set())


@pytest.mark.parametrize("page", FIRST_PAGES)
def test_a_newcomers_commands_name_what_is_there(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes and pictures are in the checkout; artifacts were made by an earlier command or `make demo`."""
    monkeypatch.setattr(click.Path, "convert", lambda self, value, *_: Path(value))
    text = (ROOT / page).read_text(encoding="utf-8")
    made = {"artifacts/demo-llava-w4-vit8"} if "make demo" in text else set()
    count = 0
    for words in commands(ROOT / page):
        name, params = parsed(words)
        count += 1
        if params.get("recipe"):
            assert params["recipe"] in built_in() or params["recipe"].startswith(OWN)
        if name == "export" and params["model"] == "demo-llava":
            made.add(str(params["out"] or default_out(adjusted(load_recipe(params["recipe"]), "demo-llava"))))
        places = [str(params[key]) for key in ("artifact", "model", "picture") if params.get(key)]
        for place in places:
            known = place in made or place == "demo-llava" or place.startswith(OWN) or (ROOT / place).is_file()
            assert known, (place, words)
    assert count >= 3


def test_the_example_of_a_method_runs_as_pasted(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "how-to" / "extend.md").read_text(encoding="utf-8")
    block = re.findall(r"^```\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[0]
    for name in ("exporter", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    program = f'set -e\nmmq() {{ {shlex.quote(sys.executable)} -m exporter "$@" || [ $? = 5 ]; }}\n'
    done = subprocess.run(
        ["bash", "-c", program + block],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("W4 g128 rounding") >= 2
    assert "outputs of 6 blocks match compressed-tensors'" in done.stdout
    assert (tmp_path / "artifacts" / "demo-llava-rounding" / "mmq_report.json").exists()
