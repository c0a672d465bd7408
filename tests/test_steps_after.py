"""The next steps that every command prints run as they are, quote their paths, and are absent from JSON."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from exporter.commands import next_steps, steps_after
from exporter.commands.main import cli
from exporter.commands.options import fail
from exporter.commands.progress import ProgressDisplay
from exporter.errors import MmqError
from exporter.evaluation.speed_record import SpeedFigures, SpeedRecord
from exporter.events import notice
from exporter.model.embedded.example import PICTURE, QUESTION
from exporter.study.prepare import default_folder
from tests.chat_server import chat_server
from tests.test_data_sources import following


def mmq(*words: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


def done(*words: str | Path) -> Result:
    """A command that ends successfully, with at most two steps, and none with --json."""
    result = mmq(*words)
    assert result.exit_code == 0, result.output
    assert 1 <= len(steps(result)) <= 2
    return result


def steps(result: Result) -> list[list[str]]:
    return following(result.stdout if "next:" in result.stdout else result.stderr)


@pytest.fixture
def artifact(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artifact without scores, whose gates will pass, below a folder with a space; the machine has no vLLM."""
    monkeypatch.delenv("MMQ_VLLM", raising=False)
    monkeypatch.setattr("exporter.commands.next_steps.has_vllm", lambda: False)
    monkeypatch.setattr("exporter.commands.steps_after.has_vllm", lambda: False)
    monkeypatch.setattr("exporter.evaluation.evaluate.raise_unless_accepted", lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(finished, tmp_path / "my artifacts" / "demo"))


