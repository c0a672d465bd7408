"""Headers, indexes and config.json files of unknown origin: one error that names the place, never another exception."""

import copy
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.device import choose
from exporter.errors import CheckpointError, MmqError, PlanError
from exporter.model.embedded import MODELS
from exporter.model.source import open_source
from exporter.pipeline.preparation import prepare
from exporter.planning.plan import Plan
from exporter.planning.recipe_file import load_recipe

DEMO = MODELS["demo-llava"]
LINEAR = "language_model.model.layers.0.self_attn.q_proj.weight"
HEADER_LENGTH = struct.unpack("<Q", (DEMO / "model.safetensors").read_bytes()[:8])[0]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of demo-llava."""
    return Path(shutil.copytree(DEMO, tmp_path / "m"))


def plan_of(folder: Path, recipe: str = "llava-w4-vit8") -> Plan:
    """The plan that `mmq plan --model FOLDER` shows."""
    return prepare(load_recipe(recipe).adjusted(model={"repo": str(folder)}), choose("cpu"), headers_only=True)[0]


def with_header(folder: Path, header: Any) -> None:
    """Replace the header of the only shard by a JSON value, or by raw bytes."""
    raw = (DEMO / "model.safetensors").read_bytes()
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    data = raw[8 + HEADER_LENGTH :]
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(content)) + content + data)


def header_of(folder: Path) -> dict[str, Any]:
    header: dict[str, Any] = json.loads((folder / "model.safetensors").read_bytes()[8 : 8 + HEADER_LENGTH])
    return header


def with_config(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; `text_config__x` is `x` of `text_config`; ... deletes."""
    config = json.loads((folder / "config.json").read_text())
    for path, value in changes.items():
        place, _, key = path.rpartition("__")
        holder = config[place] if place else config
        if value is ...:
            del holder[key]
        else:
            holder[key] = value
    (folder / "config.json").write_text(json.dumps(config))


def with_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the stored tensors in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "dtype is a list": ({"dtype": []}, "`dtype` is a list"),
    "dtype is unknown": ({"dtype": "F128"}, "unknown dtype F128"),
    "dtype is of another size": ({"dtype": "F32"}, r"32,768 bytes, and F32 \[128, 128\] takes 65,536"),
    "shape is null": ({"shape": None}, "`shape` must be"),
    "shape holds texts": ({"shape": ["x"]}, "`shape` must be"),
    "shape holds true": ({"shape": [True, 16384]}, "`shape` must be"),
    "shape is negative": ({"shape": [-128, -128]}, "`shape` must be"),
    "shape is huge": ({"shape": [10**30, 10**30]}, "`shape` must be"),
    "shape has many dimensions": ({"shape": [1] * 65}, "`shape` must be"),
    "shape is of another size": ({"shape": [0, 0]}, "takes 0"),
    "offsets are absent": ({"data_offsets": None}, "`data_offsets` must be"),
    "offsets are one": ({"data_offsets": [1]}, "`data_offsets` must be"),
    "offsets are fractions": ({"data_offsets": [0.5, 32768.5]}, "`data_offsets` must be"),
    "offsets are reversed": ({"data_offsets": [32768, 0]}, "`data_offsets` must be"),
    "offsets overlap": ({"data_offsets": [0, 32768]}, "overlap"),
}


@pytest.mark.parametrize("what", ENTRIES)
def test_damaged_header_entries_name_tensor_and_reason(model: Path, what: str) -> None:
    change, reason = ENTRIES[what]
    header = header_of(model)
    header[LINEAR] |= change
    with_header(model, header)
    with pytest.raises(CheckpointError, match=reason):
        plan_of(model)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[]", "expected a JSON object, not a list"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b"\xff\xfe", "not UTF-8"),
        (b"{", "cannot be read as JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "cannot be read as JSON"),
        (b'{"x": {}, "x": {}}', "'x' occurs twice"),
        (b'{"x": null}', "x: expected an object, it is null"),
        (b'{"__metadata__": {"a": 1}}', "must be an object of strings"),
        (b"{}", "bytes follow the data"),
    ],
)
def test_damaged_headers(model: Path, content: bytes, reason: str) -> None:
    with_header(model, content)
    with pytest.raises(CheckpointError, match=reason):
        plan_of(model)


