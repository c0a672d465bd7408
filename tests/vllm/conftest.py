"""Tests that need a real vLLM: MMQ_VLLM names its program (`serving/cpu/install.sh DIR` makes one)."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporter.checkpoint import Checkpoint
from exporter.device import choose
from exporter.export import export
from exporter.families import FAMILIES
from exporter.recipe_file import load_recipe
from exporter.runtime.launch import Program, find_program, launch
from exporter.runtime.vllm_engine import Engine, free_port


@pytest.fixture(scope="session")
def program() -> Program:
    """The installed vLLM."""
    if not os.environ.get("MMQ_VLLM"):
        pytest.skip("MMQ_VLLM is not set")
    return find_program()


@pytest.fixture(scope="session")
def engine_python(program: Program) -> str:
    """The interpreter that has vllm and the openai client."""
    return Path(program.path).read_text(encoding="utf-8").partition("\n")[0].removeprefix("#!").strip()


@pytest.fixture(scope="session")
def artifact(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, exported by the recipe that is also served on a CPU."""
    recipe = load_recipe("llava-w4-vit8a8").adjusted(model={"repo": "demo-llava"})
    out = tmp_path_factory.mktemp("served") / "demo-llava-w4-vit8a8"
    export(recipe, out=out, device=choose("cpu"), on_event=lambda event: None, skip_evaluation=True)
    return out


@pytest.fixture(scope="session")
def engine(program: Program, artifact: Path) -> Iterator[Engine]:
    """A server of the artifact, as `mmq serve` starts it."""
    config = Checkpoint.open(artifact).config
    made = launch(artifact, config, program, port=free_port(), fallback_prompt=FAMILIES["llava"].fallback_prompt)
    with Engine(made, artifact.with_name("engine.log")) as running:
        running.wait_healthy(300)
        yield running
