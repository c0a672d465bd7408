"""Studies reuse no stale results: keys depend on everything that affects the numbers, and records have checksums."""

import json
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from exporter.commands.main import cli
from exporter.data import places
from exporter.errors import CheckpointError, DataError, LockedError
from exporter.events import Event, ignore
from exporter.files.folder_lock import hold
from exporter.model.embedded import MODELS
from exporter.planning.recipe import Rule
from exporter.quantization import identity
from exporter.quantization.workdir import LOCK
from exporter.study import worker_pool
from exporter.study.grid import Setting
from exporter.study.prepare import base_recipe
from exporter.study.records import Records, checksum
from exporter.study.run import Outcome, keys_of_run, run
from exporter.study.worker_tasks import Setup, examiner, make_units, open_model
from tests.slow import some
from tests.test_identity import another_picture, appended, edit_config, edit_line, flip_signs_in_place, rot, write_data
from tests.tiny_models import QUICK

POINTS = [
    Setting((), (("language_bits", 16),)),
    Setting(
        (Rule(component="language", bits=3, method="gptq", blocks="0:1", options=QUICK["gptq"]),),
        (("language_bits", 3),),
    ),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`root`, a model with data for calibration and exam, and `studied`, the same after its study."""
    folder = tmp_path_factory.mktemp("studies")
    root = folder / "root"
    shutil.copytree(MODELS["demo-llava"], root / "model")
    write_data(root / "data")
    (root / "data" / "test").mkdir()
    for path in (root / "data" / "train").iterdir():
        shutil.copy(path, root / "data" / "test")
    shutil.copytree(root, folder / "new")
    return folder


@pytest.fixture(scope="module")
def study(place: Path) -> Outcome:
    """The study of `studied`."""
    outcome = measure(place / "root")
    (place / "root").rename(place / "studied")
    return outcome


def copied(place: Path, name: str) -> Path:
    """One of the folders as `root`, where its study was made."""
    open_model.cache_clear()
    examiner.cache_clear()
    shutil.rmtree(place / "root", ignore_errors=True)
    return Path(shutil.copytree(place / name, place / "root"))


@pytest.fixture
def root(place: Path, study: Outcome) -> Path:
    """A model with data that a test may change, before any study."""
    return copied(place, "new")


@pytest.fixture
def first(place: Path, study: Outcome) -> Outcome:
    """The study of `studied`, whose copy is now `root`."""
    copied(place, "studied")
    return study


@pytest.fixture
def studied(place: Path, first: Outcome) -> Path:
    """`root` after its study, which is `first`."""
    return place / "root"


def setup_of(root: Path, **options: Any) -> Setup:
    """A study that calibrates and scores on the training split, so that pictures may be shared."""
    data = places(str(root / "data"))
    recipe = base_recipe(str(root / "model"), None, data, 8, 0)
    defaults = {"places": data, "split": "train", "samples": 4, "batch": 4, "device": "cpu"}
    return Setup(root / "study", recipe.model_dump_json(), **{**defaults, **options})


def measure(root: Path, events: list[Event] | None = None, **changed: Any) -> Outcome:
    """Run the study in this process."""
    return run(setup_of(root, **changed), POINTS, worker_pool.inline, ignore if events is None else events.append)


def notes(events: Sequence[Event]) -> list[str]:
    """Messages of all notes."""
    return [event.message for event in events if event.stage == "note"]


def test_repeating_a_study_computes_nothing(first: Outcome, studied: Path) -> None:
    second = measure(studied)
    assert (first.scored, first.quantized) == (2, second.units)
    assert (second.scored, second.quantized) == (0, 0)
    assert second.settings == first.settings


CHANGES: dict[str, Callable[[Path], None]] = {
    "weights": flip_signs_in_place,
    "config": edit_config,
    "tokenizer": appended("tokenizer.json"),
    "template": appended("chat_template.jinja"),
    "caption": edit_line(0, caption="a dog"),
    "answer": edit_line(1, answers=["blue"]),
    "picture": another_picture,
}


@pytest.mark.parametrize("name", some(CHANGES, ["weights", "template", "answer"]))
def test_results_are_recomputed_after_any_change(name: str, first: Outcome, studied: Path) -> None:
    root = studied
    CHANGES[name](root)
    second = measure(root)
    assert (second.scored, second.quantized) == (2, first.quantized)
    assert not {setting.id for setting in second.settings} & {setting.id for setting in first.settings}
    clean = measure(root, table="other")  # the same process scores the units in the store
    shutil.rmtree(root / "study")
    open_model.cache_clear()
    examiner.cache_clear()
    fresh = measure(root)
    assert [setting.scores for setting in second.settings] == [setting.scores for setting in fresh.settings]
    assert [setting.scores for setting in clean.settings] == [setting.scores for setting in fresh.settings]


def test_another_version_of_torch_is_another_study(studied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = identity._version
    monkeypatch.setattr(identity, "_version", lambda name: "99.1" if name == "torch" else true(name))
    assert measure(studied).scored == 2


def test_a_worker_with_other_packages_is_an_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = setup_of(root)
    keys = keys_of_run(setup, open_model(setup), ignore)
    true = identity._version
    monkeypatch.setattr(identity, "_version", lambda name: "99.1" if name == "torch" else true(name))
    with pytest.raises(DataError, match=r"differs from the process that started the study: torch \S+ -> 99\.1"):
        make_units(setup, [], keys)


@pytest.mark.parametrize("sequential", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_damaged_unit_is_quantized_again_with_a_note(sequential: bool, root: Path) -> None:
    first = measure(root, sequential=sequential)
    units = sorted((root / "study").glob("sequential/*/*.safetensors" if sequential else "units/*.safetensors"))
    rot(units[-1], 300)
    (root / "study" / "study.sqlite").unlink()
    events: list[Event] = []
    second = measure(root, events, sequential=sequential)
    repair = "this block is recomputed" if sequential else "it is quantized again"
    assert [note for note in notes(events) if units[-1].name in note and repair in note]
    assert [setting.scores for setting in second.settings] == [setting.scores for setting in first.settings]


def edit_table(root: Path, *commands: str) -> None:
    """Change the table of a study."""
    with sqlite3.connect(root / "study" / "study.sqlite") as table:
        for command in commands:
            table.execute(command)
    table.close()


@pytest.mark.parametrize(
    "command",
    [
        "UPDATE scores SET value = value + 0.125 WHERE metric = 'score'",
        "DELETE FROM scores WHERE metric = 'score'",
        "UPDATE points SET bytes = bytes + 1",
    ],
)
def test_a_changed_row_is_scored_again_with_a_note(command: str, first: Outcome, studied: Path) -> None:
    root = studied
    edit_table(root, command)
    events: list[Event] = []
    second = measure(root, events)
    assert second.scored == 2
    assert second.quantized == 0
    assert len([note for note in notes(events) if "is damaged; it is scored again" in note]) == 2
    assert [setting.scores for setting in second.settings] == [setting.scores for setting in first.settings]


def test_rows_of_older_studies_without_checksums_are_kept(first: Outcome, studied: Path) -> None:
    root = studied
    edit_table(root, "DROP TABLE checksums")
    with Records(root / "study" / "study.sqlite") as records:
        assert [checksum(setting) for setting in records.all().values()] == [
            checksum(setting) for setting in first.settings
        ]
        assert records.damaged == ()


def test_a_damaged_database_is_an_error_with_its_path(studied: Path) -> None:
    root = studied
    path = root / "study" / "study.sqlite"
    data = bytearray(path.read_bytes())
    data[4096 : len(data)] = bytes(len(data) - 4096)
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"study\.sqlite"):
        measure(root)


class Meddling:
    """A pool that makes a change before the tasks start, after the keys were computed."""

    def __init__(self, change: Callable[[], None], function: str) -> None:
        self._change, self._function = change, function

    def __call__(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Any:
        if function.__name__ == self._function:
            self._change()
        return worker_pool.inline(function, tasks)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("make_units", "the calibration data changed while the study ran"),
        ("score_setting", "that settings are scored on changed while the study ran"),
    ],
)
def test_data_that_changes_during_a_study_is_an_error(function: str, message: str, root: Path) -> None:
    meddling = Meddling(lambda: edit_line(0, caption="a dog")(root), function)
    with pytest.raises(DataError, match=message):
        run(setup_of(root), POINTS, meddling, ignore)


def test_a_model_that_changes_during_a_study_is_an_error(root: Path) -> None:
    meddling = Meddling(lambda: flip_signs_in_place(root), "score_setting")
    with pytest.raises(CheckpointError, match="changed while the study ran"):
        run(setup_of(root), POINTS, meddling, ignore)


@pytest.mark.parametrize("command", ["study", "allocate"])
def test_the_folder_of_a_study_is_locked(command: str, tmp_path: Path) -> None:
    options = {
        "study": ["study", "--out", str(tmp_path / "s")],
        "allocate": ["allocate", "--folder", str(tmp_path / "s"), "--max-size", "600kB", "--out", str(tmp_path / "a")],
    }
    with hold(tmp_path / "s" / LOCK, tmp_path / "s"):
        done = CliRunner().invoke(cli, [*options[command], "--json", "--device", "cpu"])
    assert done.exit_code == 1
    assert json.loads(done.stdout.splitlines()[-1])["kind"] == LockedError.__name__
    assert not list((tmp_path / "s").iterdir())