def test_a_gap_between_tensors_is_damage(model: Path) -> None:
    header = header_of(model)
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][1])
    header[last]["data_offsets"] = [offset + 2 for offset in header[last]["data_offsets"]]
    with_header(model, header)
    with pytest.raises(CheckpointError, match=f"{last}: .* leave a gap"):
        plan_of(model)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({"weight_map": []}, "`weight_map` must be an object, got a list"),
        ({}, "`weight_map` must be an object"),
        ({"weight_map": {LINEAR: None}}, "expected the name of a shard, got null"),
        ({"weight_map": {LINEAR: "a\0.safetensors"}}, "is outside of the folder"),
        ({"weight_map": {LINEAR: "model.bin"}}, "not pickles"),
        ({"weight_map": {LINEAR: "config.json"}}, "only safetensors"),
        ({"weight_map": {}}, "lists no tensors"),
        ([], "expected a JSON object"),
    ],
)
def test_damaged_indexes(model: Path, index: Any, reason: str) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=reason):
        plan_of(model)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_pipe_is_not_read(model: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with pytest.raises(CheckpointError, match=r"not a regular file|no model\.safetensors"):
        plan_of(model)


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ...}, "`architectures` is missing or empty"),
    ({"architectures": True}, "must be a list of texts, got true"),
    ({"architectures": [[]]}, "must be a list of texts"),
    ({"architectures": ["GptModel"]}, "does not support GptModel"),
    ({"text_config": ...}, "text_config: expected an object, got no value"),
    ({"vision_config": []}, "vision_config: expected an object, got a list"),
    ({"vision_config__patch_size": 0}, r"vision_config\.patch_size: expected an integer from 1"),
    ({"vision_config__patch_size": 65}, "patch_size: 65 is larger than image_size 64"),
    ({"vision_config__image_size": [64, 64]}, "image_size: expected an integer"),
    ({"vision_config__num_attention_heads": 3}, "3 does not divide hidden_size 128"),
    ({"text_config__num_hidden_layers": 10**9}, r"from 1 to 1,024, got the number 1000000000"),
    ({"text_config__num_hidden_layers": 2.0}, "expected an integer"),
    ({"text_config__num_hidden_layers": True}, "expected an integer .* got true"),
    ({"text_config__num_key_value_heads": 0}, "num_key_value_heads: expected"),
    ({"text_config__num_labels": 10**9}, r"text_config\.num_labels: expected"),
    ({"num_labels": 10**9}, "num_labels: expected"),
    ({"text_config__hidden_act": "evil"}, "hidden_act: expected gelu or"),
    ({"bos_token_id": [None]}, "bos_token_id: expected an integer from -1 to 16,777,216 or a list of them, got a list"),
    ({"eos_token_id": "2"}, "eos_token_id: expected an integer"),
    ({"text_config__eos_token_id": [2, 10**9]}, r"text_config\.eos_token_id: expected an integer"),
    ({"text_config__bos_token_id": True}, r"text_config\.bos_token_id: expected .* got true"),
    ({"text_config__tie_word_embeddings": "yes"}, "expected true or false"),
    ({"text_config__rope_theta": [10000]}, r"text_config\.rope_theta: expected a positive number, got a list"),
    ({"text_config__rope_theta": 0}, r"rope_theta: expected a positive number, got the number 0"),
    ({"text_config__rope_parameters": {"rope_type": "default", "rope_theta": [1]}}, "rope_theta: expected a positive"),
    ({"text_config__rope_scaling": {"type": "linear", "factor": "2"}}, "factor: expected a positive number"),
    ({"vision_feature_layer": 10**9}, "vision_feature_layer: 1000000000, but the vision tower has 2 blocks"),
    ({"vision_feature_layer": -4}, "vision_feature_layer: -4"),
    ({"vision_feature_layer": []}, "vision_feature_layer: expected"),
    ({"vision_feature_select_strategy": "some"}, "expected default or full"),
    ({"text_config__model_type": "phi3"}, "its text model is phi3; mmq supports llama, mistral, qwen2, qwen3"),
    ({"vision_config__model_type": "dinov2"}, "its vision tower is dinov2; mmq supports clip_vision_model"),
    ({"vision_config__model_type": 3}, "its vision tower is the number 3"),
    ({"text_config__layer_types": ["full_attention", 3]}, "expected a list of full_attention and sliding_attention"),
    ({"text_config__layer_types": ["full_attention"] * 9}, "layer_types: 9 entries for "),
    ({"text_config__model_type": "qwen2", "text_config__sliding_window": "x"}, "sliding_window: expected an integer"),
    ({"text_config__model_type": "qwen3", "text_config__max_window_layers": -1}, "max_window_layers: expected an"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "reason"), CONFIGS, ids=[str(changes) for changes, _ in CONFIGS])
def test_an_invalid_config_is_refused_with_the_field(model: Path, changes: dict[str, Any], reason: str) -> None:
    with_config(model, **changes)
    with pytest.raises(PlanError, match=reason):
        plan_of(model)


