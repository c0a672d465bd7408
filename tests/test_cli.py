"""The command line: exit codes, JSON, errors without tracebacks, interruption."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from exporter.commands import interrupt
from exporter.commands.main import cli
from exporter.commands.options import reports_errors_without_torch
from exporter.commands.progress import ProgressDisplay
from exporter.distribution import DISTRIBUTION, VERSION
from exporter.events import Event
from exporter.planning.recipe_file import load_recipe
from tests.children import running_command

PATHS = f"import sys; sys.path[:] = {sys.path!r}\n"  # a child without `site`, whose hooks may load libraries


def mmq(*arguments: str) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(cli, arguments)


@pytest.mark.parametrize("command", ["", *cli.commands])
def test_every_help_text_has_an_example(command: str) -> None:
    result = mmq(*([command] if command else []), "--help")
    assert result.exit_code == 0
    assert "Example" in result.output


def test_help_shows_every_command_with_its_whole_summary() -> None:
    lines = mmq("--help").output.split("Commands:\n")[1].split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines] == list(cli.commands)
    assert [line for line in lines if line.endswith("...")] == []


def test_help_version_and_completion_load_no_library() -> None:
    """They must answer at once; `datasets` and `score` read their choices from the packages that define them."""
    code = """
import sys
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from exporter.commands.main import cli
for words in ([], *([name] for name in cli.commands if name not in ("datasets", "score"))):
    assert CliRunner().invoke(cli, [*words, "--help"]).exit_code == 0
assert CliRunner().invoke(cli, ["--version"]).exit_code == 0
complete = ShellComplete(cli, {}, "mmq", "_MMQ_COMPLETE").get_completions
assert {item.value for item in complete([], "pl")} == {"plan"}
assert "--recipe" in {item.value for item in complete(["plan"], "--rec")}
assert "9.0" in {item.value for item in complete(["plan", "--serve-on"], "")}
print(sorted({name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)))
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", PATHS + code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['__main__', 'click', 'exporter']"


