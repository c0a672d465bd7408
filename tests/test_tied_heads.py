"""An output head that is stored beside the embedding to which config.json ties it: equal, or refused by the plan."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.device import choose
from exporter.errors import CheckpointError
from exporter.events import ignore
from exporter.files.safetensors_header import read_excerpts
from exporter.model.families import FAMILIES, Family
from exporter.model.source import open_source
from exporter.model.tied_heads import LENGTH, PLACES, refuse_different, refuse_unlike
from exporter.pipeline.export import export
from exporter.pipeline.preparation import prepare
from exporter.planning.plan import Plan
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import load_recipe
from exporter.study.run import keys_of_run
from exporter.study.worker_tasks import Setup, open_model
from tests.conftest import header_config
from tests.headers import make
from tests.tiny_models import CONFIGS, write_tiny

TIED = [name for name in FAMILIES if FAMILIES[name].tied]
DIFFER = "config.json ties {} to {}, but the stored tensors differ"
RULE = {"component": "language", "method": "rtn", "bits": 8, "group_size": "row"}


def recipe_of(folder: Path) -> Recipe:
    """Rounding of the text model; it needs no data."""
    changed = {"quantize": [RULE], "gates": (), "model": {"repo": str(folder)}}
    return Recipe.model_validate(load_recipe("llava-w4").model_dump() | changed)


def plan_of(folder: Path) -> Plan:
    """The plan, as `mmq plan` makes it."""
    return prepare(recipe_of(folder), choose("cpu"), headers_only=True)[0]


def write_head(folder: Path, family: Family, change: Callable[[torch.Tensor], None] | None) -> tuple[str, str]:
    """Store the head beside the embedding, changed or equal to it; returns their names."""
    (head, embedding), path = next(iter(family.tied.items())), folder / "model.safetensors"
    tensors = load_file(path)
    words = tensors[embedding].clone()
    if change:
        change(words)
    save_file(tensors | {head: words}, path, metadata={"format": "pt"})
    return head, embedding


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((False, True), id="text"),
        pytest.param((True, False), id="top", marks=pytest.mark.slow),
        pytest.param((True, True), id="both", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", TIED)
def test_a_head_that_differs_from_the_embedding_is_refused_by_the_plan(
    name: str, flags: tuple[bool, bool], tmp_path: Path
) -> None:
    """Some versions of transformers and vLLM would use the head, others the embedding.

    flags: of the top level and of the text model. Where one alone does not tie them, it is refused itself, or the head
    is a tensor of its own.
    """
    family, config = CONFIGS[name]
    config = copy.deepcopy(config)
    config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"] = flags
    sizes, problems = family.read(config)
    if problems:
        assert flags != (True, True)
        assert "set both to the same value" in problems[0]
        return
    (head,) = family.tied
    if head in family.shapes(sizes):
        assert flags == (True, False), "only the text model's flag counts in this family"
        return
    folder = write_tiny(tmp_path / "m", family, config=config)
    write_head(folder, family, None)
    plan_of(folder)
    names = write_head(folder, family, lambda words: words[-1].add_(1))
    with pytest.raises(CheckpointError, match=DIFFER.format(*names)):
        plan_of(folder)


def test_an_export_and_a_study_refuse_what_no_excerpt_shows(tmp_path: Path) -> None:
    """The plan reads a few kilobytes of a large embedding; both others read it whole before any work."""
    config = copy.deepcopy(CONFIGS["llava"][1])
    config["tie_word_embeddings"], config["text_config"]["vocab_size"] = True, 4096
    config["image_token_index"] = 4095  # as the tests' tokenizer has it
    folder = write_tiny(tmp_path / "m", FAMILIES["llava"], config=config)
    rows, between = config["text_config"]["vocab_size"], LENGTH // (2 * config["text_config"]["hidden_size"])
    assert rows > 2 * PLACES * between, "the excerpts leave most rows out"
    names = write_head(folder, FAMILIES["llava"], lambda words: words[between + 1].add_(1))
    plan_of(folder)
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=DIFFER.format(*names)):
        export(recipe_of(folder), out=out, device=choose("cpu"), on_event=ignore, skip_evaluation=True)
    assert not out.exists()
    setup = Setup(tmp_path / "study", recipe_of(folder).model_dump_json())
    with pytest.raises(CheckpointError, match=DIFFER.format(*names)):
        keys_of_run(setup, open_model(setup), ignore)


@pytest.mark.parametrize("size", [0, 1, 5000, 200_001])
def test_excerpts_are_the_bytes_of_the_file(size: int, tmp_path: Path) -> None:
    """Among them the first and the last ones, also of tensors that are shorter than one excerpt."""
    data = torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    save_file({"a": torch.ones(3), "b": data, "c": torch.ones(2)}, tmp_path / "m.safetensors")
    excerpts, whole = read_excerpts(tmp_path / "m.safetensors", "b", PLACES, LENGTH), bytes(data.tolist())
    assert all(part in whole for part in excerpts)
    assert whole.startswith(excerpts[0])
    assert whole.endswith(excerpts[-1])
    assert len(excerpts) == (1 if size <= LENGTH else PLACES)
    assert len(excerpts[0]) == min(size, LENGTH)


def test_a_plan_from_headers_alone_does_not_compare(
    sparse_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of a model on the hub are elsewhere; those of a true-size model are not read whole."""
    folder = sparse_checkpoint(make.LLAVA_7B)
    config: dict[str, Any] = header_config(make.LLAVA_7B) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint, family = open_source(str(folder))
    monkeypatch.setattr("exporter.model.checkpoint.Checkpoint.read", lambda *_: pytest.fail("a tensor was read"))
    refuse_unlike(checkpoint, family)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    refuse_unlike(checkpoint, family)
    with pytest.raises(pytest.fail.Exception):
        refuse_different(checkpoint, family)
