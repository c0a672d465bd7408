"""Models whose vocabulary was resized after training: with right ids they work to the end, others are refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from exporter.artifact.artifact import Artifact
from exporter.device import choose
from exporter.errors import PlanError
from exporter.events import ignore
from exporter.model.families import FAMILIES, Family
from exporter.pipeline.export import export
from exporter.pipeline.preparation import prepare
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import load_recipe
from tests.slow import some
from tests.test_conformance import TASKS_OF
from tests.tiny_models import CONFIGS, write_processor, write_tiny
from tests.whole_forward import rules

ADDED, ROWS = 5, 192  # tokens added before the special ones; rows of embedding and head, padded to a multiple of 64
PICTURES = [name for name in FAMILIES if CONFIGS[name][0].image_token(CONFIGS[name][1]) is not None]


def sized(config: dict[str, Any], family: Family, rows: int) -> dict[str, Any]:
    """The config with embeddings of that many rows."""
    changed = copy.deepcopy(config)
    part = changed["text_config" if "text_config" in changed else "qformer_config"]
    part["vocab_size"] = rows
    assert family.vocabulary(changed) == rows
    return changed


def moved(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the ids that its special tokens have after the added ones."""
    ids = {key: value for key, value in config.items() if "_token_i" in key and (value or 0) > ROWS // 2}
    return config | {key: value + ADDED for key, value in ids.items()}


def write_resized(folder: Path, name: str, **config: Any) -> Path:
    """A model with `ROWS` embeddings and a tokenizer with `ADDED` more tokens. config: changed keys of config.json."""
    family, tiny = CONFIGS[name]
    tokens = family.vocabulary(tiny) + ADDED
    described = sized(moved(tiny), family, ROWS) | config
    write_tiny(folder, family, config=described)
    write_processor(folder, family, sized(moved(tiny), family, tokens))
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def recipe_for(folder: Path, family: Family) -> Recipe:
    data = load_recipe("llava-w4").model_dump() | {
        "quantize": [rule.model_dump() for rule in rules(family, "rtn")],
        "model": {"repo": str(folder)},
        "calibration": {"data": "demo", "tasks": TASKS_OF[family.tasks], "samples": 4, "batch": 2},
        "evaluation": {"data": "demo", "samples": 2},
        "max_new_tokens": {} if "retrieval" in family.tasks else {"vqa": 2, "captioning": 4},
        "gates": (),
    }
    return Recipe.model_validate(data)


@pytest.mark.parametrize("name", some(FAMILIES, ("qwen2.5-vl",)))
def test_right_ids_work_to_the_end(name: str, tmp_path: Path) -> None:
    family = CONFIGS[name][0]
    recipe = recipe_for(write_resized(tmp_path / "m", name), family)
    done = export(recipe, out=tmp_path / "out", device=choose("cpu"), on_event=ignore)
    assert done.report is not None
    artifact = Artifact.open(tmp_path / "out")
    embeddings = [info.shape for key, info in artifact.checkpoint.tensors.items() if "embed_tokens" in key]
    assert all(shape[0] == ROWS for shape in embeddings)


@pytest.mark.parametrize("name", PICTURES)
def test_the_image_token_of_before_is_refused(name: str, tmp_path: Path) -> None:
    family, tiny = CONFIGS[name]
    key = next(key for key in ("image_token_index", "image_token_id") if key in tiny)
    recipe = recipe_for(write_resized(tmp_path / "m", name, **{key: tiny[key]}), family)
    with pytest.raises(PlanError, match=r"its processor does not match config\.json:\n.*image token"):
        prepare(recipe, choose("cpu"), headers_only=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stale_number_of_tokens_is_refused(name: str, tmp_path: Path) -> None:
    """config.json has fewer rows than the embedding; or the tokenizer has more tokens than both."""
    family, tiny = CONFIGS[name]
    folder = write_resized(tmp_path / "m", name)
    old = family.vocabulary(tiny)
    (folder / "config.json").write_text(json.dumps(sized(moved(tiny), family, old + ADDED)))
    with pytest.raises(PlanError, match=rf"the shape is \[{ROWS}, \d+\], but config.json requires \[{old + ADDED}"):
        prepare(recipe_for(folder, family), choose("cpu"), headers_only=True)
    write_tiny(tmp_path / "n", family, config=tiny)
    write_processor(tmp_path / "n", family, sized(moved(tiny), family, old + ADDED))
    (tmp_path / "n" / "config.json").write_text(json.dumps(tiny))
    with pytest.raises(PlanError, match=f"the model has only {old} tokens|image token"):
        prepare(recipe_for(tmp_path / "n", family), choose("cpu"), headers_only=True)
