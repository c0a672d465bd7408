"""Parts of commands without a model: next steps, options that are not understood, tables of plans, and errors."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner
from rich.table import Table

from exporter import amounts
from exporter.commands import (
    datasets,
    doctor,
    fitted_table,
    options,
    plan_tables,
    recipe_options,
    serve,
    serving_text,
    steps_after,
)
from exporter.commands.allocate import ByteSize
from exporter.data import CONVENTIONS, LAYOUTS
from exporter.device import Device
from exporter.errors import CheckFailed, DataError, Interrupted, MemoryShortage, ServeError
from exporter.numerics.kv_caches import BY_FLAG
from exporter.serving.launch import Launch
from exporter.study.prepare import default_folder

# Next steps


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Whether the artifact is measured and served, its tasks, and whether vLLM is installed; commands are short."""
    state = SimpleNamespace(measured=False, family=SimpleNamespace(unserved="", tasks=("vqa",)), vllm=True)
    monkeypatch.setattr(steps_after, "command", lambda *words: " ".join(map(str, words)))
    monkeypatch.setattr(steps_after, "has_vllm", lambda: state.vllm)
    monkeypatch.setattr(steps_after, "_state", lambda artifact: (state.measured, state.family))
    monkeypatch.setattr(steps_after, "PICTURE", "P")
    monkeypatch.setattr(steps_after, "QUESTION", "Q")
    return state


def test_an_artifact_is_measured_before_it_is_used(machine: SimpleNamespace) -> None:
    out = Path("out")
    assert steps_after.after_verify(out) == ["evaluate out"]
    machine.measured = True
    assert steps_after.after_verify(out) == ["ask out P Q", "serve out"]
    machine.vllm = False
    assert steps_after.after_verify(out) == ["ask out P Q"]
    machine.vllm, machine.family.unserved, machine.family.tasks = True, "no engine", ("retrieval",)
    assert steps_after.after_verify(out) == []


def test_after_an_evaluation_vllm_is_compared_or_a_question_asked(machine: SimpleNamespace) -> None:
    out = Path("out")
    assert steps_after.after_evaluate(out, ["mine"]) == ["report out --data mine", "check out"]
    machine.vllm = False
    assert steps_after.after_evaluate(out, []) == ["report out", "ask out P Q"]
    machine.vllm, machine.family.unserved = True, "no engine"
    assert steps_after.after_evaluate(out, []) == ["report out", "ask out P Q"]
    assert steps_after.after_baseline(out, ["a", "b"]) == [
        "serve out",
        "evaluate out --server http://127.0.0.1:8000 --data a --data b",
    ]
    assert steps_after.after_check(out, None) == ["bench out", "report out"]
    assert steps_after.after_check(out, "my vllm") == ["bench out --vllm my vllm", "report out"]


def test_after_a_difference_each_artifact_has_its_step(machine: SimpleNamespace) -> None:
    assert steps_after.after_diff(["a", "hub:me/x", "a"]) == ["evaluate a", "verify hub:me/x"]
    machine.measured = True
    assert steps_after.after_diff(["a"]) == ["report a"]


