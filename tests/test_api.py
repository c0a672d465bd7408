"""The Python API: names, types, the page's examples, and errors of its own."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import exporter
from exporter import api, api_artifacts
from exporter.artifact.artifact import Artifact
from exporter.device import choose
from exporter.errors import DataError, MmqError, PlanError, PublishError, RecipeError
from exporter.evaluation.report_file import Report
from exporter.events import Event
from exporter.planning.recipe import Recipe
from exporter.serving.comparison import CheckSettings

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reference" / "python-api.md"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
FUNCTIONS = sorted(name for name in exporter.__all__ if name.islower())
TYPES = sorted(set(exporter.__all__) - set(FUNCTIONS))

IN_A_FRESH_INTERPRETER = """
import sys, types
import exporter
assert not {"torch", "transformers"} & sys.modules.keys()
assert set(exporter.__all__) <= set(dir(exporter))
for _ in range(2):  # the first use of a name must not replace it by the module that it loads
    for name in exporter.__all__:
        found = getattr(exporter, name)
        assert callable(found) and not isinstance(found, types.ModuleType), name
        scope = {}
        exec(f"from exporter import {name}", scope)
        assert scope[name] is found, name
assert "transformers" not in sys.modules
try:
    exporter.nonsense
except AttributeError as error:
    assert "nonsense" in str(error)
else:
    raise AssertionError("any name is an attribute")
"""


def test_every_name_is_importable_and_no_module_in_a_fresh_interpreter() -> None:
    command = [sys.executable, "-c", IN_A_FRESH_INTERPRETER]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_no_name_is_also_that_of_a_submodule() -> None:
    modules = {path.stem for path in (ROOT / "exporter").iterdir()}
    assert set(exporter.__all__) & modules == set()
    assert exporter.__all__ == api.__all__
    assert FUNCTIONS == ["check", "evaluate", "export", "load_recipe", "open_artifact", "plan", "publish", "verify"]


def test_type_checkers_see_functions_with_types(tmp_path: Path) -> None:
    lines = [f"reveal_type({name})" for name in FUNCTIONS]
    imported = f"from exporter import {', '.join(exporter.__all__)}"
    (tmp_path / "use.py").write_text("\n".join([imported, *lines, "from exporter import nonsense"]))
    command = [sys.executable, "-m", "mypy", "--config-file=", "--no-site-packages", "--ignore-missing-imports"]
    command += ["--follow-imports=silent", "--cache-dir", str(tmp_path / "cache"), "use.py"]
    environment = {**ENVIRONMENT, "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    types = re.findall(r'Revealed type is "(.*)"', done.stdout)
    results = {name: text.rpartition(" -> ")[2] for name, text in zip(FUNCTIONS, types, strict=True)}
    assert all(text.startswith("def (") for text in types), done.stdout
    assert not any("Any" in text for text in types), done.stdout
    assert results == {
        "check": "exporter.serving.check.CheckResult",
        "evaluate": "exporter.evaluation.report_file.Report",
        "export": "exporter.pipeline.export.Export",
        "load_recipe": "exporter.planning.recipe.Recipe",
        "open_artifact": "exporter.evaluation.opened_artifact.OpenedArtifact",
        "plan": "exporter.planning.plan.Plan",
        "publish": "exporter.publishing.upload.Publication",
        "verify": "exporter.artifact.verify.Verification",
    }
    assert "recipe: str | pathlib.Path | exporter.planning.recipe.Recipe" in types[FUNCTIONS.index("export")]
    assert '"exporter" has no attribute "nonsense"' in done.stdout


def examples() -> list[str]:
    """The examples of the page, in order."""
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The names after the examples of the page ran one after another in an empty folder; `folder` is that folder."""
    folder = tmp_path_factory.mktemp("api")
    scope: dict[str, object] = {"__name__": "example", "folder": folder}
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.delenv("MMQ_VLLM", raising=False)
        patched.setenv("PATH", str(folder))  # no vllm: the real one has tests of its own
        for i, example in enumerate(examples()):
            exec(compile(example, f"example {i + 1} of {PAGE.name}", "exec"), scope)
    return scope


def test_the_examples_of_the_page_run(worked: dict[str, object]) -> None:
    assert set(FUNCTIONS) <= {name for example in examples() for name in re.findall(r"[a-z_]+(?=\()", example)}
    assert isinstance(worked["report"], Report)
    assert {measure.samples for measure in worked["report"].measures} == {16}
    assert isinstance(worked["published"], exporter.Publication)
    assert worked["published"].commit == ""
    assert worked["published"].files > 5
    assert "checked" not in worked  # there is no vllm


