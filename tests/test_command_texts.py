"""What commands print and how they read their options, called without a model."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from exporter.artifact.verify import Verification
from exporter.commands import allocate, ask, bench, data_check, evaluate, progress, publish, study, tables
from exporter.commands.options import LazyChoice, fail, print_result
from exporter.commands.plan_tables import steps_table
from exporter.commands.report_tables import gate_line, report_page
from exporter.commands.serving_text import example_lines
from exporter.device import Device
from exporter.errors import DataError, GateFailed, PublishError, RecipeError, ServeError
from exporter.evaluation.cluster.ray_cluster import RayCluster
from exporter.evaluation.evaluation_record import BaselineRecord, EvaluationRecord
from exporter.events import Event, preparing
from exporter.model.families import FAMILIES
from exporter.model.inference.predict_server import Server
from exporter.pipeline.data_check import DataCheck, SplitCheck
from exporter.planning.steps import Step
from exporter.publishing.artifact_diff import Change
from exporter.publishing.repository import CARD, Package
from exporter.serving.launch import Launch
from tests.fake_ray import FakeRay, ray
from tests.test_evaluate import crafted, one_bootstrap

__all__ = ["one_bootstrap", "ray"]

GIB = 2**30
CPU, GPU = Device("cpu", "a CPU", 64 * GIB), Device("cuda:0", "H100", 64 * GIB)
PREDICTED = (Step("plan", 0, GIB, 2.0), Step("quantize", 3 * GIB, 2 * GIB, 120.0, "on the GPU"))
MEASURED = (Step("plan", 0, GIB // 2, 1.0), Step("quantize", 2 * GIB, GIB, 7200.0))


def lines(result: Any, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that a result prints."""
    print_result(result)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_measured_steps_stand_beside_their_predictions(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(tables.measured_table(PREDICTED, MEASURED), capsys) == [
        "time and peak memory, measured and predicted",
        "step       time  predicted      host  predicted    device  predicted",
        "plan        1 s        2 s  0.50 GiB   1.00 GiB  0.00 GiB   0.00 GiB",
        "quantize  2.0 h      2 min  1.00 GiB   2.00 GiB  2.00 GiB   3.00 GiB",
    ]
    assert lines(tables.measured_table(PREDICTED, MEASURED[:1]), capsys)[1:] == [
        "step  time  predicted      host  predicted",
        "plan   1 s        2 s  0.50 GiB   1.00 GiB",
    ]


def test_predicted_steps_have_a_column_of_the_device_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(steps_table(PREDICTED, CPU), capsys) == [
        "estimated peak memory and time on a CPU; host memory excludes the page cache",
        "step          host   time  how",
        "plan      1.00 GiB    2 s",
        "quantize  2.00 GiB  2 min  on the GPU",
    ]
    assert lines(steps_table(PREDICTED, GPU), capsys)[1:] == [
        "step        device      host   time  how",
        "plan                1.00 GiB    2 s",
        "quantize  3.00 GiB  2.00 GiB  2 min  on the GPU",
    ]


def test_narrow_columns_are_those_of_words() -> None:
    assert [column.no_wrap for column in steps_table(PREDICTED, CPU).columns] == [True, True, True, False]
    assert all(column.no_wrap for column in tables.measured_table(PREDICTED, MEASURED).columns)
    assert all(column.no_wrap for column in report_page(crafted(1, 1)).renderables[0].columns)  # type: ignore
    assert [column.no_wrap for column in tables.difference_table("a", "b", []).columns] == [False, False, False, True]


def test_a_verification_is_one_line() -> None:
    plain = Verification(3, 7)
    start = "verified: 3 files match their hashes, 7 packed linears match the manifest"
    assert tables.verified_line(plain) == start
    assert tables.verified_line(replace(plain, source=True)) == f"{start} and the source"
    assert tables.verified_line(replace(plain, skipped="no torch")) == f"{start}; not run in transformers: no torch"
    ran = replace(plain, blocks=2, block_difference=0.00012, logit_difference=0.5)
    assert tables.verified_line(ran) == (
        f"{start}; outputs of 2 blocks match compressed-tensors' (largest relative difference 1.2e-04); "
        "the whole model's logits differ by at most 5.0e-01"
    )


def test_differences_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    changes = [
        Change("score", "0.5", "0.25", -0.25),
        Change("size", "1", "1,235", 1234.5),
        Change("bytes", "2", "9", -107_520.0),
        Change("recipe", "x", "y"),
    ]
    assert lines(tables.difference_table("a", "b", changes), capsys) == [
        "first: a",
        "second: b",
        "what    first  second    change",
        "score   0.5    0.25       -0.25",
        "size    1      1,235     +1,234",
        "bytes   2      9       -107,520",
        "recipe  x      y",
    ]


def test_a_report_has_scores_gates_and_notes(capsys: pytest.CaptureFixture[str]) -> None:
    report = crafted(10, 13)
    start = [
        "evaluation",
        "score         samples    full  artifact   change       95 % interval",
        "vqa accuracy       50  0.8000    0.7400  -0.0600  -0.1400 to +0.0000",
    ]
    printed = lines(report_page(report), capsys)
    assert printed[:3] == start
    assert printed[3].startswith("gate vqa accuracy: not resolved with 50 samples: changed by -7.5% of the")
    assert printed[4:] == ["samples needed to resolve a change of 1 % of the full score: 3455 for vqa accuracy"]
    figures = {"vqa": {"anls": (0.5, 0.25)}, "captioning": {}}
    baseline = BaselineRecord(model="other", is_source=False, differs=())
    record = EvaluationRecord(searched={"pictures": 1000, "texts": 5000}, baseline=baseline)
    more = report.model_copy(update={"corpus": figures, "evaluation": record, "gates": ()})
    assert lines(report_page(more), capsys)[4:] == [
        "vqa, score of the whole set: anls 0.5000 -> 0.2500",
        "retrieval searched: 1,000 pictures, 5,000 texts",
        "the full-precision model, other, is not the artifact's source model",
    ]
    own = record.model_copy(update={"searched": None, "baseline": baseline.model_copy(update={"is_source": True})})
    changed = own.model_copy(update={"overrides": {"prompt vqa": "x"}})
    assert len(lines(report_page(more.model_copy(update={"corpus": {}, "evaluation": own})), capsys)) == 4
    assert lines(report_page(more.model_copy(update={"evaluation": changed})), capsys)[5].startswith("prompts:")


def test_the_verdict_of_a_gate_is_colored() -> None:
    text = gate_line(crafted(0, 30).gates[0])
    (span,) = text.spans
    assert (text.plain[span.start : span.end], span.style) == ("failed", "bold red")


def test_next_steps_of_an_export_depend_on_its_gates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMQ_VLLM", "vllm")
    monkeypatch.setattr(tables, "needs_other_recipe", lambda plan: None)
    family = SimpleNamespace(unserved="", tasks=("vqa",))

    def steps(report: Any) -> list[str]:
        result: Any = SimpleNamespace(plan=SimpleNamespace(family=family), out=tmp_path, report=report)
        return tables._next_steps(result)

    assert steps(crafted(0, 30)) == ["a gate failed: the loss is larger than the recipe allows"]
    assert [line.split()[-2] for line in steps(None)[1:] if "ask" not in line] == ["report", "serve", "check"]
    assert steps(crafted(0, 0))[0] == "next:"
    ungated = steps(crafted(0, 0).model_copy(update={"gates": ()}))
    assert ungated[:2] == ["the recipe has no gates: no loss of quality can fail it", "next:"]
    monkeypatch.setattr(tables, "needs_other_recipe", lambda plan: ("export", "--recipe", "other"))
    assert steps(None)[-1].endswith(" export --recipe other")
    family.unserved, family.tasks = "vLLM has no such model", ()
    monkeypatch.setattr(tables, "needs_other_recipe", lambda plan: pytest.fail("vLLM serves no recipe of this family"))
    assert [line.split()[-2] for line in steps(None)[1:-1]] == ["report"]
    assert steps(None)[-1] == "vLLM has no such model"


def test_example_requests_are_for_mmq_curl_and_python() -> None:
    lines_by_name = example_lines(Launch(("vllm", "serve"), {}, "http://a:1", "mine"), "out", FAMILIES["llava"])
    assert list(lines_by_name) == ["ask", "curl", "python"]
    assert all("http://a:1" in line for line in lines_by_name.values())


def test_the_json_of_an_export_has_no_list_of_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "plan_json", lambda plan, every_tensor: {"every tensor": every_tensor})
    result: Any = SimpleNamespace(out=tmp_path, plan=None, verified=Verification(3, 7), report=None, measured=MEASURED)
    plain = tables.export_json(result)
    assert plain["plan"] == {"every tensor": False}
    assert (plain["out"], plain["report"], plain["verified"]["files"]) == (str(tmp_path), None, 3)
    assert plain["seconds"] == {"plan": 1.0, "quantize": 7200.0}
    assert (plain["peak_device_bytes"], plain["peak_host_bytes"]) == (2 * GIB, GIB)
    result.measured, result.report = MEASURED[:1], crafted(0, 0)
    plain = tables.export_json(result)
    assert (plain["peak_device_bytes"], plain["peak_host_bytes"]) == (0, 0)
    assert plain["report"]["passed"] is True


