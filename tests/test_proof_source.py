"""The source's digest follows from artifact and manifest for every dtype of source and recipe.

The proof refuses artifacts for which it does not, so unedited ones of all kinds must pass.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.artifact.artifact import Artifact
from exporter.device import choose
from exporter.dtypes import BFLOAT16, FLOAT16
from exporter.events import Event, ignore
from exporter.model.embedded import MODELS
from exporter.pipeline.export import export
from exporter.pipeline.preparation import prepare
from exporter.planning.recipe_file import load_recipe
from exporter.publishing.artifact_summary import folder_reader, read_summary
from exporter.publishing.proof.files import file_problems
from exporter.publishing.proof.plan import plan_problems
from tests.slow import some

DEMO = MODELS["demo-llava"]
CACHE = "llava-fp8-vit16-cache8"


def model(folder: Path, stored_as: torch.dtype, **config: Any) -> Path:
    """demo-llava with tensors of another dtype; `text_config__x` is `x` of `text_config`; None removes a key."""
    shutil.copytree(DEMO, folder)
    stored = {name: tensor.to(stored_as) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    plain = json.loads((folder / "config.json").read_text())
    for path, value in config.items():
        place, _, key = path.rpartition("__")
        holder = plain[place] if place else plain
        holder.pop(key, None)
        holder |= {} if value is None else {key: value}
    (folder / "config.json").write_text(json.dumps(plain))
    return folder


CASES: dict[str, tuple[str, dict[str, Any], torch.dtype, dict[str, Any]]] = {
    "16 bits": ("llava-w4", {}, torch.bfloat16, {}),
    "a float8 cache": (CACHE, {}, torch.bfloat16, {}),
    "a float8 cache, float16": (CACHE, {}, torch.float16, {"dtype": "float16"}),
    "a float8 cache, dtypes of parts": (
        CACHE,
        {},
        torch.float16,
        {"dtype": None, "torch_dtype": "float16", "text_config__dtype": "float16", "vision_config__dtype": "float32"},
    ),
    "a float8 cache, no dtype": (CACHE, {}, torch.bfloat16, {"dtype": None}),
    "float32": ("llava-w4", {}, torch.float32, {"dtype": "float32"}),
    "float32 as float16": ("llava-w4", {"dtype": "float16"}, torch.float32, {"dtype": "float32"}),
    "float32 and a float8 cache": (CACHE, {}, torch.float32, {"dtype": "float32"}),
    "odd keys": ("llava-w4", {}, torch.bfloat16, {"_name_or_path": "\u00fc\u2028", "tiny": 1e-30, "large": 10**25}),
}  # fmt: skip
FAST = ("16 bits", "float32 as float16", "odd keys", "a float8 cache, dtypes of parts", "float32 and a float8 cache")


@pytest.mark.parametrize("case", some(CASES, FAST))
def test_unedited_artifacts_do_not_contradict_their_source(tmp_path: Path, case: str) -> None:
    recipe, read, dtype, config = CASES[case]
    folder = model(tmp_path / "model", dtype, **config)
    job = load_recipe(recipe).adjusted(model={"repo": str(folder), **read}, calibration={"samples": 2})
    export(job, out=tmp_path / "out", device=choose("cpu"), on_event=ignore, skip_evaluation=True)
    summary, artifact = read_summary("out", folder_reader(tmp_path / "out")), Artifact.open(tmp_path / "out")
    assert plan_problems(summary, artifact) == []
    assert file_problems(artifact) == []


def test_float16_is_read_as_the_bfloat16_in_which_it_is_served(tmp_path: Path) -> None:
    """vLLM loads float16 scales as bfloat16 here, so they must be bfloat16 before codes are computed."""
    folder = model(tmp_path / "model", torch.float16, dtype="float16")
    job = load_recipe(CACHE).adjusted(model={"repo": str(folder)})
    plan, checkpoint = prepare(job, choose("cpu"))
    assert {info.dtype for info in checkpoint.tensors.values()} == {BFLOAT16}
    assert any("float16 tensors as bfloat16: vLLM's kernels" in warning for warning in plan.warnings)
    plain, unchanged = prepare(load_recipe("llava-w4").adjusted(model={"repo": str(folder)}), choose("cpu"))
    assert {info.dtype for info in unchanged.tensors.values()} == {FLOAT16}
    assert not any("as bfloat16" in warning for warning in plain.warnings)
    events: list[Event] = []
    result = export(job, out=tmp_path / "out", device=choose("cpu"), on_event=events.append, skip_evaluation=True)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16, torch.float8_e4m3fn}
    assert result.verified.blocks  # compressed-tensors reads the weights that mmq computed
