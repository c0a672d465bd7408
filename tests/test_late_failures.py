"""Settings of a model folder with which transformers' first forward pass would fail: the plan refuses them by name."""

import copy
import itertools
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import CheckpointError, PlanError
from exporter.model.checkpoint import Checkpoint
from exporter.model.config_check import known_family
from exporter.model.families import FAMILIES
from exporter.model.processors.check import check_libraries
from tests.tiny_models import CONFIGS, write_processor

QWENS = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl")
UNEQUAL: list[tuple[str, str, dict[str, Any], str, str]] = [  # family, file of the processor, change, message, hint
    *(
        (
            name,
            "preprocessor_config.json",
            {"merge_size": 1},
            "image_processor.merge_size: 1, but the model expects 2",
            '"merge_size": 2',
        )
        for name in QWENS
    ),
    # As many values per patch as before: only the names tell.
    *(
        (
            name,
            "preprocessor_config.json",
            {"patch_size": 2, "temporal_patch_size": 8},
            "image_processor.patch_size: 2, but the model expects 4",
            '"patch_size": 4, "temporal_patch_size": 2',
        )
        for name in QWENS
    ),
    *(
        (
            name,
            "preprocessor_config.json",
            {"image_grid_pinpoints": [[64, 64]]},
            "image_processor.image_grid_pinpoints: [[64, 64]], but the model expects [[",
            '"image_grid_pinpoints": [[',
        )
        for name in ("llava-next", "llava-onevision")
    ),
    (
        "llava-next",
        "processor_config.json",
        {"vision_feature_select_strategy": "full"},
        'vision_feature_select_strategy: "full", but the model expects "default"',
        '_strategy": "default"',
    ),
    (
        "llava-onevision",
        "processor_config.json",
        {"vision_aspect_ratio": "anyres_max_4"},
        'vision_aspect_ratio: "anyres_max_4", but the model expects "anyres_max_9"',
        '"vision_aspect_ratio": "anyres_max_9"',
    ),
    (
        "llava-onevision",
        "processor_config.json",
        {"num_image_tokens": 4},
        "num_image_tokens: 4",
        '"num_image_tokens": 16',
    ),
    (
        "llava-onevision",
        "processor_config.json",
        {"vision_aspect_ratio": "pad"},
        'vision_aspect_ratio: "pad", but the model expects "anyres_max_9"',
        '"vision_aspect_ratio": "anyres_max_9"',
    ),
    (
        "llava-pixtral",
        "processor_config.json",
        {"patch_size": 4},
        "patch_size: 4, but the model expects 8",
        '"patch_size": 8',
    ),
    (
        "llava-pixtral",
        "preprocessor_config.json",
        {"size": {"height": 64, "width": 64}},
        "image_processor.size.height: 64, but the model expects at most 32",
        '"size": {"height": 32}',
    ),
    (
        "idefics3",
        "processor_config.json",
        {"image_seq_len": 16},
        "image_seq_len: 16, but the model expects 4",
        '"image_seq_len": 4',
    ),
    (
        "smolvlm",
        "preprocessor_config.json",
        {"max_image_size": {"longest_edge": 16}},
        "16 x 16 pixels",
        "processor files",
    ),
    ("blip2", "processor_config.json", {"num_query_tokens": 4}, "4 image tokens", '"num_query_tokens": 5'),
    (
        "blip2-itm",
        "processor_config.json",
        {"num_query_tokens": 5},
        "num_query_tokens: 5, but the model expects 0",
        '"num_query_tokens": 0',
    ),
]


RAGGED = [*((name, {"do_pad": False}, "no batch can hold") for name in ("llava-onevision", "idefics3", "smolvlm"))]
SMALL = [
    *(
        (name, {"size": {"longest_edge": side}}, f"{side} is below 1")
        for name in ("idefics3", "smolvlm")
        for side in (0, -1)
    ),
    *((name, {"size": {"shortest_edge": -1, "longest_edge": 4096}}, "-1 is below 1") for name in QWENS),
]


@pytest.mark.parametrize(("name", "changed", "message"), [*RAGGED, *SMALL])
def test_a_processor_that_cannot_encode_every_batch_of_pictures_is_refused(
    name: str, changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """One picture alone works; an export fails with the first batch that has pictures of two sizes."""
    family, config = CONFIGS[name]
    write_processor(tmp_path, family, config)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(PlanError, match=message):
        check_libraries(Checkpoint(tmp_path, config, {}, name), family)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("value", ["x", None])
def test_a_config_with_the_model_type_of_no_family_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    """mmq finds the family by `architectures`, but vLLM and transformers the class by `model_type`."""
    family, config = CONFIGS[name]
    write_processor(tmp_path, family, config)
    named = json.dumps(value)
    with pytest.raises(CheckpointError, match=f"`model_type` must be {json.dumps(config['model_type'])}, got {named}"):
        check_libraries(Checkpoint(tmp_path, config | {"model_type": value}, {}, name), family)


@pytest.mark.parametrize(("name", "file", "changed", "message", "hint"), UNEQUAL)
def test_a_setting_of_the_processor_that_differs_from_the_config_is_refused(
    name: str, file: str, changed: dict[str, Any], message: str, hint: str, tmp_path: Path
) -> None:
    """Otherwise transformers fails in its first forward pass: there are more image tokens than features, or fewer."""
    family, config = CONFIGS[name]
    write_processor(tmp_path, family, config)
    checkpoint = Checkpoint(tmp_path, config, {}, name)
    check_libraries(checkpoint, family)
    stored = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps(stored | changed))
    with pytest.raises(PlanError) as caught:
        check_libraries(checkpoint, family)
    assert message in str(caught.value)
    assert hint in str(caught.value.hint)
    assert ("add to" not in str(caught.value.hint)) or f"add to {file}: " in str(caught.value.hint)