# Progress


def shown(events: list[Event], as_json: bool, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of events on stderr."""
    with progress.ProgressDisplay(as_json) as listen:
        for event in events:
            listen(event)
        listen.hide()
    printed = capsys.readouterr()
    assert not printed.out
    return printed.err.splitlines()


def test_progress_in_a_log_is_a_line_per_stage_and_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([100.0, 104.9, 105.0, 106.0, 107.0, 108.0, 109.0, 109.0, 109.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(times)))
    events = [
        Event("quantize", 1, 4, numbers={"error": 0.25, "left": 90.4}),
        Event("quantize", 2, 4),
        Event("quantize", 3, 4, numbers={"left": 0}),
        Event("quantize", 4, 4),
        Event("evaluate", 1, 2, "source: vqa"),
        Event("evaluate", 1, 2, "artifact: vqa"),
        Event("evaluate", 1, 2, "resumed"),
        Event("prepare", 0, 1, "loading torch"),
        Event("prepare", 1, 1, "loading torch"),
        Event("note", 0, 0, "a [bold] note"),
    ]
    assert shown(events, False, capsys) == [
        "quantizing blocks: 1/4, error 0.2500, about 90 s left",
        "quantizing blocks: 3/4",
        "quantizing blocks: 4/4",
        "evaluating source: vqa: 1/2",
        "evaluating artifact: vqa: 1/2",
        "evaluating: 1/2",
        "preparing: loading torch",
        "note: a [bold] note",
    ]


def test_a_step_without_progress_has_a_start_and_an_end_unless_it_fails() -> None:
    events: list[Event] = []
    with preparing(events.append, "loading"):
        assert events == [Event("prepare", 0, 1, "loading")]
    assert events == [Event("prepare", 0, 1, "loading"), Event("prepare", 1, 1, "loading")]
    with pytest.raises(DataError), preparing(events.append, "reading"):
        fail_to_read()
    assert events[2:] == [Event("prepare", 0, 1, "reading")]


def fail_to_read() -> None:
    raise DataError("no file")


def test_progress_in_json_is_a_line_per_event(capsys: pytest.CaptureFixture[str]) -> None:
    events = [Event("quantize", 1, 4, "x", {"error": 0.25}), Event("note", 0, 0, "y")]
    assert [json.loads(line) for line in shown(events, True, capsys)] == [
        {"stage": "quantize", "done": 1, "total": 4, "message": "x", "numbers": {"error": 0.25}},
        {"stage": "note", "done": 0, "total": 0, "message": "y", "numbers": {}},
    ]


def test_progress_on_a_terminal_is_a_bar_per_stage(capsys: pytest.CaptureFixture[str]) -> None:
    listen = progress.ProgressDisplay(False)
    listen._console._force_terminal = True
    with listen:
        assert listen._progress is not None
        for event in (Event("quantize", 1, 4), Event("quantize", 2, 4), Event("write", 1, 8), Event("note", 0, 0, "x")):
            listen(event)
        assert [(task.description, task.completed, task.total) for task in listen._progress.tasks] == [
            ("quantizing blocks", 2, 4),
            ("writing shards", 1, 8),
        ]
        listen.hide()
        assert not listen._progress.live.is_started
        listen(Event("write", 2, 8))
        assert listen._progress.live.is_started
    assert not listen._progress.live.is_started
    assert "note: x" in capsys.readouterr().err


# Errors and options


def test_an_error_is_a_message_with_a_hint_and_a_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    for error, as_json, code in (
        (DataError("a", "b"), False, 1),
        (DataError("a"), True, 1),
        (GateFailed("a"), True, 3),
    ):
        with pytest.raises(SystemExit) as ended:
            fail(error, as_json)
        assert ended.value.code == code
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"error": "a", "hint": None, "kind": "DataError", "exit": 1}
    assert [line.split(": ", 1)[1] for line in printed.err.splitlines()] == ["a", "b", "a"]


def test_choices_are_read_on_first_use() -> None:
    read: list[int] = []
    choice = LazyChoice(lambda: [read.append(1) or "vqa", "captioning"])  # type: ignore[func-returns-value]
    assert not read
    assert choice.convert("captioning", None, None) == "captioning"
    with pytest.raises(click.BadParameter):
        choice.convert("VQA", None, None)


def test_lists_of_numbers_and_words() -> None:
    context: Any = None
    assert study.parse_numbers(context, context, "2,3,16") == (2, 3, 16)
    with pytest.raises(click.BadParameter, match="not '2;3'"):
        study.parse_numbers(context, context, "2;3")
    assert study.parse_words(context, context, "front, end") == ("front", "end")
    assert study.parse_words(context, context, "") == study.parse_words(context, context, None) == ()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"baseline": "m"}, "--baseline needs --compare"),
        ({"baseline_server": "u", "server": "u"}, "--baseline-server needs --compare"),
        ({"served_model": "m"}, "--served-model needs --server"),
        ({"compare": True, "server": "u"}, "both --server and --baseline-server"),
        ({"compare": True, "baseline_server": "u"}, "both --server and --baseline-server"),
        ({"compare": True, "baseline": "m"}, ""),
        ({"served_model": "m", "server": "u"}, ""),
        ({"compare": True, "server": "u", "baseline_server": "u"}, ""),
    ],
)
def test_options_of_a_question_that_need_others(options: dict[str, Any], problem: str) -> None:
    names = ("compare", "baseline", "server", "served_model", "baseline_server")
    given = dict.fromkeys(names) | options
    if not problem:
        return ask._refuse_unused(given)
    with pytest.raises(click.UsageError, match=problem):
        ask._refuse_unused(given)


def test_an_answer_is_printed_as_it_grows_after_its_label(capsys: pytest.CaptureFixture[str]) -> None:
    before: list[int] = []
    show = ask._printer(False, "artifact: ", lambda: before.append(1))
    for piece in ("a", " red", " box"):
        show(piece)
    assert (capsys.readouterr().out, before) == ("artifact: a red box", [1])
    ask._printer(True, "artifact: ", lambda: before.append(1))("a")
    assert (capsys.readouterr().out, before) == ("", [1])


def test_what_measures_the_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("MMQ_VLLM", raising=False)
    notes: list[Event] = []
    assert bench._program("transformers", None, notes.append) is None
    assert not notes
    assert bench._program("auto", None, notes.append) is None
    assert [(note.stage, note.message.split(": ")[1]) for note in notes] == [
        ("note", "transformers measures, with dequantized weights")
    ]
    for engine, program in (("vllm", None), ("auto", "/nowhere/vllm")):
        with pytest.raises(ServeError, match="does not exist"):
            bench._program(engine, program, notes.append)


EVALUATION = dict.fromkeys(("server", "served_model", "baseline_server", "baseline_served_model", "fresh", "ray"))


def test_servers_of_an_evaluation() -> None:
    options: dict[str, Any] = {**EVALUATION, "concurrent": 3}
    assert evaluate._servers(options) is None
    servers = evaluate._servers(options | {"server": "http://a", "served_model": "m"})
    assert servers is not None
    assert (servers.source, servers.artifact) == (None, Server("http://a", "m", 3))
    both = evaluate._servers(options | {"server": "http://a", "baseline_server": "http://b", "fresh": True})
    assert both is not None
    assert both.source == Server("http://b", None, 3)
    with pytest.raises(click.UsageError, match="--baseline-served-model needs --baseline-server"):
        evaluate._servers(options | {"baseline_served_model": "m"})
    with pytest.raises(click.UsageError, match="--fresh with a server needs both"):
        evaluate._servers(options | {"server": "http://a", "fresh": True})


def test_the_cluster_of_an_evaluation(ray: FakeRay) -> None:
    with evaluate._cluster(EVALUATION, False) as cluster:
        assert cluster is None
    for on_gpu, address, gpus in ((True, "host:1", 1), (False, "local", 0)):
        with evaluate._cluster(EVALUATION | {"ray": address}, on_gpu) as cluster:
            assert isinstance(cluster, RayCluster)
            assert ray.address == (None if address == "local" else address)
            list(cluster.results(abs, [(1,)]))
        assert ray.calls.pop()["num_gpus"] == gpus
    for name in ("server", "baseline_server"):
        with pytest.raises(click.UsageError, match="--ray and servers exclude each other"):
            evaluate._cluster(EVALUATION | {"ray": "local", name: "http://a"}, False)


def test_the_store_of_an_evaluation(tmp_path: Path) -> None:
    assert evaluate._store(tmp_path, {"fresh": True, "answers": tmp_path}) is None
    named, default = (evaluate._store(tmp_path / "a", {"fresh": False, "answers": x}) for x in (tmp_path, None))
    assert named is not None
    assert default is not None
    assert named.folder == tmp_path != default.folder
    assert str(default.folder) in evaluate._baseline_message(default)


def test_the_pool_of_a_study_on_ray(ray: FakeRay) -> None:
    for on_gpu, gpus in ((True, 1), (False, 0)):
        with study.open_pool({"ray": "local", "workers": None}, on_gpu, 4) as pool:
            assert list(pool(abs, [(-1,), (-2,)])) == [(1, 2), (0, 1)]
        assert {call["num_gpus"] for call in ray.calls} == {gpus}
        ray.calls.clear()
        assert ray.address == ""


def test_a_recipe_replaces_only_a_recipe(tmp_path: Path) -> None:
    out = tmp_path / "out.yaml"
    allocate.refuse_other_file(out)
    out.write_text("notes: mine")
    with pytest.raises(RecipeError, match="exists and is no recipe"):
        allocate.refuse_other_file(out)
    out.unlink()
    out.symlink_to("nothing")
    with pytest.raises(RecipeError, match="exists and is no recipe"):
        allocate.refuse_other_file(out)


def test_the_head_of_an_allocated_recipe_is_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, text in ((["allocate", "--plain"], "mmq allocate --plain"), (["-q", "tests"], "mmq allocate")):
        monkeypatch.setattr("sys.argv", ["/bin/mmq", *words])
        assert allocate.command_line() == text


def test_a_push_without_scores_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PublishError, match="exclude each other"):
        publish.check_push("me/x", skip_evaluation=True)


def test_a_dry_run_lists_files_and_card(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"x" * 1234)
    package = Package({"w": tmp_path / "w", CARD: b"# card"}, ("old.bin",), ("a gate failed",), unchanged=True)
    assert publish.page("me/x", package).splitlines() == [
        "would publish to me/x:",
        "               6  README.md",
        "           1,234  w",
        "  removed:        old.bin",
        "  nothing to do: the repository already holds these files",
        "",
        "# card",
    ]
    assert "nothing to do" not in publish.page("me/x", replace(package, unchanged=False))
    assert publish.listing(package) == {
        "files": {"README.md": 6, "w": 1234},
        "removed": ["old.bin"],
        "unchanged": True,
        "problems": ["a gate failed"],
        "card": "# card",
    }


def test_the_check_of_a_source_lists_tasks_splits_and_rows() -> None:
    splits = (
        SplitCheck("vqa", "train", 1200, 1000),
        SplitCheck("vqa", "test", 8, 8),
        SplitCheck("captioning", "train", refusal="no captions"),
    )
    result = DataCheck("./images", splits, (), ("a note",))
    assert data_check._text(result, ["page.html"]).splitlines() == [
        "./images",
        "  vqa          train       1,200 (1,000 pictures decoded)",
        "  vqa          test        8",
        "  captioning   train       -",
        "  -: no captions",
        "note: a note",
        "Calibration and evaluation can use: vqa; no unusable row.",
        "wrote page.html",
    ]
    damaged = data_check._text(replace(result, splits=splits[2:], problems=("line 1: x",)), []).splitlines()
    assert damaged[2:] == [
        "note: a note",
        "unusable: line 1: x",
        "No task has both a train and a test split; 1 unusable row.",
    ]
    plain = data_check._plain(result, ["page.html"])
    assert plain["splits"][2] == {
        "task": "captioning",
        "split": "train",
        "available": 0,
        "opened": 0,
        "refusal": "no captions",
    }
    assert (plain["tasks"], plain["files"]) == ({"vqa": True, "captioning": False}, ["page.html"])
