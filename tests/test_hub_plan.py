"""A plan of a hub model finds what an export would refuse, before the weights are downloaded."""

from pathlib import Path

import pytest

from exporter.device import choose
from exporter.errors import MmqError
from exporter.model.checkpoint import Checkpoint
from exporter.model.embedded import MODELS
from exporter.pipeline.preparation import prepare
from exporter.planning.plan import Plan
from exporter.planning.recipe_file import load_recipe
from tests.hub_server import Fault, Hub
from tests.test_publish import hub, waits

__all__ = ["hub", "waits"]  # fixtures
NAME = "org/llava"
BLIND = b'{"processor_class": "LlavaProcessor"}'


def demo_files() -> dict[str, bytes]:
    """Files of demo-llava, for a repository."""
    return {path.name: path.read_bytes() for path in MODELS["demo-llava"].iterdir() if path.is_file()}


def planned(headers_only: bool = True) -> tuple[Plan, Checkpoint]:
    recipe = load_recipe("llava-w4").adjusted(model={"repo": NAME})
    return prepare(recipe, choose("cpu"), headers_only=headers_only)


REFUSED = {
    "an adapter beside the weights": ({"adapter_config.json": b"{}"}, "both weights and an adapter"),
    "no patch size": ({"processor_config.json": BLIND}, "its processor does not match config.json"),
    "an endless template": (
        {"chat_template.jinja": b"{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"},
        "its chat template cannot be used",
    ),
    "a damaged tokenizer": ({"tokenizer.json": b"{}"}, r"tokenizer\.json"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("headers_only", [True, False])
def test_a_hub_model_is_refused_before_its_weights_are_downloaded(hub: Hub, name: str, headers_only: bool) -> None:
    changed, reason = REFUSED[name]
    hub.add(NAME, demo_files() | changed)
    with pytest.raises(MmqError, match=reason):
        planned(headers_only)
    ranges = {request.range for request in hub.sent("GET /large/")}
    assert ranges == {"bytes=0-100000"}  # of the header


def test_small_files_in_the_cache_are_not_taken_for_the_model(hub: Hub) -> None:
    commit = hub.add(NAME, demo_files())
    by_headers, checkpoint = planned()
    assert checkpoint.origin == f"{NAME}@{commit}"
    assert (checkpoint.folder / "tokenizer.json").is_file()
    assert not (checkpoint.folder / "model.safetensors").exists()
    assert planned()[0].rows == by_headers.rows  # now that the small files are in the cache
    hub.faults.append(Fault(r".*", 0, times=99))
    with pytest.raises(MmqError, match="not in the hub cache and the hub cannot be reached"):
        planned()
    hub.faults.clear()
    whole, downloaded = planned(headers_only=False)
    assert whole.rows == by_headers.rows
    assert downloaded.read("language_model.lm_head.weight").numel()
    hub.log.clear()
    planned(headers_only=False)
    assert not hub.sent("GET /large/")


def test_a_huge_file_beside_the_weights_is_not_downloaded(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.model.source.MOST_BYTES", 100_000)
    hub.add(NAME, demo_files() | {"huge.json": b" " * 200_000})
    _, checkpoint = planned()
    assert sorted(path.name for path in Path(checkpoint.folder).glob("*.json") if path.name == "huge.json") == []