def test_a_verified_artifact_is_measured_and_then_used(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (artifact / "mmq_report.json").unlink(missing_ok=True)
    assert steps(done("verify", artifact, "--no-load")) == [["evaluate", str(artifact)]]
    evaluated = done(*steps(mmq("verify", artifact, "--no-load"))[0], "--eval-samples", "4")
    report, ask = steps(evaluated)
    assert (report, ask) == (["report", str(artifact)], ["ask", str(artifact), str(PICTURE), QUESTION])
    assert steps(done("verify", artifact, "--no-load")) == [ask]
    done(*report)
    asked = done(*ask)
    assert "next:" not in asked.stdout  # stdout is the answer
    assert "next:" not in mmq(*ask, "--json").output
    again, last = steps(asked)
    assert (again, last) == ([*ask, "--compare"], report)
    assert steps(done(*again)) == [report]
    monkeypatch.setattr(steps_after, "has_vllm", lambda: True)
    serve = steps(done("verify", artifact, "--no-load"))[1]
    assert serve == ["serve", str(artifact)]
    assert mmq(*serve, "--print").exit_code == 0
    assert steps_after.after_evaluate(artifact, ["./a b"])[0].endswith(shlex.join([*report, "--data", "./a b"]))
    assert shlex.split(steps_after.after_evaluate(artifact, ())[1])[-2:] == ["check", str(artifact)]


@pytest.mark.parametrize("words", [("verify", "--no-load"), ("evaluate", "--eval-samples", "4"), ("report",)])
def test_json_has_no_steps(words: tuple[str, ...], artifact: Path) -> None:
    result = mmq(words[0], artifact, *words[1:], "--json")
    assert result.exit_code == 0, result.output
    json.loads(result.stdout)
    assert "next:" not in result.output


def test_a_report_and_the_plots_of_a_study_open_in_the_browser(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, line = mmq("report", artifact).stdout.partition("next:\n")[2].splitlines()
    assert evaluate.strip() == next_steps.command("evaluate", artifact)
    opened = tmp_path / "opened"
    program = tmp_path / "browser"
    program.write_text(f'#!/bin/sh\nprintf %s "$1" > {shlex.quote(str(opened))}\n')
    program.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{program} %s")
    subprocess.run(line, shell=True, check=True)
    assert opened.read_text() == (artifact.parent / "demo-report.html").as_uri()


def test_a_difference_leads_to_the_reports_or_to_the_measurement(artifact: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(artifact, tmp_path / "other"))
    assert steps(done("diff", artifact, other)) == [["evaluate", str(artifact)], ["evaluate", str(other)]]
    done(*steps(done("diff", artifact, other))[1], "--eval-samples", "4")
    assert steps(done("diff", artifact, other))[1] == ["report", str(other)]
    assert steps_after.after_diff(["hub:me/x", "hub:me/x"]) == [next_steps.command("verify", "hub:me/x")]
    assert "next:" not in mmq("diff", artifact, other, "--json").output


def test_a_model_that_is_no_artifact_leads_to_a_plan(artifact: Path) -> None:
    asked = done("ask", "demo-llava", PICTURE, QUESTION)
    assert steps(asked) == [["plan", "--recipe", "llava-w4-vit8", "--model", "demo-llava"]]
    assert mmq(*steps(asked)[0]).exit_code == 0


def test_the_answers_of_a_server_lead_to_a_measurement(artifact: Path) -> None:
    with chat_server(lambda *_: "red") as server:
        asked = done("ask", artifact, PICTURE, QUESTION, "--server", server.url)
    assert steps(asked) == [["evaluate", str(artifact)]]


def test_a_check_and_a_measured_speed_lead_to_the_report(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = SpeedFigures(load_seconds=1, first_token_seconds=1, tokens_per_second={"1": 1.0}, peak_bytes=1)
    record = SpeedRecord(engine="e", device="d", tokens=2, requests=1, artifact=figures)
    monkeypatch.setattr("exporter.pipeline.speed.bench_artifact", lambda *_: record)
    monkeypatch.setattr("exporter.pipeline.serving_check.program_for", lambda *_: None)
    monkeypatch.setattr("exporter.pipeline.serving_check.check_artifact", lambda *_, **__: passed)
    monkeypatch.setattr("exporter.commands.serving_text.checked_page", lambda _: "passed")
    monkeypatch.setattr("exporter.serving.check.as_plain", lambda _: {})
    passed: Any = SimpleNamespace(passed=True)
    checked = done("check", artifact, "--vllm", "/a b/vllm")
    assert steps(checked) == [["bench", str(artifact), "--vllm", "/a b/vllm"], ["report", str(artifact)]]
    measured = done("bench", artifact, "--engine", "transformers")
    assert steps(measured) == [["report", str(artifact)]]
    assert mmq(*steps(measured)[0]).exit_code == 0
    assert mmq(*steps(checked)[0][:2], "--engine", "transformers").exit_code == 0
    assert "next:" not in mmq("check", artifact, "--json").output + mmq("bench", artifact, "--json").output


def test_stored_answers_of_the_source_lead_to_the_artifacts_server(artifact: Path) -> None:
    with chat_server(lambda *_: "red") as server:
        collected = done("evaluate", artifact, "--baseline-server", server.url, "--eval-samples", "2")
        serve, evaluate = steps(collected)
        assert mmq(*serve, "--print").exit_code == 0
        assert evaluate[:-1] == ["evaluate", str(artifact), "--server"]
        assert mmq(*evaluate[:-1], server.url, "--eval-samples", "2").exit_code == 0


def test_a_study_leads_to_its_plots_and_to_an_allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    few = ("--samples", "8", "--calibration", "8", "--workers", "1", "--device", "cpu")
    words = ("study", "--model", "demo-llava", "--bits", "4,16", "--methods", "rtn", *few)
    studied = done(*words)
    plots, allocate = steps(studied)
    assert plots == ["study", "plots", str(default_folder("demo-llava"))]
    assert mmq(*plots).exit_code == 0
    assert allocate[:4] == ["allocate", "--model", "demo-llava", "--max-size"]
    limits = ("--bits", "3,8", "--method", "rtn", "--per", "component", "--no-proof")
    assert mmq(*allocate, *few, *limits).exit_code in (0, 3)  # whatever the demo model loses
    assert Path("allocated.yaml").is_file()
    assert "next:" not in mmq(*words, "--json").output
    named = done(*words, "--out", "my study")
    assert steps(named)[0] == ["study", "plots", "my study"]
    assert steps(named)[1][-2:] == ["--folder", "my study"]


def test_a_command_is_given_again_with_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    name, words = "publish", ["a b", "--repo", "me/x", "--dry-run", "--dataset", "d", "--dataset", "e", "--public"]
    monkeypatch.setattr("click.Path.convert", lambda self, value, *_: Path(value))
    context = cli.commands[name].make_context(name, list(words))
    again = ["publish", "a b", "--repo", "me/x", "--public", "--dataset", "d", "--dataset", "e"]
    assert steps_after.given(context, ("dry_run",)) == again
    assert "--dry-run" in steps_after.given(context)


@pytest.mark.parametrize(
    "options",
    [
        ("--recipe", "llava-w4-vit8", "--model", "demo-llava"),
        ("--recipe", "llava-w4-vit8", "--model", "demo-llava", "--bits", "language=3", "--bits", "vision=8"),
        ("--recipe", "llava-w4-vit8", "--model", "demo-llava", "--group-size", "64,row", "--skip-evaluation"),
        ("--recipe", "llava-w4-vit8", "--model", "demo-llava", "--group-size", "language=64,row", "--samples", "4"),
        ("--recipe", "llava-w4-vit8", "--model", "demo-llava", "--prompt", "vqa={question} Be brief."),
    ],
)
def test_a_plan_leads_to_the_export_with_the_same_options(options: tuple[str, ...]) -> None:
    for shown in (("plan", *options, "--all", "--serve-on", "9.0"), ("export", *options, "--dry-run")):
        (export,) = steps(done(*shown))
        assert export[0] == "export"
        parsed = cli.commands["export"].make_context("export", export[1:])
        wanted = cli.commands["export"].make_context("export", list(options))
        assert parsed.params == wanted.params
    assert "next:" not in mmq("plan", *options, "--json").output


def test_notes_and_errors_name_the_program_that_runs(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(next_steps, "program", lambda: "python -m exporter")
    (artifact / "mmq_report.json").unlink(missing_ok=True)
    assert "run `python -m exporter evaluate`" in mmq("report", artifact).stdout
    with ProgressDisplay(as_json=False) as listen:
        listen(notice("`mmq check` failed"))
    assert "`python -m exporter check`" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        fail(MmqError("run `mmq check` again", "see `mmq plan --help`"), as_json=False)
    assert capsys.readouterr().err.count("`python -m exporter ") == 2