def test_lists_of_recipes_and_data_load_no_torch() -> None:
    code = """
import sys
from click.testing import CliRunner
from exporter.commands.main import cli
from exporter.data import DATA
for words in (["recipes"], ["recipes", "llava-w4"], ["datasets"], *(["datasets", name, "--json"] for name in DATA)):
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plan_of_the_demo_as_text_and_json() -> None:
    text = mmq("plan", "--recipe", "llava-w4-vit8", "--model", "demo-llava")
    assert text.exit_code == 0, text.output
    assert "W8 row rtn" in text.output
    assert "W4 g128 gptq" in text.output
    plan = json.loads(mmq("plan", "--recipe", "llava-w4-vit8", "--model", "demo-llava", "--all", "--json").stdout)
    assert plan["bytes_after"] < plan["bytes_before"]
    assert sum(line["tensors"] for line in plan["components"]) == len(plan["tensors"])
    assert sum(tensor["bytes_after"] for tensor in plan["tensors"]) == plan["bytes_after"]
    dry = mmq("export", "--recipe", "llava-w4-vit8", "--model", "demo-llava", "--dry-run")
    assert dry.output == text.output


def test_errors_are_messages_with_a_hint_and_no_traceback() -> None:
    result = mmq("plan", "--recipe", "llava-w4-vit9", "--model", "demo-llava")
    assert result.exit_code == 1
    assert "Did you mean 'llava-w4-vit8'?" in result.stderr
    assert "Hint:" in result.stderr
    assert "Traceback" not in result.output
    error = json.loads(mmq("plan", "--recipe", "no-such", "--json").stdout)
    assert error["kind"] == "RecipeError"
    assert error["exit"] == 1


def test_a_missing_model_folder_is_an_error_without_a_traceback() -> None:
    result = mmq("plan", "--recipe", "llava-w4", "--model", "./nope")
    assert result.exit_code == 1
    assert "'./nope' is neither a folder nor a valid hub id" in result.stderr


def test_the_error_for_an_unreachable_hub_names_two_alternatives(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    result = mmq("plan", "--recipe", "llava-w4-vit8")
    assert result.exit_code == 1
    assert "'llava-hf/llava-1.5-7b-hf' is not in the hub cache and the hub cannot be reached" in result.stderr
    assert "--model ./llava-1.5-7b-hf" in result.stderr
    assert "--model demo-llava" in result.stderr


def test_unknown_device_and_model() -> None:
    missing = mmq("plan", "--recipe", "llava-w8", "--model", "demo-llava", "--device", "cuda:7")
    assert missing.exit_code == 1
    assert "cuda:7" in missing.stderr
    assert mmq("plan", "--recipe", "llava-w8", "--model", "./nowhere").exit_code == 1
    assert mmq("plan", "--recipe", "llava-w8", "--banana").exit_code == 2


def test_a_model_that_no_engine_serves_is_refused_on_every_hardware():
    result = mmq("plan", "--recipe", "blip2-retrieval-w4", "--model", "demo-blip2-itm", "--serve-on", "9.0")
    assert result.exit_code == 1
    assert "vLLM does not support image-text retrieval" in result.stderr


@pytest.mark.parametrize(
    ("recipe", "where", "rule"),
    [
        ("llava-w4-vit8", "8.0", ""),
        ("llava-w4-vit8", "cpu", "rule kernel: W8 row is not served on a CPU"),
        ("llava-w4-vit8a8", "9.0", ""),
        ("llava-w4-vit8a8", "10.0", "rule kernel: W8 row A8 is not served on compute capability 10.0 (Blackwell)"),
        ("llava-w4a8-vitfp8-cache8", "8.9", "rule kernel: W4 g128 A-FP8 is not served on compute capability 8.9 (Ada)"),
    ],
)
def test_a_plan_for_hardware_without_the_kernel_names_the_rule(recipe: str, where: str, rule: str):
    result = mmq("plan", "--recipe", recipe, "--model", "demo-llava", "--serve-on", where)
    assert result.exit_code == (1 if rule else 0), result.output
    assert rule in result.stderr


def test_recipes_are_listed_and_printed() -> None:
    listed = mmq("recipes")
    assert "llava-w3-vit4" in listed.output
    printed = mmq("recipes", "llava-w8")
    assert printed.output.startswith("#")
    assert len(json.loads(mmq("recipes", "--json").stdout)) >= 5
    assert mmq("recipes", "nonsense").exit_code == 1


def test_version_names_the_distribution() -> None:
    assert mmq("--version").output == f"mmq {VERSION} (distribution {DISTRIBUTION})\n"


def test_doctor_names_versions_and_device() -> None:
    report = json.loads(mmq("doctor", "--json").stdout)
    assert {"python", "torch", "transformers", "device", "hub cache"} <= report.keys()
    assert (report["mmq"], report["distribution"]) == (VERSION, DISTRIBUTION)


def quick(out: Path, *more: str) -> list[str]:
    """A short export command."""
    fixed = ["export", "--recipe", "llava-w4-vit8", "--model", "demo-llava", "--out", str(out)]
    return [*fixed, "--samples", "4", "--eval-samples", "4", "--device", "cpu", *more]


def test_export_then_verify_then_evaluate(tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    result = mmq(*quick(out, "--json"))
    assert result.exit_code == 5, result.output  # four samples do not resolve the gates
    exported = json.loads(result.stdout.splitlines()[0])
    assert exported["verified"]["linears"] > 10
    events = [json.loads(line) for line in result.stderr.splitlines() if line.startswith("{")]
    assert {"quantize", "write", "verify", "evaluate"} <= {event["stage"] for event in events}
    assert not (tmp_path / "artifact.work").exists()
    assert "verified" in mmq("verify", str(out)).output
    second = mmq("evaluate", str(out), "--eval-samples", "4", "--json")
    assert json.loads(second.stdout.splitlines()[0])["measures"] == exported["report"]["measures"]


def test_a_failed_gate_has_its_own_exit_code_and_a_message_with_the_loss(tmp_path: Path) -> None:
    recipe = tmp_path / "ruin.yaml"
    text = mmq("recipes", "llava-w4-vit8").output
    recipe.write_text(text.replace("bits: 4, group_size: 128", "bits: 2, group_size: row").replace("gptq", "rtn"))
    result = mmq(*quick(tmp_path / "out", "--eval-samples", "20", "--recipe", str(recipe)))
    assert result.exit_code == 3, result.output
    assert "gates failed" in result.stderr
    assert "a gate failed: the loss is larger than the recipe allows" in result.stdout
    assert "allowed -5.0%" in result.stdout
    assert "allowed -5.0%" not in result.stderr  # stdout has the sentences
    assert (tmp_path / "out" / "mmq_report.json").exists()
    assert json.loads((tmp_path / "out" / "mmq_report.json").read_text())["passed"] is False


def test_an_export_with_few_test_samples_is_not_resolved(tmp_path: Path) -> None:
    """Neither passed nor failed: exit code 5, and a message with the number of samples that would resolve it."""
    out = tmp_path / "out"
    result = mmq(*quick(out, "--eval-samples", "9", "--recipe", "llava-w8"))
    assert result.exit_code == 5, result.output
    assert "Not decided: " in result.stderr
    assert "2 of 2 gates are not resolved" in result.stderr
    assert "not resolved with" not in result.stderr  # stdout has the gates' sentences
    assert re.search(
        r"gate vqa accuracy: not resolved with 9 samples: changed by .*; about [\d,]+ samples would", result.stdout
    )
    assert "passed" not in result.stdout
    assert "Error" not in result.stderr
    report = json.loads((out / "mmq_report.json").read_text())
    assert (report["passed"], report["verdict"]) == (False, "not resolved")
    second = mmq("evaluate", str(out), "--eval-samples", "9", "--json")
    assert second.exit_code == 5
    assert [gate["verdict"] for gate in json.loads(second.stdout)["gates"]] == ["not resolved", "not resolved"]
    refused = mmq("publish", str(out), "--repo", "me/x", "--dry-run")
    assert refused.exit_code == 1
    assert "gate vqa accuracy: not resolved with 9 samples" in refused.stderr


def test_an_artifact_of_a_recipe_without_gates_is_served_at_any_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.commands.tables.needs_other_recipe", lambda plan: None)  # whatever runs this test
    recipe = tmp_path / "free.yaml"
    text = mmq("recipes", "llava-w4-vit8").output
    recipe.write_text(text[: text.index("gates:")] + "gates: []\n" + text[text.index("evidence:") :])
    result = mmq(*quick(out := tmp_path / "out", "--recipe", str(recipe)))
    assert result.exit_code == 0, result.output
    assert "the recipe has no gates" in result.output
    assert f"serve {out}" in result.output
    assert "lost more" not in result.output


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupted_export_has_a_hint_and_resumes(how: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running_command(quick(out, "--json"), tmp_path) as command:
        command.wait_for('"quantize"')
        code = command.ended_by(how)
    assert code == 130, command.stderr.read_text()
    assert "same command again" in json.loads(command.stdout.read_text())["hint"]
    assert not out.exists()
    assert list((tmp_path / "out.work").glob("*.safetensors"))
    assert mmq(*quick(out)).exit_code == 5  # four samples do not resolve the gates
    assert out.exists()


@pytest.mark.parametrize("as_json", [False, True])
def test_an_interrupted_command_says_so_with_the_exit_code_of_a_signal(as_json: bool) -> None:
    @click.command()
    @reports_errors_without_torch
    def stopped(**options: bool) -> None:
        raise KeyboardInterrupt

    stopped.params.append(click.Option(["--json", "as_json"], is_flag=True))
    done = CliRunner().invoke(stopped, ["--json"] if as_json else [])
    assert done.exit_code == 130
    assert (json.loads(done.stdout)["error"] if as_json else done.stderr.split(": ")[1].strip()) == "stopped"


def test_an_interrupt_while_libraries_load_ends_quietly() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "exporter", "recipes"]  # prints when torch starts to load
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr
        for line in run.stderr:
            if "torch" in line:
                break
        run.send_signal(signal.SIGINT)
        _, stderr = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Traceback" not in stderr


def test_a_failed_gate_leaves_one_json_document(tmp_path: Path) -> None:
    recipe = tmp_path / "strict.yaml"
    text = mmq("recipes", "llava-w4-vit8").output
    recipe.write_text(text.replace("bits: 4, group_size: 128", "bits: 2, group_size: row").replace("gptq", "rtn"))
    result = mmq(*quick(tmp_path / "out", "--recipe", str(recipe), "--json"))
    assert result.exit_code == 3
    assert json.loads(result.stdout)["report"]["passed"] is False
    assert re.search("gates (failed|did not pass)", result.stderr)


def test_an_interrupt_that_a_library_turned_into_an_error_is_raised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's C code turns a signal that arrives while it reads a storage's length into a ValueError."""
    monkeypatch.setattr(interrupt, "_received", [])
    with pytest.raises(ValueError, match="shape"), ProgressDisplay(as_json=True):
        raise ValueError("could not determine the shape")
    monkeypatch.setattr(interrupt, "_received", [signal.SIGTERM])
    with pytest.raises(KeyboardInterrupt), ProgressDisplay(as_json=True):
        raise ValueError("could not determine the shape")


