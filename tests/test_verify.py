"""Verification: it detects errors in any block, and holds at most one block of each model in memory."""

import gc
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.artifact import verify_blocks
from exporter.artifact.artifact import Artifact
from exporter.artifact.manifest_coverage import _described
from exporter.artifact.verify import verify
from exporter.artifact.verify_whole import refuse_too_large
from exporter.device import choose
from exporter.errors import ArtifactError
from exporter.events import ignore
from exporter.model.embedded import MODELS
from exporter.model.source import open_source
from exporter.model.stream import Stream
from exporter.planning.recipe import Recipe
from tests.test_export import quick_export, quick_recipe

pytest.importorskip("compressed_tensors")
CPU = choose("cpu")


def test_every_block_runs_in_transformers_and_equals_the_dequantized_one(finished: Path) -> None:
    artifact = Artifact.open(finished)
    verified = verify(finished, CPU, ignore)
    config = artifact.source_config()
    blocks = sum(component.stored(config) for component in artifact.family.components)
    assert verified.blocks == blocks
    assert verified.block_difference == 0.0
    assert verified.skipped == ""
    assert verified.logit_difference is None


def test_the_whole_model_is_loaded_on_request_and_refused_when_it_does_not_fit(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verify(finished, CPU, ignore, load="whole").logit_difference == pytest.approx(0, abs=1e-4)
    need = 8 * Artifact.open(finished).parameters()
    monkeypatch.setattr("exporter.artifact.verify_whole.free_host_bytes", lambda: need)
    refuse_too_large(Artifact.open(finished))
    monkeypatch.setattr("exporter.artifact.verify_whole.free_host_bytes", lambda: need - 1)
    with pytest.raises(ArtifactError, match="two copies of the model need"):
        verify(finished, CPU, ignore, load="whole")


@pytest.mark.parametrize(
    ("name", "format_name"),
    [
        pytest.param("llava-w4-vit4", "compressed_tensors", marks=pytest.mark.slow),
        ("llava-w3-vit4", "compressed_tensors"),
        ("llava-w4-vit8a8", "compressed_tensors"),
        ("llava-fp8-vit16-cache8", "compressed_tensors"),
        ("llava-w4", "gptq"),
        ("llava-w4", "awq"),
    ],
)
def test_the_number_of_parameters_equals_that_of_the_source(name: str, format_name: str, tmp_path: Path) -> None:
    recipe = quick_recipe(name=name).model_copy(update={"format": format_name})
    if format_name == "awq":
        rules = [rule.model_copy(update={"symmetric": False}) for rule in recipe.quantize]
        recipe = recipe.model_copy(update={"quantize": tuple(rules)})
    quick_export(tmp_path / "out", recipe=recipe)
    source, _ = open_source("demo-llava")
    assert Artifact.open(tmp_path / "out").parameters() == sum(info.size for info in source.tensors.values())


def test_a_weight_that_compressed_tensors_decompresses_differently_is_named(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = Artifact.linear

    def moved(self: Artifact, module: str) -> Any:
        linear = true(self, module)
        if module.endswith("layers.1.mlp.up_proj") and module.startswith("language"):
            codes = linear.codes.clone()
            codes[0, 0] ^= 1
            linear = replace(linear, codes=codes)
        return linear

    monkeypatch.setattr("exporter.artifact.verify._wrong_linears", lambda *_: [])
    monkeypatch.setattr(Artifact, "linear", moved)
    with pytest.raises(ArtifactError, match=r"layers\.1\.mlp\.up_proj: compressed-tensors decompresses another weight"):
        verify(finished, CPU, ignore)


def test_a_block_with_different_unquantized_tensors_is_named(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = Artifact.read

    def moved(self: Artifact, name: str) -> torch.Tensor:
        return true(self, name) * (1.01 if name.endswith("layers.0.input_layernorm.weight") else 1)

    monkeypatch.setattr(Artifact, "read", moved)
    with pytest.raises(ArtifactError, match=r"language_model\.layers\.0: its outputs differ") as caught:
        verify(finished, CPU, ignore)
    assert "layers.1:" not in caught.value.message  # each block is compared on the same input


def test_names_that_transformers_lacks_are_problems(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = verify_blocks._prepare

    def with_fewer(model: Any, described: Any) -> None:
        groups = {k: v | {"targets": v["targets"][:1]} for k, v in described["config_groups"].items()}
        prepare(model, dict(described) | {"config_groups": groups})

    monkeypatch.setattr(verify_blocks, "_prepare", with_fewer)
    with pytest.raises(ArtifactError, match="expects other tensors than the artifact has"):
        verify(finished, CPU, ignore)


def test_a_failure_of_a_library_does_not_fail_the_artifact(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise AttributeError("'Linear' object has no attribute 'weight'")

    monkeypatch.setattr(verify_blocks, "_prepare", fails)
    verified = verify(finished, CPU, ignore)
    assert "has no attribute 'weight'" in verified.skipped
    assert verified.blocks is None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_memory_shortage_is_not_a_library_failure(
    error: Exception, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs_out(*_: Any) -> None:
        raise error

    monkeypatch.setattr(verify_blocks, "_prepare", runs_out)
    with pytest.raises(type(error)):
        verify(finished, CPU, ignore)


def test_at_most_one_block_of_each_model_is_in_memory(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge, peaks = verify_blocks._ComparisonPass._judge, []

    def measured(self: Any, *args: Any) -> None:
        peaks.append(live_bytes() - before)
        judge(self, *args)

    def live_bytes() -> int:
        gc.collect()
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors()}
        return sum(storages.values())

    def tensors() -> list[torch.Tensor]:
        return [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter) and not o.is_meta]

    monkeypatch.setattr(verify_blocks._ComparisonPass, "_judge", measured)
    before = live_bytes()
    verify(finished, CPU, ignore)
    sizes: dict[str, int] = {}
    artifact = Artifact.open(finished)
    for name in artifact.names():
        for block in verify_blocks._block_paths(artifact):
            if artifact.family.live_name(name).startswith(block + "."):
                sizes[block] = sizes.get(block, 0) + 4 * artifact.read(name).numel()
    activations = 2**20  # one picture and question through demo-llava
    assert max(peaks) < 2 * max(sizes.values()) + activations
    assert 4 * artifact.parameters() > 2 * max(sizes.values()) + activations  # two whole models would be seen


def wider(folder: Path) -> Path:
    """The demo model in float32."""
    import shutil

    shutil.copytree(MODELS["demo-llava"], folder)
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_artifact_of_a_float32_source_runs_in_transformers(tmp_path: Path) -> None:
    recipe: Recipe = quick_recipe(wider(tmp_path / "wide"))
    quick_export(tmp_path / "out", recipe=recipe)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    verified = verify(tmp_path / "out", CPU, ignore, load="whole")
    assert verified.block_difference == 0.0
    assert verified.logit_difference == pytest.approx(0, abs=1e-4)


def test_placeholders_take_no_memory_and_have_the_dtype_and_device_of_the_weights() -> None:
    checkpoint, family = open_source("demo-llava")
    stream = Stream(family, checkpoint.config, torch.device("cpu"), torch.bfloat16)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    shape = stream.model.get_parameter(name).shape
    verify_blocks._set(stream, name, None)
    parameter = stream.model.get_parameter(name)
    assert (parameter.shape, parameter.dtype, parameter.device.type) == (shape, torch.bfloat16, "cpu")
    assert parameter.untyped_storage().nbytes() == 2


def test_only_weights_of_linears_can_be_described() -> None:
    """Matrices that a scheme's patterns match, unless the config ignores them."""
    shapes = {
        "a.q.weight": (4, 8),
        "a.ignored.weight": (4, 8),
        "a.norm.weight": (4,),
        "a.convolution.weight": (4, 3, 2, 2),
        "a.position.bias": (4, 8),
        "weight": (4, 8),
        "b.weight": (4, 8),
    }
    artifact = SimpleNamespace(
        manifest=SimpleNamespace(format="compressed_tensors"),
        checkpoint=SimpleNamespace(
            config={"quantization_config": {"ignore": ["model.a.ignored"]}},
            tensors={name: SimpleNamespace(shape=shape) for name, shape in shapes.items()},
        ),
        family=SimpleNamespace(runtime_name=lambda module: f"model.{module}"),
        groups=[SimpleNamespace(targets=["re:model[.](a[.].*|)$"])],
    )
    assert _described(cast(Artifact, artifact)) == {"a.q"}