SLIDING = {"use_sliding_window": True, "sliding_window": 6}
KINDS = ["full_attention", "sliding_attention"]
LATE: list[tuple[str, str, dict[str, Any], str]] = [  # family, object of config.json, change, message
    *(
        ("llava-onevision", "", {"vision_aspect_ratio": value}, "vision_aspect_ratio: expected anyres_max_N, where N")
        for value in ("pad", "anyres", "anyres_max_0", "anyres_max_", "anyres_max_9\n", None, 9)
    ),
    (
        "llava-next",
        "",
        {"image_grid_pinpoints": [[40, 64]]},
        r"image_grid_pinpoints: \[40, 64\], but tiles of 32 pixels",
    ),
    *(
        (
            "llava-next",
            "",
            {"image_grid_pinpoints": value},
            r"image_grid_pinpoints: expected a list of \[height, width\]",
        )
        for value in ("abc", [], [64], [[64]], [[0, 32]], [[64.0, 32]])
    ),
    *(
        (name, "", {"scale_factor": 3}, "scale_factor: 3 does not divide the 4 patches of a tile's side")
        for name in ("idefics3", "smolvlm")
    ),
    (
        "qwen2.5-vl",
        "vision_config",
        {"window_size": 7},
        "window_size: 7 is less than patch_size x spatial_merge_size, 8",
    ),
    *(
        (
            name,
            "vision_config",
            {"num_heads": 32},
            "num_heads: 32 makes heads of 2 values, which must be a multiple of 4",
        )
        for name in QWENS
    ),
    *(
        (name, "text_config", {"layer_types": KINDS}, "layer_types: sliding_attention needs `use_sliding_window: true`")
        for name in ("llava-qwen2", "llava-qwen3", "llava-onevision", "qwen2-vl", "qwen2.5-vl")
    ),
    (
        "llava-qwen2",
        "text_config",
        {**SLIDING, "sliding_window": None, "layer_types": KINDS},
        "a number as `sliding_window`",
    ),
    (
        "llava-mistral",
        "text_config",
        {"sliding_window": 6, "layer_types": KINDS},
        "every block has sliding_attention, and",
    ),
    (
        "llava-mistral",
        "text_config",
        {"sliding_window": None, "layer_types": KINDS},
        "every block has full_attention, and",
    ),
    (
        "llava",
        "text_config",
        {"layer_types": KINDS},
        "layer_types: every block has full_attention, and transformers ignores",
    ),
    ("smolvlm", "text_config", {"layer_types": KINDS}, "layer_types: every block has full_attention"),
    ("qwen3-vl", "text_config", {"layer_types": [*KINDS, KINDS[0]]}, "layer_types: every block has full_attention"),
    *(
        (
            "llava-pixtral",
            "vision_config",
            {"num_attention_heads": heads},
            f"num_attention_heads: heads of {64 // heads} ",
        )
        for heads in (32, 64)
    ),
    (
        "blip2",
        "text_config",
        {"word_embed_proj_dim": 64},
        "word_embed_proj_dim: 64, but a picture's tokens have the hidden_",
    ),
]


def changed_config(name: str, place: str, changed: dict[str, Any]) -> dict[str, Any]:
    """A tiny config with other values in one of its objects."""
    config = copy.deepcopy(CONFIGS[name][1])
    (config[place] if place else config).update(changed)
    return config


@pytest.mark.parametrize(("name", "place", "changed", "message"), LATE)
def test_a_config_on_which_the_first_forward_pass_fails_is_refused(
    name: str, place: str, changed: dict[str, Any], message: str
) -> None:
    """Or with which transformers and vLLM compute different models."""
    with pytest.raises(PlanError, match=message):
        known_family(changed_config(name, place, changed), name)


@pytest.mark.parametrize(
    ("name", "place", "changed"),
    [
        ("llava-onevision", "", {"vision_aspect_ratio": "anyres_max_1"}),
        ("idefics3", "", {"scale_factor": 4}),
        ("qwen2.5-vl", "vision_config", {"window_size": 8}),
        ("llava-qwen2", "text_config", {**SLIDING, "layer_types": KINDS}),
        ("llava-qwen2", "text_config", {"layer_types": KINDS[:1] * 2}),
        ("llava-mistral", "text_config", {"sliding_window": 6, "layer_types": KINDS[1:] * 2}),
        ("llava-mistral", "text_config", {"sliding_window": None, "layer_types": KINDS[:1] * 2}),
        ("llava", "text_config", {"layer_types": KINDS[:1] * 2}),
    ],
)
def test_such_a_config_with_values_that_fit_is_accepted(name: str, place: str, changed: dict[str, Any]) -> None:
    known_family(changed_config(name, place, changed), name)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_value_of_any_type_in_config_json_is_accepted_or_refused(name: str) -> None:
    """No other error: a plan of a foreign folder never ends in a traceback."""
    for place, content in [
        ("", CONFIGS[name][1]),
        *((k, v) for k, v in CONFIGS[name][1].items() if isinstance(v, dict)),
    ]:
        for key, value in itertools.product(content, (None, True, -1, 0, 1.5, "x", [], ["x"], {}, 10**30)):
            with suppress(PlanError):  # any other error fails the test
                known_family(changed_config(name, place, {key: value}), name)