def test_after_a_question_the_source_is_asked_too(
    machine: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context: Any = None
    monkeypatch.setattr(steps_after, "given", lambda context: ["ask", "as before"])
    recipes = ["llava-w4"]
    monkeypatch.setattr("exporter.pipeline.data_coverage.first_recipe", lambda model: recipes[0])
    assert steps_after.after_ask(context, "org/x", False, None) == ["plan --recipe llava-w4 --model org/x"]
    recipes[0] = ""
    assert steps_after.after_ask(context, "org/x", False, None) == []
    (tmp_path / "mmq_manifest.json").touch()
    name = str(tmp_path)
    measure = f"evaluate {tmp_path}"
    assert steps_after.after_ask(context, name, False, None) == ["ask as before --compare", measure]
    assert steps_after.after_ask(context, name, True, None) == [measure]
    assert steps_after.after_ask(context, name, False, "http://a") == [measure]
    machine.measured = True
    assert steps_after.after_ask(context, name, True, None) == [f"report {tmp_path}"]


@pytest.mark.parametrize(
    ("sizes", "size"),
    [
        ([1000, 5000], "3kB"),
        ([9_999_998, 10_000_000], "9999kB"),
        ([8_000_000, 12_000_000], "10MB"),
        ([4_000_000_000, 6_000_000_001], "5000MB"),
    ],
)
def test_after_a_study_bits_are_chosen_for_the_middle_of_its_sizes(
    sizes: list[int], size: str, machine: SimpleNamespace
) -> None:
    outcome: Any = SimpleNamespace(settings=[SimpleNamespace(bytes=bytes) for bytes in (*sizes, sizes[0])])
    given: dict[str, Any] = {"out": None, "model": "org/x", "data": (), "revision": None, "tasks": ()}
    plots = f"study plots {default_folder('org/x')}"
    words = f"allocate --model org/x --max-size {size}"
    assert steps_after.after_study(outcome, given) == [plots, words]
    changed = given | {"out": Path("o"), "revision": "r", "data": ("d",), "tasks": ("vqa",)}
    assert steps_after.after_study(outcome, changed) == [
        "study plots o",
        f"{words} --data d --task vqa --revision r --folder o",
    ]
    outcome.settings = outcome.settings[:1]
    assert steps_after.after_study(outcome, given) == [plots]


def test_a_command_is_repeated_as_it_was_given() -> None:
    words: list[list[str]] = []

    @click.command()
    @click.argument("model")
    @click.option("--data", "-d", multiple=True)
    @click.option("--count", type=int, default=3)
    @click.option("--plain", is_flag=True)
    @click.option("--device", default="auto")
    @click.pass_context
    def run(context: click.Context, **values: Any) -> None:
        words.append(steps_after.given(context, without={"device"}))

    run.main(["-d", "a", "m", "--plain", "--device", "cpu", "--data", "b"], prog_name="run", standalone_mode=False)
    run.main(["m", "--count", "3"], prog_name="run", standalone_mode=False)
    assert words == [["run", "m", "--data", "a", "--data", "b", "--plain"], ["run", "m", "--count", "3"]]


def test_a_page_is_opened_by_its_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps_after.sys, "executable", "/my python/bin/python")
    page = tmp_path / "my page.html"
    assert steps_after.open_page(page) == f"'/my python/bin/python' -m webbrowser -t {tmp_path.as_uri()}/my%20page.html"


# Options of recipes


CONTEXT: Any = None


def option(name: str, metavar: str) -> Any:
    return SimpleNamespace(name=name, metavar=metavar)


def test_numbers_by_name() -> None:
    bits = option("bits", "COMPONENT=BITS")
    assert recipe_options.parse_numbers_by_name(CONTEXT, bits, (" vision=8", "language=3")) == {
        "vision": 8,
        "language": 3,
    }
    for text in ("vision", "=3", "vision=three", "vision="):
        with pytest.raises(click.BadParameter, match=f"expected COMPONENT=BITS like language=3, not '{text}'"):
            recipe_options.parse_numbers_by_name(CONTEXT, bits, ("language=4", text))
    with pytest.raises(click.BadParameter, match="given twice for vision"):
        recipe_options.parse_numbers_by_name(CONTEXT, bits, ("vision=8", "vision=4"))
    with pytest.raises(click.BadParameter, match="given twice for the whole recipe"):
        recipe_options.parse_group_sizes(CONTEXT, option("group_size", "SIZE"), ("64", "row"))


def test_group_sizes() -> None:
    def sizes(*values: str) -> Any:
        return recipe_options.parse_group_sizes(CONTEXT, option("group_size", "SIZE"), values)

    assert sizes() is None
    assert [sizes(text) for text in ("64", "row", "tensor", "128,row", "64,keep")] == [
        64,
        "row",
        "tensor",
        (128, "row"),
        (64, "keep"),
    ]
    assert sizes("language=64", "vision=row") == {"language": 64, "vision": "row"}
    with pytest.raises(click.BadParameter, match="give one size for the whole recipe"):
        sizes("64", "vision=row")
    for text in ("large", "128,", "128,all", "row,keep", "x,row"):
        with pytest.raises(click.BadParameter, match=f"a number with ,row or ,keep, not '{text}'"):
            sizes(text)


