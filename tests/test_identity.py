"""Outdated results are never reused: every input that changes numbers is part of a job's identity and is named."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from exporter.data import places, traces
from exporter.device import Device, choose
from exporter.errors import CheckpointError, WorkdirError
from exporter.events import Event
from exporter.files.mapping_diff import changes
from exporter.methods import METHODS
from exporter.model.embedded import MODELS
from exporter.model.processors.processor import load_processor
from exporter.model.source import narrowed
from exporter.pipeline.preparation import prepare
from exporter.pipeline.samples import calibration_samples
from exporter.planning.recipe import Recipe
from exporter.quantization import calibrate, identity
from exporter.quantization.workdir import fingerprint_of
from tests.slow import some
from tests.test_export import contents, quick_export, quick_recipe

pytestmark = pytest.mark.usefixtures("unloaded")

CPU = choose("cpu")
LINEAR = "language_model.model.layers.0.self_attn.q_proj.weight"


def write_data(folder: Path) -> Path:
    """Four pictures to calibrate on, each with a caption and with a question."""
    random = np.random.default_rng(0)
    lines = []
    (folder / "train").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / "train" / f"{i}.png")
        lines.append({"file_name": f"{i}.png", "id": f"c{i}", "caption": f"a red circle {i}"})
        lines.append(
            {"file_name": f"{i}.png", "id": f"q{i}", "question": "what color?", "answers": ["red"], "kind": "color"}
        )
    (folder / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    """Change a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_line(number: int, **values: Any) -> Callable[[Path], None]:
    """Change one line of the data's metadata."""

    def change(root: Path) -> None:
        path = root / "data" / "train" / "metadata.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[number] |= values
        path.write_text("\n".join(map(json.dumps, lines)))

    return change


