"""A real vLLM serves the demo BLIP-2 with its Q-Former and projection packed, through the plugin, and is checked."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from exporter.device import choose
from exporter.export import export
from exporter.recipe import Recipe
from exporter.runtime.launch import Program

ROWS = {"method": "rtn", "bits": 8, "group_size": "row", "activations": "int8"}
RULES = (
    ROWS | {"component": "vision"},
    ROWS | {"component": "qformer", "store": "plugin"},
    ROWS | {"component": "projector", "store": "plugin"},
    {"component": "language", "method": "rtn", "bits": 4, "group_size": 32},
)


@pytest.fixture(scope="module")
def packed(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data: dict[str, Any] = {
        "name": "packed-qformer",
        "summary": "every component packed",
        "model": {"repo": "demo-blip2", "family": "blip2"},
        "quantize": RULES,
        "gates": [{"task": task, "metric": metric, "max_drop": 0.9} for task, metric in (("vqa", "accuracy"),)],
        "evidence": [{"finding": "a test", "figures": "none", "source": "tests/vllm/test_blip2.py"}],
    }
    out = tmp_path_factory.mktemp("blip2") / "demo-blip2-packed"
    recipe = Recipe.model_validate(data)
    export(recipe, out=out, device=choose("cpu"), on_event=lambda event: None, skip_evaluation=True)
    return out


def test_a_packed_qformer_answers_as_the_reference_and_doubling_its_scales_shows(packed: Path, program: Program):
    command = [str(Path(sys.executable).with_name("mmq")), "check", str(packed), "--vllm", program.path, "--json"]
    done = subprocess.run([*command, "--questions", "8", "--control", "qformer"], capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[0])
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert found["schemes"] == {"CompressedTensorsW8A8Int8": 35, "CompressedTensorsWNA16": 8}
    assert found["control"]["component"] == "qformer"
    assert found["control"]["moved"]["mean"] > 20 * found["compared"]["distance"]["mean"]