def test_prompts_have_their_task() -> None:
    parameter = option("prompts", "TASK=TEXT")
    assert recipe_options.parse_prompts(CONTEXT, parameter, ("vqa=a=b", "captioning=c")) == {
        "vqa": "a=b",
        "captioning": "c",
    }
    with pytest.raises(click.BadParameter, match=r"expected TASK=TEXT like captioning='Describe the image\.', not 'x'"):
        recipe_options.parse_prompts(CONTEXT, parameter, ("x",))


def test_a_missing_recipe_lists_those_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.planning.fitting_recipes.recipes_for", lambda model: ["a", str(model)])
    context = click.Context(click.Command("x"))
    parameter: Any = None
    context.params = {"model": "org/x"}
    name = options.RecipeName()
    assert name.get_missing_message(parameter, context).startswith("Recipes for org/x: a, org/x; `")
    context.params = {}
    assert name.get_missing_message(parameter, context).startswith("Recipes: a, None; `")
    assert name.get_missing_message(parameter, context).endswith(" recipes` describes them")
    with context:
        assert name.get_missing_message(parameter).startswith("Recipes: a, None; `")


# Errors


def test_errors_become_messages_and_other_faults_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MMQ_DEBUG", raising=False)

    def ended(error: BaseException) -> tuple[int, str]:
        def command(**values: Any) -> None:
            raise error

        with pytest.raises(SystemExit) as caught:
            options.reports_errors_without_torch(command)(device="cpu")
        return int(str(caught.value.code)), capsys.readouterr().err

    assert ended(DataError("no file", "look"))[0] == 1
    assert ended(Interrupted("half done")) == (130, ended(Interrupted("half done"))[1])
    assert ended(KeyboardInterrupt())[0] == 130
    with pytest.raises(ZeroDivisionError):
        ended(ZeroDivisionError())
    monkeypatch.setenv("MMQ_DEBUG", "1")
    with pytest.raises(DataError):
        ended(DataError("no file"))


def test_a_shortage_is_recognized_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(options._bare_shortage(MemoryError()), MemoryShortage)
    assert options._bare_shortage(ValueError()) is None
    error, short = DataError("x"), MemoryShortage("y")
    monkeypatch.delitem(__import__("sys").modules, "torch")
    assert options._message(error, "cpu") is error
    assert options._message(short, "cpu") is short
    assert isinstance(options._message(MemoryError(), "cpu"), MemoryShortage)
    assert options._message(ValueError(), "cpu") is None


# Tables of plans


def row(name: str, component: str = "language", decision: str = "packed", reason: str = "", bytes: int = 8) -> Any:
    scheme = SimpleNamespace(label=lambda: "W4 g128") if decision == "packed" else None
    rule = SimpleNamespace(method="gptq") if decision == "packed" else None
    tensor = SimpleNamespace(name=name, size=4, bytes=bytes, shape=(2, 2))
    return SimpleNamespace(
        tensor=tensor, component=component, decision=decision, scheme=scheme, rule=rule, reason=reason, bytes_after=3
    )


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(plan_tables, "serving_kernels", lambda scheme, form: SimpleNamespace(label=lambda: "kernel M"))
    monkeypatch.setattr(plan_tables, "prompts_by_task", lambda family: {"vqa": {}})
    monkeypatch.setattr(plan_tables, "prompts_line", lambda prompts: f"of {', '.join(prompts)}")
    components = [SimpleNamespace(name=name) for name in ("vision", "language")]
    recipe = SimpleNamespace(
        name="mine", format="gptq", kv_cache=None, prompts={}, max_new_tokens={}, overrides={}, changes=lambda: "bits"
    )
    rows = [
        row("embedding", "", "kept", "embedding", 100),
        row("l.norm", decision="kept", reason="norm"),
        row("l.q"),
        row("l.k"),
        row("l.odd", decision="kept", reason="its inputs"),
        row("v.q", "vision"),
    ]
    family = SimpleNamespace(components=components, unserved="")
    values = {"rows": rows, "family": family, "recipe": recipe, "origin": "org/x", "bits_per_weight": 4.256}
    return SimpleNamespace(**values, bytes_before=140, bytes_after=18)


