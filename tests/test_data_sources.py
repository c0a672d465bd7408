"""A data source that does not exist is refused at once, and data without some tasks leads to a command that works."""

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from exporter.commands import next_steps
from exporter.commands.main import cli
from exporter.data import DATA, place
from exporter.errors import RecipeError, SourceError
from exporter.planning.overrides import adjusted
from exporter.planning.recipe_file import load_recipe
from tests.layouts import picture, write

PLAN = ("plan", "--recipe", "llava-w4-vit8", "--model", "demo-llava", "--device", "cpu")


def mmq(*words: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


def following(text: str) -> list[list[str]]:
    """Words after the program of every next step that was printed."""
    _, _, steps = text.partition("next:\n")
    return [shlex.split(line.strip().removeprefix(next_steps.program())) for line in steps.splitlines()]


def captions(folder: Path) -> Path:
    """Pictures with captions and without questions."""
    for i in range(8):
        picture(folder / f"{i}.png", i, (64 + i, 48))
    write(folder / "metadata.csv", "file_name,caption\n" + "".join(f"{i}.png,a picture {i}\n" for i in range(8)))
    return folder


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    captions(tmp_path / "captions")
    return tmp_path


WRONG = [
    ("./nosuch", "does not exist: there is no", "NAME:PATH of a public data set (coco"),
    ("flickr", "Did you mean 'flickr30k'?", "hub:ORG/NAME"),
    ("cocoo:/data/coco", "Did you mean 'coco'?", "hub:ORG/NAME"),
    ("flickr30k", "needs a folder", "flickr30k:PATH"),
    ("coco:nosuch", "does not exist", "datasets` describes"),
    ("hub:nosuch", "does not exist", "hub:ORG/NAME"),
    ("nosuch.json", "does not exist", "LLaVA's conversations"),
    ("empty", "is an empty folder", "datasets folder` shows its layout"),
    ("coco:empty", "is an empty folder", "datasets coco` shows its layout"),
    ("other", "has neither metadata.jsonl nor pictures", "datasets folder`"),
    ("other/notes.txt", "is a file, not a folder", "a source is a folder"),
    ("captions/metadata.csv", "is a file, not a folder", "pass its folder: captions"),
]


@pytest.mark.parametrize(("written", "what", "allowed"), WRONG)
def test_a_source_that_is_not_there_is_an_error_and_no_table(
    written: str, what: str, allowed: str, sources: Path
) -> None:
    done = mmq("data", "check", written)
    assert done.exit_code == 2
    assert what in done.stderr
    assert allowed in done.stderr.partition("Hint: ")[2]
    assert done.stdout == ""
    assert json.loads(mmq("data", "check", written, "--json").stdout)["exit"] == 2


@pytest.mark.parametrize("command", ["plan", "export", "evaluate", "report", "check", "bench", "study", "allocate"])
def test_every_command_that_takes_data_refuses_it_at_once(command: str, sources: Path) -> None:
    """The artifact is an empty folder: the data is refused before it is opened."""
    first = PLAN[1:-2] if command in ("plan", "export") else () if command in ("study", "allocate") else ("empty",)
    done = mmq(command, *first, "--data", "flickr")
    assert done.exit_code == 2, done.output
    assert "Did you mean 'flickr30k'?" in done.stderr


@pytest.mark.parametrize("name", sorted(DATA.keys() - {"demo", "drawings"}))
def test_every_source_that_needs_a_path_says_so(name: str) -> None:
    done = mmq("data", "check", name)
    assert done.exit_code == 2
    assert f"pass {name}:PATH" in done.stderr
    with pytest.raises(SourceError):
        place("nosuch:PATH")


def test_data_that_has_no_sample_is_an_error_with_its_reasons(sources: Path) -> None:
    done = mmq("data", "check", "coco:other")
    assert done.exit_code == 1
    assert done.stdout == ""
    assert "coco other has no samples:\n  other has no captions" in done.stderr


def test_data_with_captions_only_leads_to_commands_that_work(tmp_path: Path) -> None:
    folder = captions(tmp_path / "my captions")
    done = mmq("data", "check", folder)
    assert done.exit_code == 0
    assert "recipes that this data covers: blip2-retrieval-w3, blip2-retrieval-w4\n" in done.stdout
    assert re.search(r"recipes that this data covers with --task captioning: .*llava-w4-vit8", done.stdout)
    plan, export = following(done.stdout)
    assert (plan[0], export[0]) == ("plan", "export")
    planned = mmq(*plan)
    assert planned.exit_code == 0, planned.output
    assert "data: calibration 4 captioning; test 4 captioning" in planned.stdout
    exported = mmq(*export, "--samples", "2", "--eval-samples", "2", "--out", tmp_path / "out", "--device", "cpu")
    assert exported.exit_code in (0, 3, 5), exported.output  # whatever a demo model says of these pictures
    recipe = load_recipe(str(tmp_path / "out" / "recipe.yaml"))
    assert {gate.task for gate in recipe.gates} == {"captioning"}
    assert (recipe.calibration.tasks, recipe.overrides["tasks"]) == (("captioning",), "captioning")


def test_pictures_alone_lead_to_an_export_without_evaluation(tmp_path: Path) -> None:
    captions(tmp_path)
    (tmp_path / "metadata.csv").unlink()
    plan, _ = following(mmq("data", "check", tmp_path).stdout)
    assert plan[-1] == "--skip-evaluation"
    planned = mmq(*plan)
    assert planned.exit_code == 0, planned.output


def test_complete_data_needs_no_option(tmp_path: Path) -> None:
    captions(tmp_path)
    rows = "".join(f"{i}.png,a picture {i},what?,{i}\n" for i in range(8))
    write(tmp_path / "metadata.csv", f"file_name,caption,question,answer\n{rows}")
    checked = mmq("data", "check", tmp_path)
    plan, _ = following(checked.stdout)
    assert "--task" not in plan
    assert mmq(*plan).exit_code == 0
    assert checked.stdout.count("recipes that this data covers") == 1
    assert "next:" not in mmq("data", "check", tmp_path, "--json").stdout


@pytest.mark.parametrize("command", ["plan", "export"])
def test_a_job_whose_gates_the_data_cannot_measure_names_the_option_that_helps(command: str, tmp_path: Path) -> None:
    words = (command, *PLAN[1:], "--data", captions(tmp_path / "data"))
    out = ("--out", tmp_path / "out") if command == "export" else ()
    refused = mmq(*words, *out)
    assert refused.exit_code == 1
    option = re.findall(r"Hint: add `([^`]+)`", refused.stderr)
    assert option == ["--task captioning"]
    assert mmq(*PLAN, *words[-2:], *option[0].split()).exit_code == 0


def test_only_tasks_with_a_gate_can_be_named() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'captioning'"):
        adjusted(load_recipe("llava-w4-vit8"), "demo-llava", tasks=["captionin"])
    both = adjusted(load_recipe("llava-w4-vit8"), "demo-llava", tasks=["vqa", "captioning"])
    assert (both.gates, both.calibration) == (
        load_recipe("llava-w4-vit8").gates,
        load_recipe("llava-w4-vit8").calibration,
    )
    retrieval = adjusted(load_recipe("blip2-retrieval-w4"), "demo-blip2-itm", tasks=["retrieval"])
    assert len(retrieval.gates) == 2
