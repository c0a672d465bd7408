"""What differs between families in plans: linears that vLLM builds in 16 bits, and text models that mmq refuses."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.artifact.artifact_config import groups, kept_modules
from exporter.device import Device
from exporter.errors import PlanError
from exporter.model.checkpoint import Checkpoint
from exporter.model.config_check import REFUSED, known_family
from exporter.model.families import FAMILIES
from exporter.model.processors.check import check_libraries
from exporter.model.processors.library import load_library
from exporter.model.source import open_source
from exporter.model.stream import build_skeleton
from exporter.planning.plan import Plan, engine_linears, make_plan
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import load_recipe
from exporter.planning.tensor_parallel import parallel_problems
from exporter.planning.vllm_rules import pattern_problems
from exporter.serving.launch import max_length
from tests.headers.read import HEADER_NAMES, SMALLEST, header_config
from tests.slow import some
from tests.tiny_models import CONFIGS, write_processor, write_tiny

H100 = Device("cpu", "CPU", 2**50)
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
    kept_rows = [row for row in linears if row.decision == "kept"]
    assert {row.linear for row in kept_rows} == {"mlp.fc1", "mlp.fc2"}
    assert {row.reason for row in kept_rows} == {"vLLM builds it in 16 bits, because 4304 is no multiple of 64"}
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


@pytest.mark.parametrize("name", REFUSED)
def test_known_architectures_that_are_not_supported_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(PlanError, match=f"mmq does not support {name}: {REFUSED[name]}"):
        known_family({"architectures": [name]}, "config.json")


def test_every_family_is_selected_by_its_architecture() -> None:
    for name, (family, config) in CONFIGS.items():
        assert known_family(config, name).name == family.name
    architectures = [name for family in FAMILIES.values() for name in family.architectures]
    assert len(set(architectures)) == len(architectures)


def all_rules(name: str) -> list[dict[str, Any]]:
    """A rule for every component that vLLM loads packed, with another scheme for each role."""
    schemes = {"attention": 4, "mlp": 8}
    return [
        {"component": part.name, "role": role, "method": "rtn", "bits": bits, "group_size": "row", "symmetric": True}
        for part in known_family(header_config(name), name).components
        for role, bits in schemes.items()
        if not part.unpackable and role in part.roles.values() and part.used(header_config(name))
    ]


@pytest.mark.parametrize("name", some(HEADER_NAMES, SMALLEST))
def test_vllm_matches_every_linear_of_a_published_checkpoint_to_its_scheme(
    name: str, sparse_checkpoint: Callable[[str], Path]
) -> None:
    """By the twin of vLLM's own matching, which tests/vllm compares with vLLM."""
    plan = plan_of(sparse_checkpoint, name, all_rules(name))
    linears = engine_linears(plan.rows, plan.family)
    packed = [linear for linear in linears if linear.scheme]
    assert len(packed) > 100
    assert {linear.scheme.bits for linear in packed if linear.scheme} == {4, 8}
    schemes = [(group.scheme, list(group.targets)) for group in groups(plan)]
    assert pattern_problems(linears, schemes, kept_modules(plan)) == []
    assert parallel_problems(linears, 1) == []
    assert all(heads > 0 for heads in plan.family.heads(header_config(name)).values())


@pytest.mark.parametrize("name", some(HEADER_NAMES, SMALLEST))
def test_tensors_of_a_published_checkpoint_that_are_kept_have_a_reason(
    name: str, sparse_checkpoint: Callable[[str], Path]
) -> None:
    plan = plan_of(sparse_checkpoint, name, all_rules(name))
    assert all(row.reason for row in plan.rows if row.decision == "kept")
    known = {part.name for part in plan.family.components}
    assert {row.component for row in plan.rows} <= known | {""}
    assert 0 < plan.memory.device_bytes < 2**36


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("llava-hf--llava-1.5-7b-hf", 4096),
        ("mistral-community--pixtral-12b", 32768),
        ("Qwen--Qwen2.5-VL-7B-Instruct", 32768),  # its text model's keys are at the top level
        ("Qwen--Qwen3-VL-8B-Instruct", 32768),
        ("HuggingFaceTB--SmolVLM2-2.2B-Instruct", 8192),
    ],
)
def test_the_context_of_a_served_model_is_limited(name: str, length: int) -> None:
    assert max_length(header_config(name), cpu=False) == length
    assert max_length(header_config(name), cpu=True) == 4096


@pytest.mark.parametrize("top", [False, True])
@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("name", [name for name, (family, _) in CONFIGS.items() if family.name == name and family.tied])
def test_heads_are_tied_as_transformers_ties_them_or_refused(name: str, top: bool, text: bool) -> None:
    family, config = CONFIGS[name]
    config = copy.deepcopy(config) | {"tie_word_embeddings": top}
    config["text_config"]["tie_word_embeddings"] = text
    sizes, problems = family.read(config)
    if problems:
        assert top != text
        assert "set both to the same value" in problems[0]
        return
    model = build_skeleton(family, config, torch.device("meta"))
    model.tie_weights()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    (head,) = family.tied
    assert (head in family.shapes(sizes)) != tied


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
@pytest.mark.parametrize("axes", [None, [2, 3, 4], [8], "2,3,3", [4, 5, -1], [2.0, 3.0, 3.0]])
def test_frequencies_of_positions_that_do_not_fit_a_head_are_refused(name: str, axes: Any) -> None:
    """transformers fails on them in its first forward pass; None: the default, for heads of 128."""
    config = copy.deepcopy(CONFIGS[name][1])
    known_family(config, name)
    rope = config["text_config"]["rope_parameters"]
    rope |= {"mrope_section": axes}
    if axes is None:
        del rope["mrope_section"]
    with pytest.raises(PlanError, match=r"mrope_section: expected three numbers whose sum is 8, half the width"):
        known_family(config, name)
    config["text_config"]["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 3, 3]}  # it has precedence
    known_family(config, name)


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        ([2, 0], r"deepstack_visual_indexes: expected rising block numbers, got \[2, 0\]"),
        ([1, 1], "deepstack_visual_indexes: expected rising block numbers"),
        ([0, 4], "deepstack_visual_indexes: 4, but the vision tower has 4 blocks"),
    ],
)
def test_blocks_whose_features_cannot_enter_the_text_model_are_refused(taps: list[int], message: str) -> None:
    """transformers looks each block up in the list, and fails in its first forward pass."""
    config = copy.deepcopy(CONFIGS["qwen3-vl"][1])
    config["vision_config"]["deepstack_visual_indexes"] = taps
    with pytest.raises(PlanError, match=message):
        known_family(config, "qwen3-vl")