def test_a_plan_is_summarized_by_component_and_decision(plan: Any) -> None:
    lines = plan_tables.plan_summary(plan)
    assert [(line["component"], line["decision"], line["tensors"], line["why"]) for line in lines] == [
        ("vision", "packed", 1, "kernel M"),
        ("language", "packed", 2, "kernel M"),
        ("language", "kept", 2, "its inputs; norm"),
        ("(rest)", "kept", 1, "embedding"),
    ]
    second = {key: lines[1][key] for key in ("scheme", "method", "parameters", "bytes_before", "bytes_after")}
    assert second == {"scheme": "W4 g128", "method": "gptq", "parameters": 8, "bytes_before": 16, "bytes_after": 6}
    plan.family.unserved = "no engine"
    assert plan_tables.plan_summary(plan)[0]["why"] == "no engine"


def test_the_notes_of_a_plan(plan: Any) -> None:
    start = [
        "4.26 bits per weight, including scales and kept tensors",
        "  vision: W4 g128, vLLM: kernel M",
        "  language: W4 g128, vLLM: kernel M",
        "  language: kept: its inputs; norm",
        "  (rest): kept: embedding",
    ]
    assert plan_tables.plan_notes(plan) == start
    plan.recipe.kv_cache, plan.recipe.prompts, plan.recipe.overrides = "fp8", {"vqa": "x"}, {"bits": "3"}
    assert plan_tables.plan_notes(plan)[5:] == [
        "  keys and values: fp8, vLLM: GPUs from 8.9 (older GPUs with FlashInfer only), CPUs with AVX-512",
        "prompts: of vqa",
        "changed in the recipe: bits",
    ]
    plan.recipe.prompts, plan.recipe.max_new_tokens = {}, {"vqa": 3}
    assert "prompts: of vqa" in plan_tables.plan_notes(plan)
    plan.family.unserved = "no engine"
    assert plan_tables.plan_notes(plan)[1] == "  vision: W4 g128, transformers: no engine"
    for flag in BY_FLAG:
        assert f"--kv-cache-dtype {flag}, which" in plan_tables._cache_engines(flag)


def cells(table: Table) -> list[tuple[str, ...]]:
    return list(zip(*(map(str, column.cells) for column in table.columns), strict=True))


def test_every_tensor_of_a_plan_has_a_line(plan: Any) -> None:
    kept, packed = plan_tables.tensor_line(plan.rows[1]), plan_tables.tensor_line(plan.rows[2])
    fields = {"shape": [2, 2], "bytes_before": 8, "bytes_after": 3}
    assert packed == fields | {
        "name": "l.q",
        "decision": "packed",
        "scheme": "W4 g128",
        "method": "gptq",
        "reason": "",
    }
    assert kept == fields | {"name": "l.norm", "decision": "kept", "scheme": None, "method": None, "reason": "norm"}
    table = plan_tables.tensor_table(plan)
    assert cells(table)[1:3] == [("l.norm", "2x2", "kept", "", "norm"), ("l.q", "2x2", "packed", "W4 g128 gptq", "")]
    assert [column.no_wrap for column in table.columns] == [True, True, True, True, False]
    total = cells(plan_tables.plan_table(plan))[-1]
    assert total == ("total", "", "", "6", "140 B", "18 B")


def test_recipes_are_a_table() -> None:
    recipe: Any = SimpleNamespace(name="a", model=SimpleNamespace(repo="org/x"), description=lambda: "words")
    table = plan_tables.recipes_table([recipe])
    assert cells(table) == [("a", "x", "words")]
    assert [column.no_wrap for column in table.columns] == [True, True, False]


