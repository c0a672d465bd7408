"""Output folders: refused places, two jobs with one output, and kills at the end of an export."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from exporter.artifact import artifact, output_folder
from exporter.artifact.output_folder import Destination, default_work, put_in_place, reading, restore, temporary_folder
from exporter.commands.main import cli
from exporter.errors import ArtifactError, LockedError, MmqError
from exporter.events import Event
from exporter.files.folder_lock import hold
from exporter.quantization.workdir import LOCK
from tests.children import running_command
from tests.test_export import DEMO, Stopped, contents, quick_export, quick_recipe, stop_at

pytestmark = pytest.mark.usefixtures("unloaded")


def names(folder: Path) -> set[str]:
    """Names in a folder."""
    return {path.name for path in folder.iterdir()}


# Refused places


def link(out: Path) -> dict[str, Path]:
    """--out is a link to an empty folder."""
    (out.parent / "real").mkdir()
    out.symlink_to("real")
    return {}


def dangling_link(out: Path) -> dict[str, Path]:
    """--out is a link to nothing."""
    out.symlink_to("nothing")
    return {}


def link_as_work(out: Path) -> dict[str, Path]:
    """The work folder beside --out is a link."""
    (out.parent / "real").mkdir()
    default_work(out).symlink_to("real")
    return {}


REFUSED: dict[str, tuple[Callable[[Path], dict[str, Path]], str]] = {
    "link": (link, "is a symbolic link"),
    "dangling link": (dangling_link, "is a symbolic link"),
    "link as work": (link_as_work, "is a symbolic link"),
    "work is out": (lambda out: {"work": out}, "the same folder, or one is in the other"),
    "work in out": (lambda out: {"work": out / "deep" / "work"}, "the same folder, or one is in the other"),
    "out in work": (lambda out: {"work": out.parent}, "the same folder, or one is in the other"),
    "the same through ..": (lambda out: {"work": out.parent / "x" / ".." / out.name}, "the same folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_nested_output_and_work_folders_are_refused(name: str, tmp_path: Path) -> None:
    prepare, message = REFUSED[name]
    out = tmp_path / "o"
    options = prepare(out)
    before = names(tmp_path)
    with pytest.raises(ArtifactError, match=message):
        quick_export(out, **options)
    assert names(tmp_path) == before
    assert not list(tmp_path.glob("real/*"))


@pytest.mark.parametrize("name", ["o.work", ".o.mmq-tmp", ".o.mmq-old"])
def test_a_link_beside_the_output_is_not_followed(name: str, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "precious").write_text("x")
    (tmp_path / name).symlink_to("real")
    with pytest.raises(ArtifactError, match=f"{name} is a symbolic link"):
        quick_export(tmp_path / "o")
    assert (tmp_path / name).is_symlink()
    assert (tmp_path / "real" / "precious").read_text() == "x"


def test_a_link_into_the_artifact_is_refused(tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "alias").symlink_to("o")
    with pytest.raises(ArtifactError, match="the same folder"):
        quick_export(tmp_path / "o", work=tmp_path / "alias" / "w")


@pytest.mark.parametrize("out", [".", "..", "/", "a/.."])
def test_an_output_without_a_folder_name_is_refused(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="is not the name of a new folder"):
        quick_export(Path(out))


@pytest.mark.parametrize("place", ["", "inner", "deep/inner"])
@pytest.mark.parametrize("option", ["out", "work"])
def test_the_model_s_folder_is_never_written_to(place: str, option: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    before = contents(model)
    options = {"out": tmp_path / "out"} | {option: model / place}
    with pytest.raises(ArtifactError, match=r"did not write|the same folder"):
        quick_export(**options, recipe=quick_recipe(model))
    assert contents(model) == before
    assert names(tmp_path) == {"model"}


def test_the_adapter_s_folder_is_never_written_to(tmp_path: Path) -> None:
    place = Destination(tmp_path / "adapter" / "out", tmp_path / "work", overwrite=False)
    with pytest.raises(ArtifactError, match=r"and the adapter .* are the same folder, or one is in the other"):
        place.refuse_places(tmp_path / "model", tmp_path / "adapter")
    place.refuse_places(tmp_path / "model", tmp_path / "another")


def test_a_linked_work_folder_is_allowed(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "work").symlink_to("scratch")
    quick_export(tmp_path / "out", work=tmp_path / "work")
    assert contents(tmp_path / "out") == contents(finished)
    assert list((tmp_path / "scratch").glob("*.safetensors"))


def test_a_name_that_is_too_long_for_its_neighbors_is_refused_before_the_work(tmp_path: Path) -> None:
    received: list[Event] = []
    with pytest.raises(MmqError, match="File name too long"):
        quick_export(tmp_path / ("x" * 250), received.append)
    assert not [event for event in received if event.stage == "quantize"]


# Two jobs with one place


def test_two_exports_of_one_output_exclude_each_other(tmp_path: Path) -> None:
    refused: list[str] = []

    def second(event: Event) -> None:
        if event.stage == "quantize" and not refused:
            with pytest.raises(LockedError) as caught:
                quick_export(tmp_path / "out", work=tmp_path / "other")
            refused.append(caught.value.message)

    quick_export(tmp_path / "out", second)
    assert f"{tmp_path / 'out'} is used by another process: process {os.getpid()}" in refused[0]
    assert names(tmp_path) == {"out"}


def test_two_exports_of_one_work_folder_exclude_each_other(finished_work: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def second(event: Event) -> None:
        if event.stage == "quantize" and not refused:
            with pytest.raises(LockedError) as caught:
                quick_export(tmp_path / "second", work=finished_work)
            refused.append(caught.value.message)

    quick_export(tmp_path / "first", second, work=finished_work)
    assert f"{tmp_path / 'work'} is used" in refused[0]
    assert names(tmp_path) == {"first", "work"}
    assert LOCK not in names(tmp_path / "work")


def test_the_second_of_two_commands_with_one_output_is_refused(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The second command fails and names the process that holds the lock; the first one succeeds."""
    arguments = ["export", "--recipe", "llava-w4-vit8", "--model", "demo-llava", "--samples", "8", "--skip-evaluation"]
    arguments += ["--out", str(tmp_path / "out")]
    logs = tmp_path_factory.mktemp("logs")
    with running_command(arguments, logs / "1") as one, running_command(arguments, logs / "2") as other:
        codes = [one.ended(), other.ended()]
    texts = [command.stderr.read_text() for command in (one, other)]
    assert not any("Traceback" in text for text in texts)
    assert 0 in codes
    lost = [text for text, code in zip(texts, codes, strict=True) if code]
    assert all("is used by another process" in text for text in lost)
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_artifact_that_another_run_wrote_in_the_meantime_is_not_replaced(
    finished: Path, tmp_path: Path, overwrite: bool
) -> None:
    """On some file systems locks do not exclude other machines, so mmq checks the output again before the rename."""
    out = tmp_path / "out"

    def another(event: Event) -> None:
        if event.stage == "write" and not out.exists():
            shutil.copytree(finished, out)

    recipe = quick_recipe(name="llava-w8")
    if overwrite:
        quick_export(out, another, recipe=recipe, overwrite=True)
        assert contents(out)["model.safetensors"] != contents(finished)["model.safetensors"]
        assert names(tmp_path) == {"out"}
        return
    with pytest.raises(ArtifactError, match=r"another run wrote .* in the meantime") as caught:
        quick_export(out, another, recipe=recipe)
    assert contents(out) == contents(finished)
    assert "--work" in str(caught.value.hint)
    assert names(tmp_path) == {"out", "out.work"}
    received: list[Event] = []
    quick_export(tmp_path / "rescued", received.append, recipe=recipe, work=tmp_path / "out.work")
    assert [event.message for event in received if event.stage == "quantize"] == ["resumed"]


