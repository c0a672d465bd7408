"""Caches with one scale per token and head: rounding, rules, and how an artifact asks vLLM for them."""

import json
import math
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from exporter.artifact.artifact import Artifact
from exporter.commands.main import cli
from exporter.device import Device, choose
from exporter.errors import ArtifactError, ServeError
from exporter.model.checkpoint import Checkpoint
from exporter.model.families import FAMILIES
from exporter.numerics.kv_caches import BY_FLAG, rounded_per_head
from exporter.pipeline import speed
from exporter.pipeline.export import export
from exporter.planning.plan import make_plan
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import load_recipe
from exporter.planning.vllm_rules import cache_problems, cpu_cache_problems
from exporter.publishing.artifact_summary import read_place
from exporter.publishing.card import CardDeclarations, render
from exporter.serving import check
from exporter.serving.launch import Program
from exporter.serving.preflight import refuse_plan, refuse_unservable
from tests.test_float8 import check_attention

INT8 = "int8_per_token_head"


def half_away(x: float) -> float:
    """The nearest integer, halves away from zero."""
    return math.copysign(math.floor(abs(x) + 0.5), x)


@pytest.mark.parametrize(("cache", "largest"), [(INT8, 127), ("fp8_per_token_head", 448)])
def test_8_bit_caches_have_one_scale_for_each_token_and_head(cache: str, largest: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 32) * torch.tensor([1e-3, 1.0, 30.0]).view(1, 3, 1, 1)
    x[0, 0, 0] = 0
    expected = x.clone()
    for row in expected.view(-1, 32):
        scale = max(max(map(abs, row.tolist())) / largest, 1e-6)
        for i, number in enumerate((row / scale).tolist()):
            step = half_away(number) if cache == INT8 else float(torch.tensor(number).to(torch.float8_e4m3fn))
            row[i] = step * scale
    assert torch.allclose(rounded_per_head(x, cache), expected, rtol=1e-5, atol=1e-9)
    halves = torch.tensor([127.0, 2.5, -2.5, 0.5])
    assert rounded_per_head(halves, INT8).tolist() == [127.0, 3.0, -3.0, 1.0]
    assert rounded_per_head(halves.bfloat16(), cache).dtype == torch.bfloat16


@pytest.mark.parametrize("cache", BY_FLAG)
def test_attention_reads_the_keys_and_values_of_the_cache(cache: str) -> None:
    check_attention(cache, True, lambda q: q, lambda t: rounded_per_head(t, cache))


def test_heads_and_hardware_that_vllm_has_no_such_cache_for() -> None:
    assert cache_problems(INT8, "gptq", (), False, 80) == cache_problems(INT8, "awq", (), True, 128) == []
    assert cache_problems(INT8, "compressed_tensors", (), True) == []  # a size that the config leaves out
    assert "heads of 16: vLLM's Triton attention needs at least 32" in cache_problems(INT8, "gptq", (), True, 16)[0]
    assert "vLLM's CPU build has no such cache" in cpu_cache_problems(INT8, 128)[0]


def test_a_plan_refuses_heads_without_such_a_cache(sparse_checkpoint: Callable[[str], Path]) -> None:
    family, device = FAMILIES["llava"], Device("cuda:0", "H100", 78 * 2**30)
    big = Checkpoint.open(sparse_checkpoint("llava-hf--llava-1.5-7b-hf"), family.canonical_name)
    recipe = load_recipe("llava-w4").model_copy(update={"kv_cache": INT8})
    plan = make_plan(recipe, big, family, device)
    with pytest.raises(ServeError, match="vLLM's CPU build has no such cache"):
        refuse_plan(plan, big.config, "cpu")
    refuse_plan(plan, big.config, (9, 0))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """demo-llava with 4-bit language weights and an int8 cache."""
    recipe = load_recipe("llava-w4").adjusted(model={"repo": "demo-llava"}, calibration={"samples": 8})
    data = recipe.model_dump() | {"kv_cache": INT8}
    out = tmp_path_factory.mktemp("cache") / "artifact"
    device = choose("cpu")
    export(Recipe.model_validate(data), out=out, device=device, on_event=lambda event: None, skip_evaluation=True)
    return out


