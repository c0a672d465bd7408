"""A real vLLM in `mmq check` and `mmq export --serve-check`: right artifacts pass, a wrong engine does not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import load_recipe
from exporter.serving.launch import Program
from tests.vllm.conftest import RECIPES
from tests.vllm.served import ONE_PROCESS_LESS, mmq

ROWS = {"method": "rtn", "bits": 8, "group_size": "row", "activations": "int8"}
PACKED = {
    "name": "packed-qformer",
    "summary": "every component packed",
    "model": {"repo": "demo-blip2", "family": "blip2"},
    "quantize": [
        ROWS | {"component": "vision"},
        ROWS | {"component": "qformer", "store": "plugin"},
        ROWS | {"component": "projector", "store": "plugin"},
        {"component": "language", "method": "rtn", "bits": 4, "group_size": 32},
    ],
    "gates": [{"task": "vqa", "metric": "accuracy", "max_drop": 0.9}],
    "evidence": [{"finding": "a test", "figures": "none", "source": "tests/vllm/test_check.py"}],
}
# Serves a copy whose every scale of one linear is a tenth too large, as an engine would that computes wrongly.
WRONG_ENGINE = """#!{python}
import os, shutil, sys, tempfile
from pathlib import Path
from safetensors.torch import load_file, save_file

source = Path(sys.argv[2])
copy = Path(tempfile.mkdtemp(dir={scratch!r})) / source.name
shutil.copytree(source, copy)
name = "language_model.model.layers.1.mlp.down_proj.weight_scale"
path, = [path for path in copy.glob("*.safetensors") if name in load_file(path)]
tensors = load_file(path)
tensors[name] = tensors[name] * 1.1
save_file(tensors, path, {{"format": "pt"}})
os.execv({vllm!r}, [{vllm!r}, sys.argv[1], str(copy), *sys.argv[3:]])
"""


def stored_check(artifact: Path) -> tuple[Any, Any]:
    """What report and manifest say of serving."""
    return tuple(json.loads((artifact / f"mmq_{name}.json").read_text())["serving"] for name in ("report", "manifest"))


def proven(result: dict[str, Any]) -> bool:
    """The control moved the answers much further than the engine differs."""
    return bool(result["control"]["moved"]["mean"] > 20 * result["compared"]["distance"]["mean"])


def test_an_export_with_serve_check_is_served_and_says_so(serving_program: Program, tmp_path: Path):
    out = tmp_path / "llava"
    arguments = ["--recipe", RECIPES["demo-llava"], "--model", "demo-llava", "--skip-evaluation", "--out", str(out)]
    done = mmq("export", *arguments, "--serve-check", "--vllm", serving_program.path, "--json")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["passed"]
    assert result["schemes"] == {"CompressedTensorsW8A8Int8": 8, "CompressedTensorsWNA16": 8}
    assert proven(result)
    report, manifest = stored_check(out)
    assert len(report.pop("weights")) == 64  # of the files that were served
    assert report == result
    assert manifest == {"engine": f"vllm {serving_program.version}", "build": "cpu", "passed": True}
    page = tmp_path / "page.html"
    report_run = mmq("report", str(out), "--out", str(page))
    assert report_run.returncode == 0, report_run.stderr
    assert f"vllm {serving_program.version}, cpu build" in page.read_text()


def test_a_packed_qformer_answers_as_the_reference_and_doubling_its_scales_shows(
    program: Program, exported: Callable[[Recipe], Path]
):
    artifact = exported(Recipe.model_validate(PACKED))
    control = ["--questions", "8", "--control", "qformer"]
    done = mmq("check", str(artifact), "--vllm", program.path, "--json", *control, environment=ONE_PROCESS_LESS)
    result = json.loads(done.stdout.splitlines()[0])
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert result["schemes"] == {"CompressedTensorsW8A8Int8": 35, "CompressedTensorsWNA16": 8}
    assert result["control"]["component"] == "qformer"
    assert proven(result)


@pytest.mark.parametrize(("format_name", "symmetric"), [("gptq", True), ("awq", False)])
def test_artifacts_in_the_formats_of_autogptq_and_autoawq_answer_as_the_reference(
    format_name: str, symmetric: bool, program: Program, exported: Callable[[Recipe], Path]
):
    data = load_recipe("llava-w4").model_dump() | {"name": f"as-{format_name}", "format": format_name}
    rule = {"component": "language", "method": "rtn", "bits": 4, "group_size": 128, "symmetric": symmetric}
    artifact = exported(Recipe.model_validate(data | {"quantize": [rule]}).adjusted(model={"repo": "demo-llava"}))
    arguments = [str(artifact), "--vllm", program.path, "--json", "--no-control", "--questions", "8"]
    done = mmq("check", *arguments, environment=ONE_PROCESS_LESS)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[0])
    assert result["passed"]
    assert any("CPUWNA16LinearKernel" in kernel for kernel in result["kernels"])


@pytest.fixture
def wrong_engine(program: Program, engine_python: str, tmp_path: Path) -> str:
    path = tmp_path / "vllm"
    path.write_text(WRONG_ENGINE.format(python=engine_python, scratch=str(tmp_path), vllm=program.path))
    path.chmod(0o755)
    return str(path)


def test_an_engine_that_computes_wrongly_fails_and_that_is_kept(exported: Callable[[Recipe], Path], wrong_engine: str):
    artifact = exported(load_recipe(RECIPES["demo-llava"]).adjusted(model={"repo": "demo-llava"}))
    arguments = [str(artifact), "--vllm", wrong_engine, "--no-control", "--questions", "8"]
    done = mmq("check", *arguments, environment=ONE_PROCESS_LESS)
    assert done.returncode == 3, done.stdout + done.stderr[-3000:]
    assert "log-probabilities are too far from the reference: mean" in done.stderr
    assert "Traceback" not in done.stderr
    report, manifest = stored_check(artifact)
    assert not report["passed"]
    assert not manifest["passed"]