def test_a_page_of_a_plan_warns_and_advises(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan.steps, plan.warnings = (), ("first",)
    monkeypatch.setattr(plan_tables, "advise", lambda recipe, available: ())
    monkeypatch.setattr(plan_tables, "unpredictable", lambda recipe: "")
    monkeypatch.setattr(plan_tables, "too_few", lambda recipe, available: (f"few {available['vqa']} samples",))
    cpu = Device("cpu", "a CPU", 2**30)

    def page(every_tensor: bool = False) -> list[Any]:
        return list(plan_tables.plan_page(plan, cpu, every_tensor, ("second",), {"vqa": 12}).renderables)  # type: ignore[attr-defined]

    warnings = ["warning: few 12 samples", "warning: first", "warning: second"]
    assert page()[-3:] == warnings
    assert sum(isinstance(part, Table) for part in page()) == 2
    assert sum(isinstance(part, Table) for part in page(every_tensor=True)) == 3
    monkeypatch.setattr(plan_tables, "advise", lambda recipe, available: ("a", "b"))
    monkeypatch.setattr(plan_tables, "unpredictable", lambda recipe: "unknown")
    assert page()[-5:] == [f"a\nb ({plan_tables.ASSUMPTION})", "unknown", *warnings]


# A table that fits


def table(*rows: tuple[str, ...], header: bool = True) -> Table:
    made = Table(show_header=header)
    for name in ("name", "why"):
        made.add_column(name, no_wrap=name == "name")
    for texts in rows:
        made.add_row(*texts)
    return made


def test_columns_narrow_at_words_until_a_table_becomes_lines() -> None:
    rows = [("abcdef", "some words of text"), ("b", "")]
    wide = fitted_table.fitted(table(*rows), 26)
    assert isinstance(wide, Table)
    assert [column.width for column in wide.columns] == [6, 18]
    narrow = fitted_table.fitted(table(*rows), 13)
    assert isinstance(narrow, Table)
    assert [column.width for column in narrow.columns] == [6, 5]
    lines = fitted_table.fitted(table(*rows), 12)
    assert str(lines).splitlines() == ["name:", "abcdef", "  why: some", "    words of", "    text", "b"]
    without = fitted_table.fitted(table(*rows, header=False), 12)
    assert str(without).splitlines() == ["abcdef", "  some words", "    of text", "b"]


def test_the_parts_of_a_page_are_fitted_with_their_titles() -> None:
    from rich.console import Group

    titled = table(("a", "b"))
    titled.title = "a long title"
    parts = list(fitted_table.fitted_parts(Group("text", titled), 9))
    assert parts[:2] == ["text", "a long\ntitle"]
    assert isinstance(parts[2], Table)
    assert parts[2].title is None


# Examples and the state of the machine


def test_the_example_of_a_model_that_answers_no_questions_is_its_caption() -> None:
    captions: Any = SimpleNamespace(text=lambda question: f"text {question}", max_new_tokens={"captioning": 40})
    assert serving_text.example(captions) == ("text None", 40)
    answers: Any = SimpleNamespace(text=lambda question: f"text {question}", max_new_tokens={"vqa": 8})
    assert serving_text.example(answers) == (f"text {serving_text.QUESTION}", 8)
    none: Any = SimpleNamespace(text=lambda question: "x", max_new_tokens={})
    assert serving_text.example(none) == ("x", 16)


def test_the_python_of_an_example_is_the_one_beside_vllm(tmp_path: Path) -> None:
    program, python = tmp_path / "vllm", tmp_path / "python"
    program.touch(mode=0o755)
    command = Launch((str(program), "serve"), {}, "u", "m")
    assert serving_text._interpreter(command) == "python"
    python.touch(mode=0o755)
    assert serving_text._interpreter(command) == str(python)
    other = program.rename(tmp_path / "other")
    assert serving_text._interpreter(dataclasses.replace(command, command=(str(other), "serve"))) == "python"
    assert serving_text._interpreter(dataclasses.replace(command, command=())) == "python"


def test_the_state_of_an_extra_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"matplotlib": "1", "scipy": "2", "shap": "3"}
    monkeypatch.setattr(doctor, "installed_version", installed.get)
    cost = doctor.EXTRAS["study"][1]
    install = doctor.install_extra("study")
    has = "matplotlib 1, scipy 2, shap 3"
    assert doctor.extra_state("study") == f"missing scikit-learn: {cost}; {install} (has {has})"
    assert doctor.extra_state("report") == "matplotlib 1"
    assert doctor.extra_state("ray").startswith("missing ray: ")
    assert "(has" not in doctor.extra_state("ray")


