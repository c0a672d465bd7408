"""`mmq score` on result files of VQAv2, COCO and GQA."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from exporter.commands.main import cli
from exporter.data import CONVENTIONS
from exporter.errors import DataError
from exporter.evaluation.score_file import read_answers
from tests import layouts


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def score(tmp_path: Path, content: Any, *arguments: object) -> dict[str, Any]:
    file = layouts.write(tmp_path / "answers.json", content)
    done = run("score", file, *arguments, "--json")
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


def test_vqav2_results_by_answer_type(tmp_path: Path) -> None:
    layouts.vqav2(tmp_path)
    content = [
        {"question_id": 42000, "answer": "Yes."},
        {"question_id": 42001, "answer": "three"},  # three of ten said so
        {"question_id": 1, "answer": "red"},
    ]
    printed = score(tmp_path, content, "--data", f"vqav2:{tmp_path}", "--task", "vqa")
    assert printed["figures"] == {
        "accuracy": pytest.approx(1.9 / 3),
        "accuracy yes/no": 1.0,
        "accuracy number": pytest.approx(0.9),
        "accuracy other": 0.0,
    }
    assert (printed["unanswered"], printed["unknown"], printed["samples"]) == (["73002"], ["1"], 3)


def test_coco_results_list_unanswered_samples(tmp_path: Path) -> None:
    layouts.coco(tmp_path)
    content = [{"image_id": i, "caption": f"caption 0 of picture {i}"} for i in (1, 2, 3)]
    printed = score(tmp_path, content, "--data", f"coco:{tmp_path}", "--task", "captioning")
    assert printed["figures"]["bleu1"] == pytest.approx(1.0 * 2.718281828 ** (1 - 20 / 15), rel=1e-6)
    assert printed["method"]["tokenizer"].startswith("Penn Treebank")
    done = run("score", tmp_path / "answers.json", "--data", f"coco:{tmp_path}", "--task", "captioning")
    assert done.exit_code == 0
    assert "1 samples without an answer (scored as empty), first 4" in done.stdout


def test_gqa_answers_by_id(tmp_path: Path) -> None:
    layouts.gqa(tmp_path)
    printed = score(
        tmp_path, {"200": "No", "201": "right", "202": "the dog"}, "--data", f"gqa:{tmp_path}", "--task", "vqa"
    )
    assert printed["figures"]["accuracy"] == pytest.approx(2 / 3)
    assert printed["figures"]["accuracy choose"] == 0


def test_answers_to_other_samples_are_an_error(tmp_path: Path) -> None:
    layouts.gqa(tmp_path)
    printed = score(tmp_path, {"9": "no"}, "--data", f"gqa:{tmp_path}", "--task", "vqa")
    assert "answers none of the 3 samples" in printed["error"]
    assert printed["exit"] == 1


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ([{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}], "1 repeated ids: id 1 twice"),
        ([{"caption": "a"}, 4, {"id": 2}], "has 3 invalid entries"),
        ({"1": None}, "entry 0"),
        (4, "must be a JSON list of answers"),
        ("{", "is not a JSON file"),
    ],
)
def test_files_without_answers_are_refused(tmp_path: Path, content: Any, fragment: str) -> None:
    with pytest.raises(DataError, match=fragment):
        read_answers(layouts.write(tmp_path / "a.json", content))


@pytest.mark.parametrize("name", CONVENTIONS)
def test_data_sets_are_described(name: str) -> None:
    listed = json.loads(run("datasets", "--json").stdout)
    assert [entry["name"] for entry in listed][: len(CONVENTIONS)] == list(CONVENTIONS)
    text = " ".join(run("datasets", name).stdout.split())
    assert CONVENTIONS[name].license.split(";")[0][:30] in text
    assert name in run("datasets").stdout


def test_sources_of_recipes_are_checked_and_read(tmp_path: Path) -> None:
    layouts.coco(tmp_path / "coco")
    text = run("recipes", "llava-w4-vit8").stdout
    wrong = layouts.write(tmp_path / "wrong.yaml", text.replace("data: demo", "data: cocoo:/x"))
    done = run("plan", "--recipe", wrong, "--model", "demo-llava", "--json")
    assert "calibration.data: unknown data source 'cocoo:/x'. Did you mean 'coco'?" in json.loads(done.stdout)["error"]
    for line in ("evaluation: {data: [demo, gqa:/x], ", "evaluation: {data: coco, "):
        own_recipe = layouts.write(tmp_path / "mine.yaml", text.replace("evaluation: {", line))
        done = run("export", "--recipe", own_recipe, "--model", "demo-llava", "--out", tmp_path / "out", "--json")
        assert done.exit_code == 1
        assert ("all support task vqa" in done.stdout) or ("coco does not support task vqa" in done.stdout)
