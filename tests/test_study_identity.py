"""Studies reuse nothing stale: units, settings and scores are named by all that decides them, and carry checksums."""

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
from exporter.demo import MODELS
from exporter.errors import CheckpointError, DataError, LockedError
from exporter.events import Event, ignore
from exporter.files.folder_lock import hold
from exporter.planning.recipe import Rule
from exporter.quantization import identity
from exporter.quantization.workdir import LOCK
from exporter.study import pool
from exporter.study.grid import Point
from exporter.study.prepare import base_recipe
from exporter.study.records import Records, checksum
from exporter.study.run import Outcome, keys_of_run, run
from exporter.study.work import Setup, examiner, make_units, opened
from tests.test_identity import another_picture, appended, edit_config, edit_line, flip_signs_in_place, rot, write_data

POINTS = [
    Point((), (("language_bits", 16),)),
    Point((Rule(component="language", bits=3, method="gptq"),), (("language_bits", 3),)),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A model, and data to calibrate on and to score by."""
    shutil.copytree(MODELS["demo-llava"], tmp_path / "model")
    write_data(tmp_path / "data")
    (tmp_path / "data" / "test").mkdir()
    for path in (tmp_path / "data" / "train").iterdir():
        shutil.copy(path, tmp_path / "data" / "test")
    return tmp_path


def setup_of(root: Path, **changed: Any) -> Setup:
    """A study that calibrates and scores on the training split, so that pictures may be shared."""
    data = places(str(root / "data"))
    recipe = base_recipe(str(root / "model"), None, data, 8, 0)
    options = {"places": data, "split": "train", "samples": 4, "batch": 4, "device": "cpu"}
    return Setup(root / "study", recipe.model_dump_json(), **{**options, **changed})


def measure(root: Path, seen: list[Event] | None = None, **changed: Any) -> Outcome:
    """Run the study in this process."""
    return run(setup_of(root, **changed), POINTS, pool.inline, ignore if seen is None else seen.append)


def notes(seen: Sequence[Event]) -> list[str]:
    """What the user is told."""
    return [event.message for event in seen if event.stage == "note"]


def test_the_same_study_again_computes_nothing(root: Path) -> None:
    first = measure(root)
    again = measure(root)
    assert (first.scored, first.made) == (2, again.units)
    assert (again.scored, again.made) == (0, 0)
    assert again.found == first.found


CHANGES: dict[str, Callable[[Path], None]] = {
    "weights": flip_signs_in_place,
    "config": edit_config,
    "tokenizer": appended("tokenizer.json"),
    "template": appended("chat_template.jinja"),
    "caption": edit_line(0, caption="a dog"),
    "answer": edit_line(1, answers=["blue"]),
    "picture": another_picture,
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_changes_is_computed_again(name: str, root: Path) -> None:
    first = measure(root)
    CHANGES[name](root)
    again = measure(root)
    assert (again.scored, again.made) == (2, first.made)
    assert not {one.id for one in again.found} & {one.id for one in first.found}
    clean = measure(root, table="other")  # scored by the same process, from the units that are there now
    shutil.rmtree(root / "study")
    opened.cache_clear()
    examiner.cache_clear()
    fresh = measure(root)
    assert [one.scores for one in again.found] == [one.scores for one in fresh.found]
    assert [one.scores for one in clean.found] == [one.scores for one in fresh.found]


def test_another_version_of_torch_is_another_study(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure(root)
    true = identity._version
    monkeypatch.setattr(identity, "_version", lambda name: "99.1" if name == "torch" else true(name))
    assert measure(root).scored == 2


def test_a_worker_that_computes_otherwise_says_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = setup_of(root)
    keys = keys_of_run(setup, opened(setup), ignore)
    true = identity._version
    monkeypatch.setattr(identity, "_version", lambda name: "99.1" if name == "torch" else true(name))
    with pytest.raises(DataError, match=r"otherwise than the process that began the study: torch \S+ -> 99\.1"):
        make_units(setup, [], keys)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_rotten_unit_is_made_again_with_a_note(sequential: bool, root: Path) -> None:
    first = measure(root, sequential=sequential)
    units = sorted((root / "study").glob("sequential/*/*.safetensors" if sequential else "units/*.safetensors"))
    rot(units[1], 300)
    (root / "study" / "study.sqlite").unlink()
    seen: list[Event] = []
    again = measure(root, seen, sequential=sequential)
    assert [note for note in notes(seen) if units[1].name in note and "again" in note]
    assert [one.scores for one in again.found] == [one.scores for one in first.found]


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
def test_a_changed_row_is_scored_again_with_a_note(command: str, root: Path) -> None:
    first = measure(root)
    edit_table(root, command)
    seen: list[Event] = []
    again = measure(root, seen)
    assert again.scored == 2
    assert again.made == 0
    assert len([note for note in notes(seen) if "is damaged; it is scored again" in note]) == 2
    assert [one.scores for one in again.found] == [one.scores for one in first.found]


def test_rows_of_older_studies_have_no_checksum_and_stay(root: Path) -> None:
    first = measure(root)
    edit_table(root, "DROP TABLE checksums")
    with Records(root / "study" / "study.sqlite") as records:
        assert [checksum(one) for one in records.all().values()] == [checksum(one) for one in first.found]
        assert records.damaged == ()


def test_a_damaged_table_is_a_sentence(root: Path) -> None:
    measure(root)
    path = root / "study" / "study.sqlite"
    data = bytearray(path.read_bytes())
    data[4096 : len(data)] = bytes(len(data) - 4096)
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"study\.sqlite"):
        measure(root)


class Meddling:
    """A pool that changes something before the work begins, when all names are given already."""

    def __init__(self, change: Callable[[], None], function: str) -> None:
        self._change, self._function = change, function

    def __call__(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Any:
        if function.__name__ == self._function:
            self._change()
        return pool.inline(function, tasks)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("make_units", "the calibration data changed while the study ran"),
        ("score_point", "that settings are scored on changed while the study ran"),
    ],
)
def test_data_that_changes_meanwhile_is_an_error(function: str, message: str, root: Path) -> None:
    meddling = Meddling(lambda: edit_line(0, caption="a dog")(root), function)
    with pytest.raises(DataError, match=message):
        run(setup_of(root), POINTS, meddling, ignore)


def test_a_model_that_changes_meanwhile_is_an_error(root: Path) -> None:
    meddling = Meddling(lambda: flip_signs_in_place(root), "score_point")
    with pytest.raises(CheckpointError, match="changed while the study ran"):
        run(setup_of(root), POINTS, meddling, ignore)


@pytest.mark.parametrize("command", ["study", "allocate"])
def test_a_study_s_folder_is_locked(command: str, tmp_path: Path) -> None:
    options = {
        "study": ["study", "--out", str(tmp_path / "s")],
        "allocate": ["allocate", "--folder", str(tmp_path / "s"), "--max-size", "600kB", "--out", str(tmp_path / "a")],
    }
    with hold(tmp_path / "s" / LOCK, tmp_path / "s"):
        done = CliRunner().invoke(cli, [*options[command], "--json", "--device", "cpu"])
    assert done.exit_code == 1
    assert json.loads(done.stdout.splitlines()[-1])["kind"] == LockedError.__name__
    assert not list((tmp_path / "s").iterdir())