# Kills at the end


@pytest.mark.parametrize(
    ("with_report", "overwrite"),
    [
        pytest.param(report, overwrite, marks=() if report != overwrite else pytest.mark.slow)
        for report in (False, True)
        for overwrite in (False, True)
    ],
)
def test_the_same_command_succeeds_after_a_kill_at_the_end(with_report: bool, overwrite: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = {"skip_evaluation": not with_report, "overwrite": overwrite}
    first = quick_export(out, **options)
    before = contents(out)
    received: list[Event] = []
    repeated = quick_export(out, received.append, **options)
    assert contents(out) == before
    assert not {event.stage for event in received} & {"calibrate", "quantize", "write"}
    assert repeated.verified == first.verified
    assert repeated.report == first.report
    assert (repeated.report is not None) == with_report


@pytest.mark.parametrize("left", ["all", "some", "no"])
def test_killed_while_the_work_folder_was_removed(
    left: str, finished: Path, finished_work: Path, tmp_path: Path
) -> None:
    out, work = Path(shutil.copytree(finished, tmp_path / "out")), finished_work.rename(tmp_path / "out.work")
    units = sorted(work.glob("*.safetensors"))
    for path in units[: {"all": 0, "some": 2, "no": len(units)}[left]]:
        path.unlink()
    quick_export(out)
    assert names(tmp_path) == {"out"}


def test_the_work_folder_of_another_job_is_not_removed(finished: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    other = quick_recipe(name="llava-w8")
    with pytest.raises(Stopped):
        quick_export(out, stop_at("write"), recipe=other, overwrite=True)
    units = names(tmp_path / "out.work")
    quick_export(out)
    assert names(tmp_path / "out.work") == units


def test_a_finished_artifact_is_verified_again(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r"model\.safetensors") as caught:
        quick_export(out)
    assert "give --overwrite to export it again" in str(caught.value.hint)
    quick_export(out, overwrite=True)
    assert contents(out) == contents(finished)


def test_the_same_recipe_on_other_inputs_is_another_artifact(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    manifest = (out / "mmq_manifest.json").read_text()
    fingerprint = manifest.partition('"fingerprint": "')[2].partition('"')[0]
    (out / "mmq_manifest.json").write_text(manifest.replace(fingerprint, "0" * 64))
    with pytest.raises(ArtifactError, match="recipe 'llava-w4-vit4' made from other inputs"):
        quick_export(out)


# The exchange of names


def folders(tmp_path: Path) -> tuple[Path, Path]:
    """An older artifact in `out`, and a complete new one in the temporary folder."""
    out, new = tmp_path / "out", temporary_folder(tmp_path / "out")
    for folder, text in ((out, "old"), (new, "new")):
        folder.mkdir()
        (folder / "mmq_manifest.json").write_text(text)
    return out, new


@pytest.mark.parametrize("exchange", [True, False], ids=["renameat2", "two renames"])
def test_the_new_artifact_takes_the_name(exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, new = folders(tmp_path)
    if not exchange:
        monkeypatch.setattr(output_folder, "_exchange", lambda first, second: False)
    put_in_place(new, out, overwrite=True)
    assert (out / "mmq_manifest.json").read_text() == "new"
    assert names(tmp_path) == {"out"}


def test_names_are_exchanged_in_one_step_where_the_system_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, new = folders(tmp_path)
    if not output_folder._exchange(new, out):
        pytest.skip("no renameat2 here")
    assert (new / "mmq_manifest.json").read_text() == "old"

    def never(self: Path, target: Path) -> None:
        raise AssertionError("a rename leaves a moment without an artifact")

    monkeypatch.setattr(Path, "rename", never)
    put_in_place(new, out, overwrite=True)
    assert (out / "mmq_manifest.json").read_text() == "old"


def test_a_run_that_was_stopped_between_two_renames_is_repaired(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    monkeypatch.setattr(output_folder, "_exchange", lambda first, second: False)
    real = Path.rename

    def stopped(self: Path, target: Path) -> Path:
        if self.name.endswith(".mmq-tmp"):
            raise Stopped
        return real(self, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(Stopped):
        quick_export(out, recipe=quick_recipe(name="llava-w8"), overwrite=True)
    monkeypatch.undo()
    assert not out.exists()
    received: list[Event] = []
    with pytest.raises(ArtifactError, match="holds an artifact of recipe"):
        quick_export(out, received.append, recipe=quick_recipe(name="llava-w8"))
    assert [event for event in received if "mmq restored the older artifact" in event.message]
    assert contents(out) == contents(finished)
    assert names(tmp_path) == {"out", "out.work"}


def test_a_failed_rename_restores_the_old_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, new = folders(tmp_path)
    monkeypatch.setattr(output_folder, "_exchange", lambda first, second: False)
    real = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self == new:
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"):
        put_in_place(new, out, overwrite=True)
    assert (out / "mmq_manifest.json").read_text() == "old"
    shutil.rmtree(out)
    with pytest.raises(OSError, match="Input/output error"):
        put_in_place(new, out, overwrite=True)


def test_leftovers_of_a_finished_exchange_are_removed(tmp_path: Path) -> None:
    out, new = folders(tmp_path)
    new.rename(tmp_path / ".out.mmq-old")
    restore(out, lambda event: None)
    assert names(tmp_path) == {"out"}
    assert (out / "mmq_manifest.json").read_text() == "old"


def test_a_disk_error_while_the_artifact_is_completed_is_one_error(
    finished_work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact, "sync_folder", full)
    with pytest.raises(MmqError, match="out: write failed: the disk is full"):
        quick_export(tmp_path / "out", work=finished_work)
    assert names(tmp_path) == {"work"}


def test_temporary_folders_of_a_killed_run_are_removed(finished: Path, tmp_path: Path) -> None:
    temporary_folder(tmp_path / "out").mkdir()
    (temporary_folder(tmp_path / "out") / "part").write_bytes(b"x")
    (tmp_path / ".out.mmq-lock").write_text("of a dead process")
    quick_export(tmp_path / "out")
    assert names(tmp_path) == {"out"}
    assert contents(tmp_path / "out") == contents(finished)


def test_the_lock_file_is_not_part_of_the_artifact(finished: Path, tmp_path: Path) -> None:
    with hold(tmp_path / ".out.mmq-lock", tmp_path / "out"):
        assert not (tmp_path / "out").exists()
    assert not [name for name in names(finished) if "lock" in name]


@pytest.mark.parametrize("command", ["evaluate", "publish"])
def test_an_artifact_is_not_read_while_an_export_writes_it(command: str, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "out")
    options = {"evaluate": [], "publish": ["--repo", "me/x", "--dry-run"]}
    with hold(tmp_path / ".out.mmq-lock", tmp_path / "out"):
        done = CliRunner().invoke(cli, [command, str(tmp_path / "out"), "--device", "cpu", *options[command]])
    assert done.exit_code == 1
    assert "is used by another process" in done.output


def test_an_artifact_is_not_replaced_while_it_is_read(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    with reading(out, lambda event: None), reading(out, lambda event: None), pytest.raises(LockedError):
        quick_export(out, recipe=quick_recipe(name="llava-w8"), overwrite=True)
    assert contents(out) == contents(finished)
    assert names(tmp_path) == {"out"}
