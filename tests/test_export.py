"""Exports of the embedded model: byte-identical results, kill and resume, and errors for all kinds of bad input."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.artifact.artifact import Artifact
from exporter.artifact.output_folder import default_work
from exporter.artifact.verify import verify
from exporter.device import choose
from exporter.errors import ArtifactError, CheckpointError, MmqError, PlanError, WorkdirError
from exporter.evaluation.evaluate import compare
from exporter.events import Event
from exporter.formats import FORMATS
from exporter.model.checkpoint import Checkpoint
from exporter.model.embedded import MODELS
from exporter.model.source import open_source
from exporter.pipeline.export import Export, export
from exporter.pipeline.preparation import prepare, with_suitable_data
from exporter.pipeline.samples import evaluation_samples
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import load_recipe
from exporter.publishing.artifact_summary import read_place
from tests.children import killed_after
from tests.tiny_models import QUICK

pytestmark = pytest.mark.usefixtures("unloaded")

DEMO = MODELS["demo-llava"]


def quick_recipe(model: str | Path = "demo-llava", name: str = "llava-w4-vit4", samples: int = 6) -> Recipe:
    """A shipped recipe on few samples; GPTQ in both parts, so that every unit needs statistics."""
    data = load_recipe(name).model_dump()
    data["model"] |= {"repo": str(model), "revision": None}
    data["calibration"] |= {"samples": samples, "batch": 3}
    data["evaluation"] |= {"samples": 4}
    for rule in data["quantize"]:
        rule["options"] |= QUICK[rule["method"]]
    return Recipe.model_validate(data)


def quick_export(out: Path, on_event: Callable[[Event], None] = lambda event: None, **options: object) -> Export:
    """Export the demo model without evaluating it."""
    settings = {"recipe": quick_recipe(), "device": choose("cpu"), "skip_evaluation": True} | options
    recipe = settings.pop("recipe")
    return export(recipe, out=out, on_event=on_event, **settings)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    """File name -> bytes."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_two_runs_are_byte_identical(finished: Path, tmp_path: Path) -> None:
    quick_export(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(finished)


def test_another_seed_gives_another_artifact(finished: Path, tmp_path: Path) -> None:
    recipe = quick_recipe()
    other = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"seed": 1})})
    quick_export(tmp_path / "other", recipe=other)
    assert contents(tmp_path / "other")["model.safetensors"] != contents(finished)["model.safetensors"]