def test_an_interrupt_that_a_finalizer_swallowed_is_raised_at_the_next_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "_received", [])
    listen = ProgressDisplay(as_json=True)
    listen(Event("quantize", 1, 2))
    with pytest.raises(KeyboardInterrupt):
        interrupt._handle(signal.SIGINT, None)  # assume that a finalizer swallowed it
    with pytest.raises(KeyboardInterrupt):
        listen(Event("quantize", 2, 2))


@pytest.mark.parametrize(
    ("recipe", "model", "task", "metric"),
    [
        ("llava-w4", "demo-llava", "retrieval", "r1"),
        ("blip2-caption-w4", "demo-blip2", "retrieval", "r1"),
        ("blip2-retrieval-w4", "demo-blip2-itm", "vqa", "accuracy"),
    ],
)
def test_tasks_that_the_model_cannot_do_are_refused_before_work(
    recipe: str, model: str, task: str, metric: str, tmp_path: Path
) -> None:
    content = json.loads(load_recipe(recipe).model_dump_json())
    content |= {"gates": [{"task": task, "metric": metric, "max_drop": 0.1}]}
    content["calibration"]["tasks"] = ["retrieval"]
    (tmp_path / "wrong.yaml").write_text(json.dumps(content))
    result = mmq("plan", "--recipe", str(tmp_path / "wrong.yaml"), "--model", model)
    assert result.exit_code == 1, result.output
    assert re.search(rf"gates\[0\]\.task: family \S+ supports [a-z, ]+, not {task}\b", result.stderr)
    assert ("calibration.tasks: family" in result.stderr) == (task == "retrieval")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "noise.yaml").write_bytes(b"\xff\xfe\x00")
    result = mmq("plan", "--recipe", str(tmp_path / "noise.yaml"))
    assert result.exit_code == 1
    assert "noise.yaml is not UTF-8 text" in result.stderr
    (tmp_path / "mmq_manifest.json").write_text('{"a": 1}')
    (tmp_path / "config.json").write_text("{}")
    result = mmq("verify", str(tmp_path))
    assert result.exit_code == 1
    assert "mmq_manifest.json is damaged" in result.stderr