@pytest.mark.parametrize("name", ["llava-next", "llava-onevision", "llava-next-siglip_vision_model"])
def test_a_strategy_that_does_not_leave_the_patches_of_a_tile_is_refused(name: str) -> None:
    config = copy.deepcopy(CONFIGS[name][1])
    known_family(config, name)
    other = {"full": "default", "default": "full"}[config["vision_feature_select_strategy"]]
    with pytest.raises(PlanError, match="vision_feature_select_strategy: it must leave exactly the patches"):
        known_family(config | {"vision_feature_select_strategy": other}, name)


@pytest.mark.parametrize("name", [name for name in FAMILIES if CONFIGS[name][0].image_token(CONFIGS[name][1])])
def test_two_different_image_tokens_are_refused(name: str) -> None:
    """transformers takes the last one."""
    config = CONFIGS[name][1] | {"image_token_index": 127, "image_token_id": 127}
    known_family(config, name)
    with pytest.raises(PlanError, match="image_token_index: 126, but image_token_id is 127: set both"):
        known_family(config | {"image_token_index": 126}, name)


VARYING = [name for name, (family, config) in CONFIGS.items() if family.of(config).varies]


@pytest.mark.parametrize("name", VARYING)
def test_an_image_token_that_is_not_the_processors_is_refused(name: str, tmp_path: Path) -> None:
    """For example after the vocabulary was resized: the other token may occur in prompts too."""
    family, config = CONFIGS[name]
    write_processor(tmp_path, family, config)
    checkpoint = Checkpoint(tmp_path, config, {}, name)
    check_libraries(checkpoint, family)
    key = next(key for key in ("image_token_index", "image_token_id") if key in config)
    with pytest.raises(PlanError, match=r"the processor's image token has the id 127, but config\.json has 125"):
        check_libraries(Checkpoint(tmp_path, {**config, key: 125}, {}, name), family)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("suffix", ["", "Fast", None])
def test_image_processors_load_under_the_names_of_every_version(name: str, suffix: str | None, tmp_path: Path) -> None:
    """Qwen3-VL's files name `Qwen2VLImageProcessorFast`; older files of some models name none."""
    family, config = CONFIGS[name]
    write_processor(tmp_path, family, config)
    path = tmp_path / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    kind = settings.pop("image_processor_type").removesuffix("Pil")
    path.write_text(json.dumps(settings | ({} if suffix is None else {"image_processor_type": kind + suffix})))
    processor = load_library(tmp_path)
    assert suffix is None or type(processor.image_processor).__name__.removesuffix("Pil") == kind
    loaded = json.loads(processor.image_processor.to_json_string())
    assert {key: value for key, value in settings.items() if loaded[key] != value} == {}


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
@pytest.mark.parametrize("place", ["", "text_config"])
def test_flags_for_a_tied_head_that_transformers_and_vllm_read_differently_are_refused(name: str, place: str) -> None:
    """vLLM served uninitialized output heads where only the first one was set."""
    config = copy.deepcopy(CONFIGS[name][1])
    known_family(config, name)
    (config[place] if place else config)["tie_word_embeddings"] = True
    with pytest.raises(PlanError, match=r"tie_word_embeddings is .*: set both to the same value"):
        known_family(config, name)
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    known_family(config, name)


@pytest.mark.parametrize(
    ("name", "component", "changed", "reason"),
    [
        ("llava", "vision", {"vision_feature_layer": 0}, "this block never runs: vision_feature_layer selects"),
        (
            "llava",
            "head",
            {"tie_word_embeddings": True},
            "the model stores none of its linears, because the output head",
        ),
        ("qwen3-vl", "deepstack", {"vision_config": {"deepstack_visual_indexes": []}}, "the model stores none of its"),
    ],
)
def test_a_rule_for_linears_that_never_run_is_refused_with_the_reason(
    name: str, component: str, changed: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    family, config = CONFIGS[name]
    tower = config["vision_config"] | changed.get("vision_config", {})
    config = config | changed | {"vision_config": tower}
    checkpoint, family = open_source(str(write_tiny(tmp_path / "m", family, config=config)))
    rule = {"component": component, "method": "rtn", "bits": 8, "group_size": "row"}
    recipe = load_recipe("llava-w4").model_dump() | {"quantize": [rule], "gates": ()}
    with pytest.raises(PlanError, match=rf"bits 8\) matches no linear: {reason}"):
        make_plan(Recipe.model_validate(recipe), checkpoint, family, H100)
