"""Nothing that a job reads, and nothing that another program wrote, is deleted with a folder that mmq replaces."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from exporter.artifact.output_folder import Destination, refuse_foreign
from exporter.commands.main import cli
from exporter.data import places
from exporter.errors import ArtifactError
from tests.test_export import DEMO, contents, quick_export, quick_recipe

OTHER = quick_recipe(name="llava-w8")  # another artifact than the one in the folder


def images(folder: Path) -> Path:
    """A data folder with pictures."""
    folder.mkdir(parents=True)
    lines = []
    for i in range(8):
        Image.new("RGB", (9, 9), (i, 0, 0)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "caption": f"a square {i}", "question": "?", "answer": "x"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def tree(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below a folder."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file())
    return {str(path): str(path.readlink()) if path.is_symlink() else path.read_bytes() for path in paths}


def in_output(out: Path) -> dict[str, Any]:
    return {"sources": places(images(out / "images"))}


def is_output(out: Path) -> dict[str, Any]:
    return {"sources": places(out)}


def through_a_link(out: Path) -> dict[str, Any]:
    images(out / "deep" / "images")
    (out.parent / "alias").symlink_to(out / "deep")
    return {"sources": places(out.parent / "alias" / "images")}


def in_default_work(out: Path) -> dict[str, Any]:
    return {"sources": places(images(out.with_name(f"{out.name}.work") / "images"))}


def in_given_work(out: Path) -> dict[str, Any]:
    return {"sources": places(images(out.parent / "scratch" / "images")), "work": out.parent / "scratch"}


def in_temporary_folder(out: Path) -> dict[str, Any]:
    return {"sources": places(images(out.with_name(f".{out.name}.mmq-tmp") / "images"))}


def in_older_artifact(out: Path) -> dict[str, Any]:
    return {"sources": places(images(out.with_name(f".{out.name}.mmq-old") / "images"))}


def conversations(out: Path) -> dict[str, Any]:
    (out / "train.json").write_text("[]", encoding="utf-8")
    return {"sources": places(out / "train.json")}


def of_the_recipe(out: Path) -> dict[str, Any]:
    return {"recipe": OTHER.adjusted(calibration={"data": (str(images(out / "images")),)})}


def evaluation_of_the_recipe(out: Path) -> dict[str, Any]:
    return {"recipe": OTHER.adjusted(evaluation={"data": (f"folder:{images(out / 'images')}",)})}


def linked_shards(out: Path) -> dict[str, Any]:
    """The model's weights are links into the folder that is replaced."""
    model = Path(shutil.copytree(DEMO, out.parent / "model"))
    (out / ".weights").mkdir()
    (model / "model.safetensors").rename(out / ".weights" / "source.safetensors")
    (model / "model.safetensors").symlink_to(out / ".weights" / "source.safetensors")
    return {"recipe": quick_recipe(model, name="llava-w8")}


CASES: list[Callable[[Path], dict[str, Any]]] = [
    *(in_output, is_output, through_a_link, in_default_work, in_given_work, in_temporary_folder, in_older_artifact),
    *(conversations, of_the_recipe, evaluation_of_the_recipe, linked_shards),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_inputs_in_a_replaced_folder_are_refused_before_anything_is_touched(
    case: Callable[[Path], dict[str, Any]], finished: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    options = {"recipe": OTHER, "overwrite": True} | case(out)
    before = tree(tmp_path)
    with pytest.raises(ArtifactError, match=r"the job reads .* and would be deleted with it"):
        quick_export(out, **options)
    assert tree(tmp_path) == before


def test_an_output_in_the_data_folder_and_names_of_the_hub_are_allowed(tmp_path: Path) -> None:
    data = images(tmp_path / "images")
    destination = Destination(data / "out", data / "out.work", overwrite=True)
    destination.refuse_inputs([data, tmp_path / "out", data / "outer"])
    for path in (data / "out", data / "out" / "x", data / "out.work" / "x"):
        with pytest.raises(ArtifactError, match="would be deleted"):
            destination.refuse_inputs([path])


@pytest.mark.parametrize("foreign", ["notes.txt", "pictures/cat.png", "model-00002-of-00002.safetensors"])
@pytest.mark.parametrize("damaged", [False, True])
def test_files_of_others_in_an_artifact_are_not_deleted(
    foreign: str, damaged: bool, finished: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    (out / foreign).parent.mkdir(exist_ok=True)
    (out / foreign).write_bytes(b"precious")
    if damaged:  # then the artifact of the same job is replaced too
        (out / "config.json").write_text("{}")
    before = tree(tmp_path)
    with pytest.raises(ArtifactError, match=rf"holds files that mmq did not write \({foreign}\)"):
        quick_export(out, overwrite=True, **({} if damaged else {"recipe": OTHER}))
    kept = {name: content for name, content in tree(tmp_path).items() if ".work/" not in name}
    assert kept == before


def test_several_files_of_others_are_counted(finished: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    refuse_foreign(out)
    for name in ("b", "a"):
        (out / name).touch()
    with pytest.raises(ArtifactError, match=r"did not write \(a and 1 more\), which --overwrite would delete"):
        refuse_foreign(out)


def test_a_report_a_card_and_hidden_files_are_replaced(finished: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    for name in ("mmq_report.json", "README.md", ".DS_Store"):
        (out / name).write_text("x")
    quick_export(out, recipe=OTHER, overwrite=True)
    assert "llava-w8" in (out / "mmq_manifest.json").read_text()
    assert not {"mmq_report.json", "README.md", ".DS_Store"} & contents(out).keys()


def command(name: str, model: Path, *more: str) -> str:
    """Standard error of a study or an allocation, which must fail."""
    size = ["--max-size", "600kB"] if name == "allocate" else ["--bits", "4"]
    result = CliRunner().invoke(cli, [name, "--model", str(model), *size, "--device", "cpu", *more])
    assert result.exit_code == 1, result.output
    return result.stderr


@pytest.mark.parametrize("name", ["study", "allocate"])
def test_a_study_does_not_write_into_its_inputs_or_an_artifact(name: str, finished: Path, tmp_path: Path) -> None:
    model, data = Path(shutil.copytree(DEMO, tmp_path / "model")), images(tmp_path / "images")
    artifact = Path(shutil.copytree(finished, tmp_path / "artifact"))
    (tmp_path / "alias").symlink_to(model)
    before = tree(tmp_path)
    option = "--out" if name == "study" else "--folder"
    for folder in (model, model / "study", tmp_path / "alias", data, artifact):
        error = command(name, model, "--data", str(data), option, str(folder))
        assert "the folder of the study" in error, folder
    assert tree(tmp_path) == before


def test_an_allocation_replaces_only_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("metadata.jsonl", "{}"), ("llava-w4", "text"), ("mine.yaml", "a: 1")):
        (tmp_path / name).write_text(text)
        error = command("allocate", DEMO, "--out", name)
        assert f"{name} exists and is no recipe" in error
        assert (tmp_path / name).read_text() == text