def test_an_artifact_names_a_cache_that_config_json_cannot(artifact: Path) -> None:
    config = json.loads((artifact / "config.json").read_text())
    assert config["quantization_config"]["kv_cache_scheme"] is None
    opened = Artifact.open(artifact)
    assert opened.manifest.kv_cache == opened.kv_cache == opened.rounded().kv_cache == INT8
    assert not any(name.endswith("k_scale") for name in opened.checkpoint.tensors)
    assert config["dtype"] == opened.source_config()["dtype"]
    with pytest.raises(ServeError, match="vLLM's CPU build has no such cache"):
        refuse_unservable(opened, "cpu", 1)


def test_a_manifest_names_only_caches_that_vllm_has(artifact: Path, tmp_path: Path) -> None:
    (copy := tmp_path / "copy").symlink_to(artifact)
    plain = json.loads((artifact / "mmq_manifest.json").read_text())
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in copy.iterdir():
        (broken / path.name).symlink_to(path)
    (broken / "mmq_manifest.json").unlink()
    (broken / "mmq_manifest.json").write_text(json.dumps(plain | {"kv_cache": "auto --trust-remote-code"}))
    with pytest.raises(ArtifactError, match="kv_cache"):
        Artifact.open(broken)


@pytest.mark.parametrize(
    ("given", "expected"), [((), [INT8]), (("--", "--kv-cache-dtype", "fp8"), ["fp8"])], ids=["own", "user's"]
)
def test_serving_asks_vllm_for_the_cache(artifact: Path, given: tuple[str, ...], expected: list[str]) -> None:
    done = CliRunner().invoke(cli, ["serve", str(artifact), "--print", *given])
    assert done.exit_code == 0, done.output
    words = done.stdout.split()
    assert [words[i + 1] for i, word in enumerate(words) if word == "--kv-cache-dtype"] == expected


def test_the_script_for_machines_without_mmq_asks_for_it_too(artifact: Path, tmp_path: Path) -> None:
    fake = tmp_path / "vllm"
    fake.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    fake.chmod(0o755)
    script = Path(__file__).resolve().parent.parent / "serving" / "launch.sh"
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(script), str(artifact), "--enforce-eager"]
    words = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.splitlines()
    assert words[words.index("--kv-cache-dtype") + 1] == INT8
    assert words[-1] == "--enforce-eager"


class LaunchReached(Exception):
    """Ends a check or a speed measurement where it would start vLLM."""


@pytest.mark.parametrize("module", [check, speed], ids=["check", "bench"])
def test_checks_and_speed_measurements_ask_for_it(
    module: ModuleType, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(*args: object, kv_cache: str | None = None, **more: object) -> None:
        raise LaunchReached(kv_cache)

    monkeypatch.setattr(module, "launch", launch)
    settings = {"program": Program("vllm", "0.32.0", cpu=False), "tensor_parallel": 1, "extra": ()}
    request = SimpleNamespace(artifact=artifact, sources=(), **settings)
    starts = {
        check: lambda: check._run_engine(artifact, Artifact.open(artifact), [], request, tmp_path / "log"),
        speed: lambda: speed._in_vllm(request, lambda event: None, str(artifact)),
    }
    with pytest.raises(LaunchReached, match=INT8):
        starts[module]()


def test_the_card_names_the_cache_and_its_flag(artifact: Path) -> None:
    text = render("me/mine", read_place(str(artifact)), CardDeclarations(), (), "")
    assert "The scores hold for a KV cache of 8 bits" in text
    assert text.count(f"--kv-cache-dtype {INT8}") == 3  # vllm serve, docker, and the sentence