def test_killed_after_every_unit_and_resumed_is_byte_identical(finished: Path, tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "resumed"
    units = len(json.loads((finished / "mmq_manifest.json").read_text())["units"])
    assert units >= 4
    for unit in range(1, units + 1):
        killed_after(unit, quick_export, out, work=work)
        assert len(list(work.glob("*.safetensors"))) == unit
        assert not out.exists()
    received: list[Event] = []
    quick_export(out, received.append, work=work)
    assert [event.message for event in received if event.stage == "quantize"] == ["resumed"]
    assert contents(out) == contents(finished)


def test_resumes_from_every_single_unit(finished: Path, finished_work: Path, tmp_path: Path) -> None:
    files = sorted(finished_work.glob("*.safetensors"))
    for keep in range(len(files)):
        for path in sorted(finished_work.glob("*.safetensors"))[keep:]:
            path.unlink()
        quick_export(tmp_path / f"from-{keep}", work=finished_work)
        assert contents(tmp_path / f"from-{keep}") == contents(finished), keep


def test_half_written_unit_is_redone(finished: Path, finished_work: Path, tmp_path: Path) -> None:
    last = sorted(finished_work.glob("*.safetensors"))[-1]
    last.rename(finished_work / f".{last.name}.123.tmp")  # what a kill in the middle of a write leaves
    quick_export(tmp_path / "second", work=finished_work)
    assert contents(tmp_path / "second") == contents(finished)
    assert not list(finished_work.glob(".*.tmp"))


def test_work_folder_of_another_job_is_refused(finished_work: Path, tmp_path: Path) -> None:
    work = finished_work
    with pytest.raises(WorkdirError, match="6 samples -> 5 samples"):
        quick_export(tmp_path / "second", work=work, recipe=quick_recipe(samples=5))
    with pytest.raises(WorkdirError, match=r"quantize\[\d\]\.bits 4 -> 3"):
        quick_export(tmp_path / "second", work=work, recipe=quick_recipe(name="llava-w3-vit4"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(WorkdirError, match="is not an mmq work folder"):
        quick_export(tmp_path / "second", work=tmp_path / "mine")
    assert not (tmp_path / "second").exists()


def test_artifact_keeps_names_files_and_untouched_tensors(finished: Path) -> None:
    source, _ = open_source("demo-llava")
    artifact = Checkpoint.open(finished)
    packed = json.loads((finished / "mmq_manifest.json").read_text())["linears"]
    for name in source.tensors:
        module = name.removesuffix(".weight")
        if module in packed:
            assert f"{module}.weight_packed" in artifact.tensors
        else:
            assert torch.equal(artifact.read(name), source.read(name)), name
    texts = {path.name for path in DEMO.iterdir() if path.suffix in (".json", ".jinja")} - {"config.json"}
    assert texts <= {path.name for path in finished.iterdir()}
    config = json.loads((finished / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert {k: v for k, v in config.items() if k != "quantization_config"} == source.config


def test_verify_finds_a_flipped_bit_a_missing_file_and_a_wrong_pattern(finished: Path, tmp_path: Path) -> None:
    verified = verify(finished, choose("cpu"), lambda event: None)
    if find_spec("compressed_tensors"):
        assert verified.block_difference == pytest.approx(0, abs=1e-4)
    else:
        assert "not installed" in verified.skipped

    def broken(change: Callable[[Path], None]) -> str:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(finished, copy)
        change(copy)
        with pytest.raises(ArtifactError) as caught:
            verify(copy, choose("cpu"), lambda event: None)
        return caught.value.message

    def flip(copy: Path) -> None:
        path = copy / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))

    def flip_and_rehash(copy: Path) -> None:
        path = copy / "model.safetensors"
        tensors = load_file(path)
        name = next(name for name in tensors if name.endswith("weight_packed"))
        tensors[name][0, 0] ^= 1
        save_file(tensors, path, {"format": "pt"})
        forge(copy)

    def retarget(copy: Path) -> None:
        config = json.loads((copy / "config.json").read_text())
        for group in config["quantization_config"]["config_groups"].values():
            group["targets"] = [target.replace("q_proj", "x_proj") for target in group["targets"]]
        (copy / "config.json").write_text(json.dumps(config))
        forge(copy)

    def forge(copy: Path) -> None:
        """Renew the file hashes, so that only deeper checks can fail."""
        from exporter.files.file_hashes import sha256

        manifest = json.loads((copy / "mmq_manifest.json").read_text())
        manifest["files"] = {name: sha256(copy / name) for name in manifest["files"]}
        (copy / "mmq_manifest.json").write_text(json.dumps(manifest))

    assert "content changed after the export" in broken(flip)
    assert "differ from the computed ones" in broken(flip_and_rehash)
    assert "; expected one" in broken(retarget)
    assert "missing" in broken(lambda copy: (copy / "tokenizer.json").unlink())


def damaged_model(folder: Path, change: Callable[[Path], None]) -> Path:
    """A damaged copy of the demo model."""
    shutil.copytree(DEMO, folder)
    change(folder)
    return folder


def poison(name: str) -> Callable[[Path], None]:
    """Put one NaN into a tensor."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name].view(-1)[7] = float("nan")
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change


def truncate(folder: Path) -> None:
    """Cut the only shard short."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def rename_architecture(folder: Path) -> None:
    """Name an architecture that mmq does not support."""
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["MysteryForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))


def misfit_config(folder: Path) -> None:
    """Write a config with other sizes than the weights."""
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 128
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "kind", "fragment"),
    [
        (truncate, CheckpointError, "truncated"),
        (lambda folder: (folder / "model.safetensors").unlink(), CheckpointError, "no model.safetensors"),
        (poison("language_model.model.layers.0.mlp.up_proj.weight"), CheckpointError, "up_proj.*not finite"),
        (poison("language_model.model.norm.weight"), MmqError, "not finite"),
        (
            poison("vision_tower.vision_model.embeddings.class_embedding"),
            CheckpointError,
            "class_embedding.*not finite",
        ),
        (rename_architecture, PlanError, "does not support MysteryForCausalLM"),
        (misfit_config, PlanError, "the shape is"),
    ],
    ids=["truncated", "missing", "nan-linear", "nan-kept", "nan-upstream", "architecture", "config"],
)
def test_bad_models_end_in_a_clear_error_and_leave_nothing(
    change: Callable[[Path], None], kind: type[MmqError], fragment: str, tmp_path: Path
) -> None:
    model = damaged_model(tmp_path / "model", change)
    with pytest.raises(kind, match=fragment):
        quick_export(tmp_path / "out", recipe=quick_recipe(model))
    left = {path.name for path in tmp_path.iterdir()} - {"model", "out.work"}
    assert not left


def test_occupied_output_is_never_touched_without_overwrite(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = contents(out)
    with pytest.raises(ArtifactError, match="holds an artifact of recipe 'llava-w4-vit4'"):
        quick_export(out, recipe=quick_recipe(name="llava-w8"))
    assert contents(out) == before
    quick_export(out, overwrite=True, recipe=quick_recipe(name="llava-w8"))
    assert contents(out) != before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "photo.jpg").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="did not write"):
        quick_export(foreign, overwrite=True)
    assert contents(foreign) == {"photo.jpg": b"x"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte; needs permission to mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_full_disk_while_writing_the_artifact_leaves_nothing_there(small_disk: Path, tmp_path: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(600_000))
    with pytest.raises(CheckpointError, match="the disk is full"):
        quick_export(small_disk / "out", work=tmp_path / "work")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    quick_export(tmp_path / "out", work=tmp_path / "work")  # the finished blocks are still good


def test_full_disk_while_storing_a_block_can_be_resumed(finished: Path, small_disk: Path, tmp_path: Path) -> None:
    work = small_disk / "work"
    work.mkdir()
    (small_disk / "filler").write_bytes(bytes(900_000))
    with pytest.raises(WorkdirError, match="the disk is full") as caught:
        quick_export(tmp_path / "out", work=work)
    assert "it resumes" in (caught.value.hint or "")
    assert not list(work.glob(".*.tmp"))
    assert not (tmp_path / "out").exists()
    (small_disk / "filler").unlink()
    quick_export(tmp_path / "out", work=work)
    assert contents(tmp_path / "out") == contents(finished)


def test_real_models_use_drawings_in_english_and_are_scored_on_questions() -> None:
    shipped = load_recipe("llava-w4-vit8")
    assert shipped.model.repo == "llava-hf/llava-1.5-7b-hf"
    fitted = with_suitable_data(shipped)
    assert fitted.calibration.data == fitted.evaluation.data == ("drawings",)
    assert fitted.gates == shipped.gates  # those on captions are then not measured
    assert with_suitable_data(fitted) == fitted
    assert with_suitable_data(quick_recipe()) == quick_recipe()  # the embedded model knows the names
    own = shipped.adjusted(calibration={"data": ("coco",)}, evaluation={"data": ("coco",)})
    assert with_suitable_data(own) == own


def test_captions_are_not_scored_on_the_drawings() -> None:
    """A gate on captions stays in the recipe but is not measured: no other model uses the wording of mmq's captions."""
    recipe = quick_recipe().adjusted(calibration={"data": ("drawings",)}, evaluation={"data": ("drawings",)})
    plan, _ = prepare(recipe, choose("cpu"))
    assert {gate.task for gate in plan.recipe.gates} == {"vqa", "captioning"}
    samples = evaluation_samples(plan, ())
    assert list(samples) == ["vqa"]
    answers = {"vqa": [sample.references[0] for sample in samples["vqa"]]}
    report = compare(answers, answers, samples, plan.recipe.gates, 0)
    assert {gate.task: gate.verdict for gate in report.gates}["captioning"] == "not measured"
    assert not report.passed
    only = plan.recipe.model_copy(update={"gates": tuple(g for g in plan.recipe.gates if g.task == "captioning")})
    assert list(evaluation_samples(replace(plan, recipe=only), ())) == ["vqa"]


class Stopped(Exception):
    """Simulates a kill at a given event."""


def stop_at(stage: str) -> Callable[[Event], None]:
    """A listener that ends the job at the first event of a stage."""

    def listen(event: Event) -> None:
        if event.stage == stage:
            raise Stopped

    return listen


def test_the_same_command_resumes_a_stopped_evaluation(finished: Path, finished_work: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "out", default_work(tmp_path / "out")
    shutil.copytree(finished_work, work)
    with pytest.raises(Stopped):
        quick_export(out, stop_at("evaluate"), skip_evaluation=False)
    assert contents(out) == contents(finished)  # written and verified, only not measured
    done = quick_export(out, skip_evaluation=False)
    assert done.report is not None
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize("stage", ["write", "verify"])
def test_an_artifact_is_renamed_to_out_only_after_verification(
    stage: str, finished: Path, finished_work: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    finished_work.rename(default_work(out))
    with pytest.raises(Stopped):
        quick_export(out, stop_at(stage))
    assert {path.name for path in tmp_path.iterdir()} == {"out.work"}
    quick_export(out)
    assert contents(out) == contents(finished)


def test_an_old_artifact_stays_until_the_new_one_is_verified(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    with pytest.raises(Stopped):
        quick_export(out, stop_at("verify"), overwrite=True, recipe=quick_recipe(name="llava-w8"))
    assert contents(out) == contents(finished)


def test_written_files_are_readable_by_everyone(finished: Path) -> None:
    assert {oct(path.stat().st_mode & 0o444) for path in finished.iterdir()} == {"0o444"}


@pytest.mark.parametrize("absent", ["preprocessor_config.json", "tokenizer.json"])
def test_a_model_without_processor_is_refused_before_the_work(absent: str, tmp_path: Path) -> None:
    def remove(folder: Path) -> None:
        for name in {absent, "processor_config.json"}:
            (folder / name).unlink(missing_ok=True)

    model = damaged_model(tmp_path / "model", remove)
    with pytest.raises(CheckpointError, match=r"the folder has no processor|its processor cannot be loaded"):
        quick_export(tmp_path / "out", recipe=quick_recipe(model))
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_the_export_reports_the_warnings_of_the_plan(tmp_path: Path) -> None:
    received: list[Event] = []
    model = damaged_model(tmp_path / "model", lambda folder: None)
    quick_export(tmp_path / "out", received.append, recipe=quick_recipe(model))
    assert any("not its captions" in event.message for event in received if event.stage == "note")


@pytest.mark.parametrize("format_name", sorted(FORMATS))
def test_an_artifact_with_nothing_packed_is_a_plain_model(format_name: str, tmp_path: Path) -> None:
    """config.json has no quantization config, because loaders fail on schemes without tensors."""
    data = quick_recipe().model_dump()
    data["format"], data["gates"] = format_name, []
    rule = {"component": "vision", "method": "rtn", "bits": 4, "group_size": 32, "store": "dequantized"}
    data["quantize"] = [rule]
    quick_export(tmp_path / "plain", recipe=Recipe.model_validate(data))
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert Artifact.open(tmp_path / "plain").groups == ()
    assert read_place(str(tmp_path / "plain")).parts[0].packed is False