@pytest.mark.parametrize(
    ("capability", "driver", "is_cuda", "gpu"),
    [
        ((9, 0), "550", True, "compute capability 9.0"),
        (None, "550", True, "several compute capabilities"),
        ((9, 0), "550", False, "compute capability 9.0; torch does not see it: this torch is a CPU build, or "),
        (None, None, False, doctor.NO_GPU),
        (None, None, True, None),
    ],
)
def test_the_hardware_of_the_machine(
    capability: Any, driver: str | None, is_cuda: bool, gpu: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "capability", lambda: capability)
    monkeypatch.setattr(doctor, "driver", lambda: driver)
    lines = doctor._hardware(Device("cuda:0" if is_cuda else "cpu", "a device", 3 * 2**29))
    assert lines["device"] == "a device, 1.5 GiB free"
    assert (lines.get("gpu") or "").startswith(gpu or "")
    assert ("gpu" in lines) == (gpu is not None)
    assert lines.get("gpu driver") == (driver or ("none: no nvidia-smi that works" if gpu else None))


def test_the_state_of_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("MMQ_VLLM", raising=False)
    assert doctor.vllm_state().startswith("missing (neither MMQ_VLLM nor PATH): no `mmq serve`, no `mmq check`; ")
    program = tmp_path / "vllm"
    for version, build in (("0.32.0+cpu", "CPU"), ("0.32.0", "GPU")):
        program.write_text(f"#!/bin/sh\necho {version}\n")
        program.chmod(0o755)
        assert doctor.vllm_state() == f"{version}, {build} build, {program} (PATH)"
    monkeypatch.setenv("MMQ_VLLM", "/nowhere/vllm")
    assert doctor.vllm_state().startswith("BROKEN (MMQ_VLLM): the program '/nowhere/vllm' does not exist; ")


# The check before and after an export


def test_a_check_with_problems_is_an_error_that_lists_twenty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = tuple(f"problem {i}" for i in range(25))
    result = SimpleNamespace(passed=False, problems=problems)

    @contextmanager
    def silent(as_json: bool) -> Iterator[Any]:
        yield lambda event: None

    monkeypatch.setattr("exporter.pipeline.serving_check.program_for", lambda artifact, vllm: "vllm")
    monkeypatch.setattr("exporter.pipeline.serving_check.questions", lambda artifact, sources, count: ["q"] * count)
    monkeypatch.setattr(
        "exporter.pipeline.serving_check.check_artifact", lambda artifact, samples, session, control: result
    )
    monkeypatch.setattr("exporter.commands.serving_text.checked_page", lambda checked: "the page")
    monkeypatch.setattr("exporter.commands.progress.ProgressDisplay", silent)
    monkeypatch.setenv("MMQ_DEBUG", "1")
    (tmp_path / "my out").mkdir()
    words = [str(tmp_path / "my out"), "--device", "cpu", "--questions", "3"]
    with pytest.raises(CheckFailed) as caught:
        serve.check.main(words, standalone_mode=False)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("my out: the check of vLLM's answers failed:")
    assert lines[1:] == [f"  problem {i}" for i in range(20)]
    assert str(caught.value.hint).startswith(f"`mmq check '{tmp_path / 'my out'}' --logs logs` stores")
    assert "the page" in capsys.readouterr().out


