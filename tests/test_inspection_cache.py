"""Replies of the helper process on disk: kept for the same files, question, versions and code, and for nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from exporter.__main__ import _value
from exporter.errors import CheckpointError
from exporter.model.embedded import MODELS
from exporter.model.processors import inspection_cache, inspector
from exporter.model.processors.inspection_cache import has_reply, keep, place, recall
from exporter.model.processors.inspector import check_config_class, inspect, start_helper

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "config.json")
PROCESSOR = ("preprocessor_config.json", "processor_config.json")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMQ_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(MODELS["demo-llava"], tmp_path / "m"))


@pytest.mark.parametrize("name", [*FILES, *PROCESSOR])
def test_a_reply_is_kept_for_the_same_bytes_of_every_file(model: Path, name: str) -> None:
    keep(model, "q", {"fields": {}})
    assert recall(model, "q") == {"fields": {}}
    assert recall(model, "other") is None
    file = model / name
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"a", b"b", 1))
    assert recall(model, "q") is None
    assert not has_reply(model)
    file.unlink()
    assert recall(model, "q") is None
    file.write_bytes(whole)
    assert recall(model, "q") == {"fields": {}}


def test_replies_to_several_questions_lie_in_one_file(model: Path) -> None:
    keep(model, "a", {"x": 1})
    keep(model, "b", {"x": 2})
    assert [recall(model, "a"), recall(model, "b")] == [{"x": 1}, {"x": 2}]
    assert len(list(place().iterdir())) == 1
    assert place().stat().st_mode & 0o77 == 0


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"[" * 100_000, b'{"replies": {"q": {}}}', b'{"sha256": "x"}', b"\xff"]
)
def test_a_damaged_file_is_no_reply(model: Path, content: bytes) -> None:
    keep(model, "q", {"x": 1})
    (file,) = place().iterdir()
    file.write_bytes(content)
    assert recall(model, "q") is None
    keep(model, "q", {"x": 2})
    assert recall(model, "q") == {"x": 2}


def test_a_changed_reply_is_no_reply(model: Path) -> None:
    keep(model, "q", {"tokens": [1, 2]})
    (file,) = place().iterdir()
    file.write_text(file.read_text().replace("[1, 2]", "[1, 3]"))
    assert recall(model, "q") is None


@pytest.mark.parametrize("package", inspection_cache.PACKAGES)
def test_other_versions_ask_again(model: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    keep(model, "q", {"x": 1})
    original = inspection_cache.installed_version
    monkeypatch.setattr(inspection_cache, "installed_version", lambda name: "9" if name == package else original(name))
    inspection_cache._versions.cache_clear()
    assert recall(model, "q") is None
    monkeypatch.undo()
    inspection_cache._versions.cache_clear()


def test_a_folder_that_cannot_be_written_keeps_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model.parent / "file").touch()
    monkeypatch.setenv("MMQ_CACHE", str(model.parent / "file"))
    keep(model, "q", {"x": 1})
    assert recall(model, "q") is None


def test_the_oldest_files_go(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection_cache, "MAX_FILES", 3)
    for number in range(5):
        (model / "config.json").write_text(str(number))
        keep(model, "q", {"x": number})
    assert recall(model, "q") == {"x": 4}
    assert len(list(place().iterdir())) == 3


REQUEST: dict[str, Any] = {"text": "x", "fallback": "{text}", "fields": ["patch_size"], "rows": 256}
CONFIG = {"model_type": "llava"}


def test_what_was_inspected_once_starts_no_helper(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = inspect(model, **REQUEST)
    check_config_class("LlavaConfig", CONFIG, "m", model)
    inspector._inspect.cache_clear()

    def refuse(hidden: Any = ()) -> Any:
        raise AssertionError("a helper was started")

    monkeypatch.setattr(inspector, "helper", refuse)
    start_helper(str(model))
    assert inspect(model, **REQUEST) == first
    check_config_class("LlavaConfig", CONFIG, "m", model)
    (model / "tokenizer_config.json").write_text("{}")
    with pytest.raises(AssertionError, match="was started"):
        start_helper(str(model))
    with pytest.raises(AssertionError, match="was started"):
        inspect(model, **REQUEST)


def test_refusals_are_not_kept(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{")
    with pytest.raises(CheckpointError, match="TemplateSyntaxError"):
        inspect(model)
    (model / "chat_template.jinja").unlink()
    assert inspect(model, **REQUEST, extra="patch").failure == ""
    content = json.loads((model / "processor_config.json").read_text())
    (model / "processor_config.json").write_text(json.dumps(content | {"patch_size": None}))
    assert inspect(model, **REQUEST).failure
    assert not has_reply(model)
    with pytest.raises(CheckpointError, match="cannot read its config"):
        check_config_class("LlavaConfig", {"vision_feature_layer": {"a": "b"}}, "m", model)
    assert not has_reply(model)


def test_the_model_of_a_command_line() -> None:
    assert _value(["mmq", "plan", "--model", "./m", "--all"], "--model") == "./m"
    assert _value(["mmq", "plan", "--model=./m"], "--model") == "./m"
    assert _value(["mmq", "plan", "--model"], "--model") is None
    assert _value(["mmq", "plan"], "--model") is None
    start_helper("no/such-model")