def flip_signs_in_place(root: Path) -> None:
    """Change one linear, and set the file's times back."""
    path = root / "model" / "model.safetensors"
    before = path.stat()
    tensors = load_file(path)
    tensors[LINEAR].neg_()
    save_file(tensors, path, {"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def edit_config(root: Path) -> None:
    """Another number in config.json."""
    edit_json(root / "model" / "config.json", lambda config: config["text_config"].update(rms_norm_eps=1e-3))


def another_picture(root: Path) -> None:
    """Other pixels under the same name."""
    Image.new("RGB", (32, 32), (1, 2, 3)).save(root / "data" / "train" / "0.png")


def appended(name: str) -> Callable[[Path], None]:
    """One space more at the end of one of the model's files."""

    def change(root: Path) -> None:
        with (root / "model" / name).open("a") as file:
            file.write(" ")

    return change


def recipe_of(root: Path) -> Recipe:
    """GPTQ on the copied model."""
    recipe = quick_recipe(root / "model", samples=8)
    return recipe.adjusted(calibration={"data": [str(root / "data")]})


def identity_of(
    root: Path, change: Callable[[Recipe], Recipe] = lambda recipe: recipe, device: Device = CPU
) -> dict[str, Any]:
    """The identity of an export of the model and data below `root`."""
    plan, checkpoint = prepare(change(recipe_of(root)), device)
    samples = calibration_samples(plan, places(str(root / "data")))
    pictures = [trace.key for trace in traces(samples)]
    result = identity.of_job(plan, checkpoint, load_processor(checkpoint.folder), samples, pictures, device)
    plain: dict[str, Any] = json.loads(json.dumps(result))
    return plain


def write_root(folder: Path) -> Path:
    """A model and data to calibrate on."""
    shutil.copytree(MODELS["demo-llava"], folder / "model")
    write_data(folder / "data")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A model and data that a test may change."""
    return write_root(tmp_path)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The identity of every `root` before a change: the name of the folder is not part of it."""
    return identity_of(write_root(tmp_path_factory.mktemp("unchanged")))


FILES = {
    "weights": (flip_signs_in_place, ["model.safetensors differs"]),
    "config": (edit_config, ["config.json.text_config.rms_norm_eps 1e-05 -> 0.001"]),
    "tokenizer": (appended("tokenizer.json"), ["tokenizer.json differs"]),
    "tokenizer config": (appended("tokenizer_config.json"), ["tokenizer_config.json differs"]),
    "processor": (appended("preprocessor_config.json"), ["preprocessor_config.json differs"]),
    "special tokens": (
        lambda root: (root / "model" / "special_tokens_map.json").unlink(),
        ["special_tokens_map.json is missing"],
    ),
    "added tokens": (
        lambda root: (root / "model" / "added_tokens.json").write_text("{}"),
        ["added_tokens.json is new"],
    ),
    "template": (
        lambda root: (root / "model" / "chat_template.jinja").write_text(
            "please " + (root / "model" / "chat_template.jinja").read_text()
        ),
        ["chat_template.jinja differs", "prompt of 8 samples, the first is sample 1 (c"],
    ),
    "caption": (edit_line(0, caption="a dog"), ["caption of sample ", "(c0)"]),
    "question": (edit_line(1, question="which shape?"), ["question of sample ", "(q0)"]),
    "answer": (edit_line(1, answers=["blue"]), ["answers of sample ", "(q0)"]),
    "kind": (edit_line(1, kind="shape"), ["kind of sample ", "(q0)"]),
    "id": (edit_line(0, id="other"), ["sample"]),
    "picture": (another_picture, ["picture of 2 samples, the first is sample "]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_changes_the_identity_and_is_named(name: str, root: Path, before: dict[str, Any]) -> None:
    change, named = FILES[name]
    change(root)
    now = identity_of(root)
    assert fingerprint_of(now) != fingerprint_of(before)
    lines = "\n".join(changes(before, now))
    assert all(words in lines for words in named), lines


def adjusted(**sections: Any) -> Callable[[Recipe], Recipe]:
    """The recipe with other settings."""
    return lambda recipe: recipe.adjusted(**sections)


SETTINGS = {
    "batch": (adjusted(calibration={"batch": 4}), "calibration.batch 3 -> 4"),
    "vision weight": (adjusted(calibration={"vision_weight": 0.5}), "calibration.vision_weight 1.0 -> 0.5"),
    "samples": (adjusted(calibration={"samples": 6}), "8 samples -> 6 samples"),
    "seed": (adjusted(calibration={"seed": 1}), "calibration.seed 0 -> 1"),
    "bits": (
        lambda recipe: recipe.model_copy(
            update={"quantize": tuple(rule.model_copy(update={"bits": 8}) for rule in recipe.quantize)}
        ),
        "quantize[0].bits 4 -> 8",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_changed_setting_is_named(name: str, root: Path, before: dict[str, Any]) -> None:
    change, named = SETTINGS[name]
    assert named in changes(before, identity_of(root, change))


UNRELATED = {
    "gates": lambda recipe: recipe.model_copy(update={"gates": ()}),
    "evaluation": adjusted(evaluation={"samples": 77}),
    "format": lambda recipe: recipe.model_copy(update={"format": "gptq"}),
    "name": lambda recipe: recipe.model_copy(update={"name": "other"}),
}


@pytest.mark.parametrize("name", UNRELATED)
def test_settings_that_change_no_number_are_not_part_of_it(name: str, root: Path, before: dict[str, Any]) -> None:
    assert changes(before, identity_of(root, UNRELATED[name])) == []


def test_the_folder_s_name_is_not_part_of_it_and_nothing_that_changes_by_itself(
    root: Path, before: dict[str, Any]
) -> None:
    assert identity_of(root) == before
    assert identity_of(root) == before


@pytest.mark.parametrize("package", identity.PACKAGES)
def test_another_version_of_a_package_is_named(
    package: str, root: Path, before: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    true = identity._version
    monkeypatch.setattr(identity, "_version", lambda name: "99.1" if name == package else true(name))
    assert changes(before, identity_of(root)) == [f"{package} {true(package)} -> 99.1"]


def test_another_version_of_a_method_or_of_the_calibration_is_named(
    root: Path, before: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(METHODS["gptq"], "VERSION", 98)
    monkeypatch.setattr(calibrate, "VERSION", 99)
    lines = changes(before, identity_of(root))
    assert [line.partition(" -> ")[2] for line in lines] == ["98", "99"]
    assert [line.partition(" -> ")[0].rsplit(" ", 1)[0] for line in lines] == [
        "version of gptq",
        "version of calibrate",
    ]


def test_device_kind_and_dtype_are_part_of_it(root: Path) -> None:
    plan, _ = prepare(recipe_of(root), CPU)
    stored = next(row.tensor.dtype for row in plan.rows if row.linear)
    gpu = replace(CPU, place="cuda:0")
    lines = changes(identity.of_machine(CPU, stored), identity.of_machine(gpu, stored))
    assert lines[0] == "device cpu -> cuda"
    assert lines[1].startswith("compute dtype float32 -> ")


def test_tensors_read_in_another_dtype_are_another_model_though_config_and_files_are_the_same(root: Path) -> None:
    path = root / "model" / "model.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    edit_json(root / "model" / "config.json", lambda config: config.update(dtype="bfloat16"))
    from exporter.model.source import open_source

    whole, _ = open_source(str(root / "model"))
    cut = narrowed(whole, "bfloat16")
    assert cut.config == whole.config
    assert cut.digest() != whole.digest()
    assert changes(identity.of_source(whole), identity.of_source(cut))


def test_a_prompt_is_named_only_if_nothing_else_of_its_sample_changed() -> None:
    before = {"samples": [{"id": name, "prompt": name, "caption": name} for name in "abc"]}
    after = {"samples": [{"id": name, "prompt": "p", "caption": "x" if name == "a" else name} for name in "abc"]}
    assert changes(before, after) == ["caption of sample 1 (a)", "prompt of 2 samples, the first is sample 2 (b)"]


def test_many_changes_are_cut_short() -> None:
    lines = changes({"files": {str(i): "a" for i in range(40)}}, {"files": {str(i): "b" for i in range(40)}})
    assert lines[0] == "0 a -> b"
    assert lines[-1] == "and 28 more"


def test_a_resumed_export_names_what_changed_and_what_to_do(root: Path) -> None:
    work, recipe = root / "work", recipe_of(root)
    data = places(str(root / "data"))
    quick_export(root / "first", recipe=recipe, work=work, sources=data)
    flip_signs_in_place(root)
    edit_line(0, caption="a dog")(root)
    with pytest.raises(WorkdirError) as caught:
        quick_export(root / "second", recipe=recipe, work=work, sources=data)
    assert "model.safetensors differs" in caught.value.message
    assert "caption of sample" in caught.value.message
    assert f"delete {work}" in str(caught.value.hint)
    assert not (root / "second").exists()
    quick_export(root / "fresh", recipe=recipe, sources=data)
    assert contents(root / "fresh")["model.safetensors"] != contents(root / "first")["model.safetensors"]


def test_a_work_folder_of_an_older_mmq_is_refused(root: Path) -> None:
    (root / "work").mkdir()
    (root / "work" / "job.json").write_text(json.dumps({"model weights": "0" * 64, "calibration": {"seed": 0}}))
    with pytest.raises(WorkdirError, match="model weights is missing"):
        quick_export(root / "out", recipe=recipe_of(root), work=root / "work", sources=places(str(root / "data")))
    (root / "work" / "job.json").write_text("{")
    with pytest.raises(WorkdirError, match=r"the job of the blocks in .* is unknown"):
        quick_export(root / "out", recipe=recipe_of(root), work=root / "work", sources=places(str(root / "data")))


def test_a_model_that_changes_while_it_is_quantized_is_an_error_and_leaves_no_blocks(root: Path) -> None:
    def change(event: Event) -> None:
        if event.stage == "quantize" and event.done == 1:
            flip_signs_in_place(root)

    work = root / "work"
    with pytest.raises(CheckpointError, match=r"changed while the job ran: model\.safetensors differs"):
        quick_export(root / "out", change, recipe=recipe_of(root), work=work, sources=places(str(root / "data")))
    assert not (root / "out").exists()
    assert not list(work.glob("*.safetensors"))


def rot(path: Path, offset: int) -> None:
    """Change one byte of a unit's data."""
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little") + offset] ^= 1
    path.write_bytes(bytes(data))


def recomputed(events: list[Event], path: Path) -> list[str]:
    """Notes that the file of a unit is damaged and its block is recomputed."""
    notes = [event.message for event in events if event.stage == "note"]
    return [note for note in notes if path.name in note and "this block is recomputed" in note]


@pytest.mark.parametrize("number", some([0, 2, -1], [2]))
def test_a_damaged_block_is_recomputed(number: int, finished: Path, finished_work: Path, tmp_path: Path) -> None:
    damaged = sorted(finished_work.glob("*.safetensors"))[number]
    rot(damaged, 1000)
    events: list[Event] = []
    quick_export(tmp_path / "second", events.append, work=finished_work)
    assert len(recomputed(events, damaged)) == 1
    assert contents(tmp_path / "second") == contents(finished)


@pytest.mark.parametrize("kind", some(["vision", "language"], ["language"]))
def test_the_file_of_another_block_is_detected(kind: str, finished: Path, finished_work: Path, tmp_path: Path) -> None:
    """Its checksum is right, but it holds the linears of a neighbor."""
    first, second = sorted(finished_work.glob(f"*{kind}*.safetensors"))[:2]
    shutil.copyfile(first, second)
    seen: list[Event] = []
    quick_export(tmp_path / "second", seen.append, work=finished_work)
    assert len(recomputed(seen, second)) == 1
    assert contents(tmp_path / "second") == contents(finished)


def test_a_pipe_in_place_of_a_block_is_not_read(finished_work: Path, tmp_path: Path) -> None:
    path = sorted(finished_work.glob("*.safetensors"))[1]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(WorkdirError, match=f"{path.name} is not a regular file"):
        quick_export(tmp_path / "second", work=finished_work)


HEADER_DAMAGE = {
    "error of a linear": lambda header: header.replace(b'\\"errors\\": {', b'\\"errorz\\": {'),
    "shape": lambda header: header.replace(b'"shape":[', b'"shape":[1,', 1),
    "checksum": lambda header: header.replace(b'"checksum":"', b'"checksum":"0', 1),
    "fingerprint": lambda header: header.replace(b'"fingerprint":"', b'"fingerprint":"0', 1),
    "no header": lambda header: b"",
}


@pytest.mark.parametrize("name", some(HEADER_DAMAGE, ["error of a linear", "fingerprint", "no header"]))
def test_a_damaged_header_of_a_block_is_detected(
    name: str, finished: Path, finished_work: Path, tmp_path: Path
) -> None:
    path = sorted(finished_work.glob("*.safetensors"))[1]
    before = path.read_bytes()
    length = int.from_bytes(before[:8], "little")
    header = HEADER_DAMAGE[name](before[8 : 8 + length])
    assert header != before[8 : 8 + length]
    path.write_bytes(len(header).to_bytes(8, "little") + header + before[8 + length :])
    events: list[Event] = []
    quick_export(tmp_path / "second", events.append, work=finished_work)
    assert len(recomputed(events, path)) == 1
    assert contents(tmp_path / "second") == contents(finished)