@pytest.mark.parametrize("token", [None, -1, 2, [2, 7], []])
def test_configs_may_have_several_end_tokens_or_none(model: Path, token: Any) -> None:
    with_config(model, text_config__eos_token_id=token, text_config__bos_token_id=None, bos_token_id=-1)
    assert plan_of(model).units


def test_all_problems_of_a_config_are_reported_at_once(model: Path) -> None:
    with_config(model, vision_config__patch_size=0, text_config__hidden_size=None, vision_feature_layer="x")
    with pytest.raises(PlanError) as caught:
        plan_of(model)
    for place in ("vision_config.patch_size", "text_config.hidden_size", "vision_feature_layer"):
        assert f"\n  {place}: expected" in caught.value.message


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("place", ["", "text_config", "vision_config"])
def test_a_quantized_source_is_refused_wherever_its_config_is_quantized(model: Path, place: str, key: str) -> None:
    with_config(model, **{f"{place}__{key}" if place else key: {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(PlanError, match=f"already quantized: its config.json has {f'{place}.{key}' if place else key}"):
        plan_of(model)


def test_a_quantization_config_in_any_object_is_refused(model: Path) -> None:
    with_config(model, text_config__inner={"more": {"quantization_config": {"bits": 4}}})
    with pytest.raises(PlanError, match=r"config\.json has text_config\.inner\.more\.quantization_config"):
        plan_of(model)


def test_a_null_quantization_config_is_ignored(model: Path) -> None:
    with_config(model, quantization_config=None)
    plan_of(model)


def resize(tensors: dict[str, torch.Tensor]) -> None:
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:64]])


def widen(tensors: dict[str, torch.Tensor]) -> None:
    tensors["language_model.model.norm.weight"] = torch.ones(128, dtype=torch.float64)


BIAS = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"
CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "resized vocabulary": (
        resize,
        r"embed_tokens\.weight: the shape is \[320, 128\], but config.json requires \[256, 128\]",
    ),
    "foreign tensor": (
        lambda t: t.update({"value_head.weight": torch.rand(1, 128)}),
        "value_head.weight: not a tensor of",
    ),
    "missing bias": (lambda t: t.pop(BIAS), f"{BIAS}: missing"),
    "missing head": (lambda t: t.pop("language_model.lm_head.weight"), "lm_head.weight: missing"),
    "float64": (widen, "stored as float64"),
    "integers": (lambda t: t.update({BIAS: torch.ones(512, dtype=torch.int8)}), "stored as int8"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_tensors_that_do_not_match_the_config_are_refused_by_the_plan(model: Path, what: str) -> None:
    change, reason = CHANGES[what]
    with_tensors(model, change)
    with pytest.raises(PlanError, match=reason):
        plan_of(model)


BUFFERS = {
    "vision_tower.vision_model.embeddings.position_ids": torch.arange(65)[None],
    "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(32),
}


def test_stored_buffers_are_left_out_with_a_note(model: Path) -> None:
    before = plan_of(model)
    with_tensors(model, lambda tensors: tensors.update(copy.deepcopy(BUFFERS)))
    plan = plan_of(model)
    assert [row.tensor.name for row in plan.rows] == [row.tensor.name for row in before.rows]
    assert sum("left out of the artifact" in warning and "and 1 more" in warning for warning in plan.warnings) == 1
    assert set(open_source(str(model))[0].ignored) == set(BUFFERS)


@pytest.mark.parametrize("place", ["", "text_config__"])
def test_a_tied_head_need_not_be_stored(model: Path, place: str) -> None:
    with_config(model, tie_word_embeddings=..., text_config__tie_word_embeddings=...)
    with_config(model, **{f"{place}tie_word_embeddings": True})
    head, words = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    with_tensors(model, lambda tensors: tensors.update({head: tensors[words].clone()}))
    assert not any(row.linear == "language_model.lm_head" for row in plan_of(model).rows)  # stored all the same
    with_tensors(model, lambda tensors: tensors.pop(head))
    assert not any("lm_head" in row.tensor.name for row in plan_of(model).rows)


def test_of_several_architectures_the_first_known_one_counts(model: Path) -> None:
    """As in vLLM."""
    llava = "LlavaForConditionalGeneration"
    with_config(model, architectures=["Unknown", llava, "Qwen2VLForConditionalGeneration"])
    assert plan_of(model).family.name == "llava"
    with_config(model, architectures=["Qwen2VLForConditionalGeneration", llava])
    with pytest.raises(PlanError):
        plan_of(model)


def test_every_error_can_be_printed(model: Path) -> None:
    with_config(model, architectures=["\ud800\x1b[2J"])
    with pytest.raises(MmqError) as caught:
        plan_of(model)
    assert "\x1b" not in caught.value.message
    caught.value.message.encode()
