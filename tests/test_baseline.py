"""The baseline must be the source in the manifest, or report and card name another model."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from exporter.artifact.artifact import Artifact
from exporter.artifact.manifest import Manifest, SourceRecord, read_manifest
from exporter.commands.main import cli
from exporter.device import choose
from exporter.errors import ArtifactError, CheckpointError
from exporter.evaluation.answers import Answerer
from exporter.evaluation.backends import local_answerers
from exporter.evaluation.baseline import compare
from exporter.evaluation.report_file import REPORT
from exporter.events import ignore
from exporter.model.embedded import MODELS
from exporter.model.source import open_source
from exporter.publishing.artifact_summary import read_place
from exporter.publishing.card import CardDeclarations, render
from exporter.publishing.proof.prove import prove
from exporter.publishing.report.content import collect
from exporter.quantization import identity
from tests.test_export import quick_export


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of demo-llava with its report."""
    out = tmp_path_factory.mktemp("baseline") / "artifact"
    quick_export(out, skip_evaluation=False)
    return out


@pytest.fixture
def artifact(measured: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(measured, tmp_path / "artifact")
    return tmp_path / "artifact"


def model_with(folder: Path, change: Callable[[Path], None]) -> Path:
    """A changed copy of the source."""
    shutil.copytree(MODELS["demo-llava"], folder)
    change(folder)
    return folder


def other_norm(folder: Path) -> None:
    """Scale one norm."""
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.model.norm.weight"].mul_(2)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def other_template(folder: Path) -> None:
    """Change the chat template."""
    path = folder / "chat_template.jinja"
    path.write_text("please " + path.read_text())


def other_config(folder: Path) -> None:
    """Change the epsilon of a norm."""
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-3
    (folder / "config.json").write_text(json.dumps(config))


def evaluate(artifact: Path, *options: str) -> tuple[int, str]:
    """`mmq evaluate` on a few samples: exit code and output."""
    done = CliRunner().invoke(cli, ["evaluate", str(artifact), "--eval-samples", "4", "--device", "cpu", *options])
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, done.output


OTHERS = {
    "weights": (other_norm, "model.safetensors differs"),
    "template": (other_template, "chat_template.jinja differs"),
    "config": (other_config, "config.json"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_refused_by_name_and_the_report_stays(name: str, artifact: Path, tmp_path: Path) -> None:
    change, named = OTHERS[name]
    before = (artifact / REPORT).read_bytes()
    code, output = evaluate(artifact, "--baseline", str(model_with(tmp_path / "damaged", change)))
    assert code == 1
    assert f"damaged is not the source model of {artifact} (demo-llava)" in output
    assert named in output
    assert "--other-baseline" in output
    assert (artifact / REPORT).read_bytes() == before
    assert not (tmp_path / ".mmq-answers").exists()


def test_the_same_model_in_another_folder_is_the_source(artifact: Path, tmp_path: Path) -> None:
    code, output = evaluate(artifact, "--baseline", str(model_with(tmp_path / "copy", lambda folder: None)))
    assert code == 5, output  # four samples resolve nothing
    baseline = json.loads((artifact / REPORT).read_text())["evaluation"]["baseline"]
    assert baseline == {"model": "copy", "is_source": True, "differs": []}
    assert read_place(str(artifact)).other_baseline == ""


def test_an_allowed_other_baseline_is_named_in_report_and_card(artifact: Path, tmp_path: Path) -> None:
    other = model_with(tmp_path / "damaged", other_norm)
    code, output = evaluate(artifact, "--baseline", str(other), "--other-baseline")
    assert code == 5, output
    assert "damaged, is not the artifact's source model" in output
    baseline = json.loads((artifact / REPORT).read_text())["evaluation"]["baseline"]
    assert baseline == {"model": "damaged", "is_source": False, "differs": ["model.safetensors differs"]}
    summary = read_place(str(artifact))
    assert summary.other_baseline == "damaged, not demo-llava"
    assert collect(summary, {})["other_baseline"] == summary.other_baseline
    card = render("me/x", summary, CardDeclarations(), (), "")
    assert "**another model than the source**: damaged, not demo-llava" in card
    done = CliRunner().invoke(cli, ["report", str(artifact), "--out", str(tmp_path / "page.html")])
    assert done.exit_code == 0, done.output
    assert "belong to another model than the source: damaged, not demo-llava" in (tmp_path / "page.html").read_text()
    _, problems = prove(artifact, choose("cpu"), ignore)
    assert "the report compares the artifact with another model than its source: damaged, not demo-llava" in problems


@pytest.mark.parametrize("claim", [{"is_source": True, "model": "demo-llava", "differs": []}, None])
def test_a_report_that_claims_the_source_is_checked_by_digest(claim: object, artifact: Path) -> None:
    report = json.loads((artifact / REPORT).read_text())
    report["evaluation"]["baseline"] = claim
    report["evaluation"]["models"]["full precision"]["weights"] = "0" * 64
    (artifact / REPORT).write_text(json.dumps(report))
    assert read_place(str(artifact)).other_baseline.endswith(", not demo-llava")
    report["evaluation"]["baseline"] = "text"
    (artifact / REPORT).write_text(json.dumps(report))
    with pytest.raises(ArtifactError, match=r"evaluation\.baseline"):
        read_place(str(artifact))


def test_an_export_is_compared_with_its_source(measured: Path) -> None:
    evaluation = json.loads((measured / REPORT).read_text())["evaluation"]
    assert evaluation["baseline"] == {"model": "demo-llava", "is_source": True, "differs": []}
    assert evaluation["models"]["full precision"]["weights"] == read_manifest(measured).source.digest
    assert read_place(str(measured)).other_baseline == ""


def older(manifest: Manifest) -> Manifest:
    """A manifest of an older mmq, which names only shards."""
    source = SourceRecord(model=manifest.source.model, shards=manifest.source.shards)
    return manifest.model_copy(update={"source": source})


def test_a_manifest_that_names_only_shards_is_compared_by_these(measured: Path, tmp_path: Path) -> None:
    manifest = older(Artifact.open(measured).manifest)
    for change, same in ((other_norm, False), (other_template, True), (other_config, True)):
        folder = model_with(tmp_path / change.__name__, change)
        assert compare(manifest, open_source(str(folder))[0]).is_source is same


def models_of(artifact: Path, source: Path) -> tuple[Answerer, Answerer]:
    """Answerers of source and artifact."""
    return local_answerers(open_source(str(source))[0], Artifact.open(artifact), choose("cpu"), batch=4)


def weights_of(folder: Path) -> None:
    """Change one value of the last tensor in a folder, and set the file's times back."""
    path = folder / "model.safetensors"
    times, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("changed", ["source", "artifact"])
def test_stored_answers_depend_on_every_byte_of_the_weights(changed: str, artifact: Path, tmp_path: Path) -> None:
    source = model_with(tmp_path / "model", lambda folder: None)
    before = models_of(artifact, source)
    for model in before:
        model.require_unchanged()
    weights_of(source if changed == "source" else artifact)
    now = models_of(artifact, source)
    differs = [first.identity != second.identity for first, second in zip(before, now, strict=True)]
    assert differs == [changed == "source", changed == "artifact"]
    with pytest.raises(CheckpointError, match="model changed during the run"):
        before[differs.index(True)].require_unchanged()
    before[differs.index(False)].require_unchanged()


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json", "chat_template.jinja", "vocab.json"])
def test_stored_answers_depend_on_every_file_of_the_processor(name: str, artifact: Path, tmp_path: Path) -> None:
    source = model_with(tmp_path / "model", lambda folder: None)
    before = models_of(artifact, source)
    with (source / name).open("a") as file:
        file.write(" ")
    now = models_of(artifact, source)
    assert all(first.identity != second.identity for first, second in zip(before, now, strict=True))


@pytest.mark.parametrize("package", ["torch", "transformers", "pillow"])
def test_stored_answers_depend_on_package_versions(
    package: str, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = models_of(artifact, MODELS["demo-llava"])
    true = identity._version
    monkeypatch.setattr(identity, "_version", lambda name: "99.1" if name == package else true(name))
    now = models_of(artifact, MODELS["demo-llava"])
    assert all(first.identity != second.identity for first, second in zip(before, now, strict=True))