def test_tensors_of_an_opened_artifact_are_those_of_the_artifact(worked: dict[str, object]) -> None:
    folder = Path(str(worked["folder"])) / "artifacts" / "demo"
    opened, artifact = exporter.open_artifact(folder), Artifact.open(folder)
    assert list(opened) == artifact.names()
    assert len(opened) == len(set(opened)) > 50
    packed = next(iter(artifact.manifest.linears))
    assert torch.equal(opened[f"{packed}.weight"], artifact.linear(packed).dequantize())
    assert opened[f"{packed}.weight"].dtype == torch.float32
    unquantized = next(name for name in opened if name.endswith("norm.weight"))
    assert torch.equal(opened[unquantized], artifact.checkpoint.read(unquantized))
    assert f"{packed}.weight_packed" not in opened  # a stored name
    with pytest.raises(KeyError):
        opened[f"{packed}.weight_packed"]
    assert (opened.manifest, opened.report) == (artifact.manifest, worked["report"])


def test_a_shorter_evaluation_keeps_the_report_and_says_so(worked: dict[str, object]) -> None:
    folder, events = Path(str(worked["folder"])) / "artifacts" / "demo", list[Event]()
    report = exporter.evaluate(folder, eval_samples=4, device=choose("cpu"), on_event=events.append)
    assert {measure.samples for measure in report.measures} == {4}
    assert exporter.open_artifact(folder).report == worked["report"]
    assert "the artifact keeps its report" in events[-1].message


def test_publishing_lists_what_is_not_proven(worked: dict[str, object]) -> None:
    with pytest.raises(PublishError, match="not resolved"):
        exporter.publish(Path(str(worked["folder"])) / "artifacts" / "demo", "me/x", dry_run=True, device="cpu")


def test_a_check_gets_its_arguments(worked: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[CheckSettings, int, bool]] = []
    monkeypatch.setattr(api_artifacts, "program_for", lambda folder, vllm: vllm)
    monkeypatch.setattr(
        api_artifacts,
        "check_artifact",
        lambda _, samples, session, control: calls.append((session, len(samples), control)),
    )
    folder = Path(str(worked["folder"])) / "artifacts" / "demo"
    for control in (True, False, "language"):
        exporter.check(folder, vllm="v", questions=3, control=control, flags=["--x"], wait=5, device="cpu")  # type: ignore[arg-type]
    assert [(session.disturb, count, device) for session, count, device in calls] == [
        (None, 3, True),
        (None, 3, False),
        ("language", 3, True),
    ]
    assert {(str(s.program), s.extra, s.start_seconds, s.bound, s.logs) for s, _, _ in calls} == {
        ("v", ("--x",), 5, 0.015, None)
    }


def test_plan_takes_a_name_a_path_or_a_recipe() -> None:
    recipe = exporter.load_recipe("llava-w8")
    assert isinstance(recipe, Recipe)
    path = ROOT / "recipes" / "llava-w8.yaml"
    plans = [
        exporter.plan(argument, model="demo-llava", device="cpu") for argument in (recipe, "llava-w8", path, str(path))
    ]
    assert {plan.bytes_after for plan in plans} == {plans[0].bytes_after}
    assert {plan.recipe.digest() for plan in plans} == {plans[0].recipe.digest()}


WRONG: dict[str, tuple[Callable[[], object], type[MmqError], str]] = {
    "a value that a recipe does not allow": (
        lambda: exporter.plan("llava-w8", model="demo-llava", samples=-1),
        RecipeError,
        "samples",
    ),
    "hardware": (
        lambda: exporter.plan("llava-w8", model="demo-llava", device="cpu", serve_on="banana"),
        PlanError,
        "unknown hardware 'banana'",
    ),
    "a device": (lambda: exporter.plan("llava-w8", model="demo-llava", device="tpu"), PlanError, "tpu"),
    "a recipe": (lambda: exporter.load_recipe("llava-w9"), RecipeError, "Did you mean"),
    "a data source": (lambda: exporter.export("llava-w8", model="demo-llava", data="cocoa:/x"), DataError, "cocoa"),
    "a folder": (lambda: exporter.open_artifact("nothing-here"), MmqError, "has no mmq_manifest.json"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_argument_is_an_error_that_says_what_to_do(wrong: str) -> None:
    call, kind, words = WRONG[wrong]
    with pytest.raises(kind, match=words):
        call()


def test_a_check_of_no_questions_is_refused(worked: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_artifacts, "program_for", lambda folder, vllm: vllm)
    with pytest.raises(DataError, match="compares nothing"):
        exporter.check(Path(str(worked["folder"])) / "artifacts" / "demo", questions=0, device="cpu")
