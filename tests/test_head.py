"""The output head in few bits: where vLLM supports it, and clear errors elsewhere."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.artifact.artifact import Artifact
from exporter.device import choose
from exporter.errors import PlanError
from exporter.events import ignore
from exporter.model.checkpoint import Checkpoint
from exporter.model.embedded import MODELS
from exporter.model.families import FAMILIES
from exporter.pipeline.export import export
from exporter.planning.plan import make_plan
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import load_recipe
from tests.test_plan import H100, LLAVA_7B

HEAD = "language_model.lm_head"


def recipe(model: str = "demo-llava", format_name: str = "compressed_tensors", **rule: Any) -> Recipe:
    """The head by `rule`; everything else is kept."""
    data = load_recipe("llava-w8").model_dump()
    data["model"] |= {"repo": model, "revision": None}
    data |= {"quantize": [{"component": "head", "bits": 8} | rule], "format": format_name}
    return Recipe.model_validate(data)


@pytest.mark.parametrize("activations", [None, "int8"])
def test_the_demo_with_a_head_of_8_bits_is_read_back_and_loads_in_transformers(
    activations: str | None, tmp_path: Path
) -> None:
    done = export(
        recipe(activations=activations), out=tmp_path / "a", device=choose("cpu"), on_event=ignore, skip_evaluation=True
    )
    assert done.verified.linears == 1
    (group,) = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["config_groups"].values()
    assert group["targets"] == ["re:.*lm_head$"]
    before = Checkpoint.open(MODELS["demo-llava"], FAMILIES["llava"].canonical_name).read(f"{HEAD}.weight").float()
    after = Artifact.open(tmp_path / "a").read(f"{HEAD}.weight").float()
    assert 0 < float((after - before).norm() / before.norm()) < 0.01


def test_only_methods_without_data_and_compressed_tensors_support_a_head(
    sparse_checkpoint: Callable[[str], Path],
) -> None:
    big = Checkpoint.open(sparse_checkpoint(LLAVA_7B), FAMILIES["llava"].canonical_name)
    plan = make_plan(recipe(), big, FAMILIES["llava"], H100)
    (row,) = plan.of("head")
    assert row.decision == "packed"
    assert row.bytes_after == 32064 * 4096 + 2 * 32064 + 16
    reasons = {row.tensor.name: row.reason for row in plan.rows if row.decision == "kept"}
    assert reasons["language_model.model.embed_tokens.weight"] == "embedding: vLLM cannot load it packed"
    with pytest.raises(PlanError, match="component 'head', method gptq: its inputs are the outputs of the whole model"):
        make_plan(recipe(method="gptq"), big, FAMILIES["llava"], H100)
    with pytest.raises(PlanError, match="'head': vLLM loads it packed only in format compressed_tensors, not gptq"):
        make_plan(recipe(format_name="gptq"), big, FAMILIES["llava"], H100)


def test_a_head_that_shares_the_embedding_is_not_a_component() -> None:
    (head,) = [component for component in FAMILIES["llava"].components if component.name == "head"]
    assert head.used({"tie_word_embeddings": True, "text_config": {}}) == 0
    assert head.used({"text_config": {"tie_word_embeddings": True}}) == 0
    assert head.used({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}) == 0
    assert head.used({"text_config": {}}) == 1
