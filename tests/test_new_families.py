"""What differs between families in plans: linears that vLLM builds in 16 bits, and text models that mmq refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.device import Device
from exporter.errors import PlanError
from exporter.model.config_check import known_family
from exporter.model.families import FAMILIES
from exporter.model.source import open_source
from exporter.planning.plan import Plan, make_plan
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import load_recipe
from tests.tiny_models import CONFIGS

H100 = Device(torch.device("cpu"), "CPU", 2**50)
ONEVISION = "llava-hf--llava-onevision-qwen2-7b-ov-hf"


def plan_of(sparse: Callable[[str], Path], name: str, rules: list[dict[str, Any]]) -> Plan:
    """The plan of a published checkpoint with the given rules."""
    checkpoint, family = open_source(str(sparse(name)))
    recipe = load_recipe("llava-w4").model_dump() | {"quantize": rules, "gates": ()}
    return make_plan(Recipe.model_validate(recipe), checkpoint, family, H100)


def test_feed_forward_of_so400m_is_kept_where_vllm_builds_it_in_16_bits(
    sparse_checkpoint: Callable[[str], Path],
) -> None:
    rule = {"component": "vision", "method": "rtn", "bits": 8, "group_size": "row", "symmetric": True}
    plan = plan_of(sparse_checkpoint, ONEVISION, [rule])
    linears = [row for row in plan.of("vision") if row.linear]
    kept = [row for row in linears if row.decision == "kept"]
    assert {row.linear for row in kept} == {"mlp.fc1", "mlp.fc2"}
    assert {row.reason for row in kept} == {"vLLM builds it in 16 bits, because 4304 is no multiple of 64"}
    assert {row.linear for row in linears if row.decision == "packed"} == {
        f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")
    }
    stored = plan_of(sparse_checkpoint, ONEVISION, [{**rule, "store": "dequantized"}])
    assert all(row.decision == "dequantized" for row in stored.of("vision") if row.linear)


@pytest.mark.parametrize("name", [name for name in CONFIGS if "text_config" in CONFIGS[name][1]])
def test_other_text_models_are_refused_by_name(name: str) -> None:
    config = CONFIGS[name][1]
    other = {**config, "text_config": {**config["text_config"], "model_type": "phi3"}}
    with pytest.raises(PlanError, match="its text model is phi3; mmq supports"):
        known_family(other, name)


def test_every_family_is_selected_by_its_architecture() -> None:
    for name, (family, config) in CONFIGS.items():
        assert known_family(config, name).name == family.name
    architectures = [name for family in FAMILIES.values() for name in family.architectures]
    assert len(set(architectures)) == len(architectures)