def test_an_export_with_a_check_needs_an_engine_for_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[Any] = []
    scheme = SimpleNamespace()
    rows = [SimpleNamespace(decision="packed", scheme=scheme), SimpleNamespace(decision="kept", scheme=None)]
    family = SimpleNamespace(unserved="")
    plan = SimpleNamespace(family=family, rows=rows, head_size=64)
    recipe: Any = SimpleNamespace(kv_cache="fp8")

    def prepared(recipe: Any, device: Device, headers_only: bool) -> Any:
        assert headers_only
        return plan, SimpleNamespace(config="config")

    monkeypatch.setattr("exporter.serving.launch.find_program", lambda vllm: vllm)
    monkeypatch.setattr("exporter.pipeline.preparation.prepare", prepared)
    monkeypatch.setattr("exporter.serving.preflight.hardware", lambda program: "cpu")
    monkeypatch.setattr("exporter.serving.preflight.refuse_plan", lambda *arguments: refused.append(arguments))
    monkeypatch.setattr(
        "exporter.serving.preflight.refuse_processor",
        lambda program, schemes, *more: refused.append((program, list(schemes), *more)),
    )
    serve.need_program("vllm", recipe, "cpu")
    assert refused == [(plan, "config", "cpu"), ("vllm", [scheme], recipe, family, "fp8", 64)]
    family.unserved = "no engine"
    with pytest.raises(ServeError, match="--serve-check: no engine"):
        serve.need_program("vllm", recipe, "cpu")


# Data sets and amounts


def lines_of(*words: str) -> list[str]:
    done = CliRunner().invoke(datasets.datasets, list(words))
    assert done.exit_code == 0, done.output
    return [line.rstrip() for line in done.stdout.splitlines()]


def test_a_data_set_is_described_by_its_fields() -> None:
    described = lines_of("vqav2")
    convention = CONVENTIONS["vqav2"]
    assert described[0].split() == ["name", "vqav2"]
    assert any(line.split() == ["tasks", *", ".join(convention.tasks).split()] for line in described)
    splits = [f"{name}: {text}" for name, text in convention.splits.items()]
    assert all(any(line.endswith(text) for line in described) for text in splits)
    assert any("llava vqa: greedy, up to " in line for line in described)
    assert not [line for line in described if "retrieval" in line]  # VQAv2 has no texts to search
    (plain,) = json.loads(lines_of("vqav2", "--json")[0])
    assert plain["name"] == "vqav2"
    assert plain["generation here"]["llava vqa"].startswith("greedy, up to ")
    assert lines_of("folder")[0].split() == ["name", "folder"]


def test_all_data_sets_are_in_two_tables() -> None:
    listed = lines_of()
    assert listed[0].startswith("other data")
    assert [line.split()[0] for line in listed[1 : 1 + len(LAYOUTS)]] == list(LAYOUTS)
    assert [line.split()[0] for line in listed[-len(CONVENTIONS) :]] == list(CONVENTIONS)
    assert len(json.loads(lines_of("--json")[0])) == len(LAYOUTS) + len(CONVENTIONS)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (1_500_000, "1.5 MB"),
        (10**9, "1.00 GB"),
        (1_234_567_890_000, "1234.57 GB"),
    ],
)
def test_sizes_are_in_powers_of_a_thousand(count: int, text: str) -> None:
    assert amounts.size(count) == text


def test_durations_and_memory() -> None:
    durations = {0.4: "0 s", 99.4: "99 s", 100: "2 min", 5999: "100 min", 6000: "1.7 h", 36_000: "10.0 h"}
    assert {seconds: amounts.duration(seconds) for seconds in durations} == durations
    assert amounts.memory(3 * 2**29) == "1.50 GiB"


@pytest.mark.parametrize(
    ("text", "bytes"), [("4.2GB", 4_200_000_000), (" 900 kB ", 900_000), ("4GiB", 2**32), ("17", 17), ("1.5B", 1)]
)
def test_a_size_has_a_number_and_a_unit(text: str, bytes: int) -> None:
    assert ByteSize().convert(text, None, None) == bytes
    for wrong in ("x", "", ".", "1.2.3", "4 TB", "-1", "1 GB more"):
        with pytest.raises(click.BadParameter, match=f"expected a size like 4.2GB, 900kB or 4GiB, not '{wrong}'"):
            ByteSize().convert(wrong, None, None)
