"""Parts of `mmq bench`, `mmq check` and `mmq evaluate` whose models and engines are replaced by stand-ins."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exporter import data
from exporter.data.folder import SPLITS
from exporter.data.tasks.sample import Sample
from exporter.device import Device
from exporter.dtypes import BFLOAT16, FLOAT16, FLOAT32, Dtype
from exporter.errors import CheckpointError, DataError, MemoryShortage
from exporter.evaluation.answers import Store
from exporter.evaluation.speed_record import SpeedFigures
from exporter.events import Event, ignore
from exporter.pipeline import (
    data_coverage,
    make_artifact,
    measurement,
    picture_question,
    preparation,
    reevaluation,
    serving_check,
    speed,
    step_clock,
)
from exporter.pipeline import export as export_job
from exporter.pipeline import samples as pipeline_samples
from exporter.pipeline.data_check import DataCheck, SplitCheck, check_data, opened, unusable_rows
from exporter.pipeline.reevaluation import Reevaluation
from exporter.pipeline.speed import SpeedRequest, bench_artifact, measure_here
from exporter.planning.recipe_file import load_recipe
from exporter.planning.steps import Step
from exporter.serving.launch import Program
from exporter.serving.speed import SpeedSettings

CPU = Device("cpu", "a CPU", 2**30)
CARD = Device("cuda:0", "a card", 2**30)
FIGURES = SpeedFigures(load_seconds=1.0, first_token_seconds=0.5, tokens_per_second={"1": 2.0})


def samples(count: int, task: str = "vqa") -> list[Sample]:
    return [Sample(f"{task} {i}", lambda: None, "?", ("x",)) for i in range(count)]  # type: ignore[arg-type,return-value]


def test_questions_come_from_every_task_of_the_gates_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def drawn(specs: Any, task: str, split: str, count: int, seed: int) -> list[Sample]:
        asked.append((specs, task, split, count, seed))
        return samples(count, task)

    recipe = load_recipe("llava-w4-vit8")
    gates = [SimpleNamespace(task=task) for task in ("vqa", "captioning", "vqa")]
    fake: Any = SimpleNamespace(gates=gates, evaluation=SimpleNamespace(seed=7))
    monkeypatch.setattr(serving_check, "load_recipe", lambda path: fake)
    monkeypatch.setattr(serving_check, "test_sources", lambda recipe: ["its own"])
    monkeypatch.setattr(data, "samples_from", drawn)
    chosen = serving_check.questions(tmp_path, [], 5)
    assert [sample.identity for sample in chosen] == ["vqa 0", "captioning 0", "vqa 1", "captioning 1", "vqa 2"]
    assert asked == [(["its own"], task, "test", 3, 7) for task in ("vqa", "captioning")]
    fake.gates = []
    specs: Any = ["mine"]
    assert [sample.identity for sample in serving_check.questions(tmp_path, specs, 1)] == ["vqa 0"]
    assert asked[-1] == (["mine"], "vqa", "test", 1, 7)
    with pytest.raises(DataError, match="a check of 0 questions compares nothing"):
        serving_check.questions(tmp_path, specs, 0)
    assert recipe.gates  # a shipped recipe has some


def test_transformers_speed_is_that_of_repeated_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is the first of its shape takes longer and is in no figure."""
    now, runs, waits, device = [0.0], list[tuple[list[str], int]](), list[str](), [CARD]
    shapes = set[tuple[int, int]]()

    class Predictor:
        def generate_exactly(self, batch: list[Sample], tokens: int) -> None:
            runs.append(([sample.identity for sample in batch], tokens))
            now[0] += 0.125 * tokens + (len(runs) in (2, 4)) * 9  # of three first tokens, two are slow
            shape = len(batch), tokens
            now[0] += 1000 * (shape not in shapes)  # the first run of every shape compiles and allocates
            shapes.add(shape)

    @contextmanager
    def opened(model: str, wording: Any, device: Device, on_event: Any) -> Iterator[Predictor]:
        assert (model, wording("family"), device) == ("m", "family", CARD if device.is_cuda else CPU)
        now[0] += 1.234
        yield Predictor()

    monkeypatch.setattr(speed, "choose", lambda name: device[0])
    monkeypatch.setattr(speed, "questions", lambda artifact, sources, count: samples(3))
    monkeypatch.setattr(speed, "opened_model", opened)
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(speed, "reset_peak", lambda device: waits.append("reset"))
    monkeypatch.setattr(speed, "synchronize", lambda device: waits.append("wait"))
    monkeypatch.setattr(speed, "peak_bytes", lambda device: (5, 7))
    request = SpeedRequest(tmp_path, None, SpeedSettings(clients=(4,), tokens=8, requests=3))
    figures = measure_here(request, "m")
    one, four = ["vqa 0"], ["vqa 0", "vqa 1", "vqa 2", "vqa 0"]
    assert runs == [*[(one, 1)] * 4, *[(one, 8)] * 4, *[(four, 8)] * 4]
    assert (figures.load_seconds, figures.first_token_seconds) == (1.23, 9.125)
    assert figures.tokens_per_second == {"1": 8.0, "4": 32.0}
    assert (figures.peak_bytes, figures.gpu_bytes) == (7, 5)
    assert waits == ["reset"] + ["wait"] * 2 * len(runs)
    device[0] = CPU
    assert measure_here(request, "m").gpu_bytes is None


@pytest.mark.parametrize("program", [None, Program("vllm", "0.32.0", cpu=True), Program("vllm", "0.32.0", cpu=False)])
def test_the_record_of_a_measurement_names_engine_and_device(
    program: Program | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    artifact = SimpleNamespace(family="family")
    monkeypatch.setattr(speed, "reading", lambda folder, on_event: nullcontext(checked.append("locked")))
    monkeypatch.setattr(speed.Artifact, "open", lambda folder: artifact)
    for name in ("refuse_unserved", "refuse_unservable", "refuse_artifact_here"):
        monkeypatch.setattr(speed, name, lambda *values, name=name: checked.append(name))
    monkeypatch.setattr(speed, "hardware", lambda program: "cpu")
    monkeypatch.setattr(speed, "source_of", lambda artifact, baseline, on_event: f"source at {baseline}")
    monkeypatch.setattr(speed, "weights_digest", lambda artifact: "0" * 64)
    monkeypatch.setattr(speed, "choose", lambda name: CARD)
    monkeypatch.setattr(speed, "write_speed", lambda folder, record: checked.append("written"))
    measured: list[str] = []
    for name in ("_in_vllm", "_here"):
        monkeypatch.setattr(
            speed, name, lambda request, on_event, model, name=name: measured.append(f"{name} {model}") or FIGURES
        )
    request = SpeedRequest(tmp_path, program, SpeedSettings(tokens=9, requests=2), baseline="there", extra=("--x",))
    record = bench_artifact(request, ignore)
    kind = "_in_vllm" if program else "_here"
    assert measured == [f"{kind} {tmp_path}", f"{kind} source at there"]
    refusals = ["refuse_unserved", "refuse_unservable", "refuse_artifact_here"] if program else []
    assert checked == ["locked", *refusals, "written"]
    build = "" if program is None else ", cpu build" if program.cpu else ", gpu build"
    assert record.device == f"a card{build}"
    plain = f"transformers {version('transformers')}, with dequantized weights"
    assert record.engine == ("vllm 0.32.0" if program else plain)
    assert (record.tokens, record.requests, record.flags, record.source) == (9, 2, ("--x",), FIGURES)
    alone = bench_artifact(SpeedRequest(tmp_path, program, SpeedSettings(), alone=True), ignore)
    assert alone.source is None
    assert measured[2:] == [f"{kind} {tmp_path}"]


@pytest.mark.parametrize("is_artifact", [False, True])
def test_a_server_is_started_with_the_plugin_only_for_an_artifact_that_needs_it(
    is_artifact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[dict[str, Any]] = []
    checkpoint = SimpleNamespace(folder=tmp_path / "m", config={})
    manifest = SimpleNamespace(kv_cache="fp8")
    monkeypatch.setattr(speed, "open_source", lambda model: (checkpoint, "family"))
    monkeypatch.setattr(speed, "questions", lambda artifact, sources, count: samples(count))
    monkeypatch.setattr(speed.Artifact, "open", lambda folder: SimpleNamespace(manifest=manifest))
    monkeypatch.setattr(speed, "launch", lambda *places, **options: launched.append(options) or "command")
    monkeypatch.setattr(speed, "needs_plugin", lambda artifact: True)
    monkeypatch.setattr(speed, "with_plugin", lambda command, version: f"{command} with plugin for {version}")
    monkeypatch.setattr(speed, "serve_and_measure", lambda *arguments: arguments)
    events = list[Event]()
    for cpu in (False, True):
        request = SpeedRequest(tmp_path, Program("vllm", "0.32.0", cpu), SpeedSettings(), extra=("--x",))
        model = str(tmp_path if is_artifact else tmp_path / "other")
        command, family, asked, _, gpu, log, _ = speed._in_vllm(request, events.append, model)  # type: ignore[misc]
        assert command == ("command with plugin for 0.32.0" if is_artifact else "command")
        assert (family, len(asked), gpu) == ("family", 16, not cpu)
        assert log.name == "engine.log"
        assert not log.parent.exists()
    assert launched[0]["extra"] == ("--x",)
    assert [event.message for event in events] == ["starting vllm 0.32.0 on m"] * 2


def test_a_report_that_is_kept_and_a_baseline_alone_are_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    opened: Any = ("checkpoint", "recipe", {"vqa": []})
    monkeypatch.setattr(Reevaluation, "_opened", lambda self: nullcontext(opened))
    monkeypatch.setattr(
        reevaluation, "measure", lambda *arguments, **options: calls.append((arguments, options)) or "r"
    )
    stored = [False, True]
    monkeypatch.setattr(reevaluation, "store_report", lambda artifact, report: stored.pop())
    events = list[Event]()
    recipe: Any = None
    store = Store(tmp_path)
    job = Reevaluation(tmp_path, recipe, CPU, events.append, (), store, other_baseline=True)
    report: Any = job.measure()
    assert (report, events) == ("r", [])
    arguments, options = calls[0]
    assert arguments == ("checkpoint", tmp_path, {"vqa": []}, "recipe", CPU, job.on_event)
    assert options == {"store": store, "servers": None, "cluster": None, "sources": (), "other_baseline": True}
    job.measure()
    assert [(event.stage, event.done, event.total) for event in events] == [("note", 0, 0)]
    assert events[0].message == "the artifact keeps its report, which is on more samples than these"
    monkeypatch.setattr(reevaluation, "answerers", lambda *_: ("the source", "the artifact"))
    monkeypatch.setattr(reevaluation, "picture_keys", lambda samples: {"vqa": ["key"]})
    monkeypatch.setattr(reevaluation, "collect_answers", lambda *arguments: calls.append(arguments))
    job.collect_baseline()
    assert calls[-1] == ("the source", {"vqa": []}, {"vqa": ["key"]}, store, job.on_event)


def no_memory(*arguments: Any) -> None:
    raise MemoryError


@pytest.mark.parametrize("stored", [False, True])
def test_an_evaluation_out_of_memory_says_what_is_kept(
    stored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [Step("plan", 0, 0, 1.0), Step("evaluate", 3 * 2**30, 2**31, 1.0)]
    plan = SimpleNamespace(steps=steps, recipe="its recipe")
    checked: list[Any] = []
    monkeypatch.setattr(reevaluation, "prepare", lambda recipe, device: (plan, "checkpoint"))
    monkeypatch.setattr(reevaluation, "reading", lambda folder, on_event: nullcontext(checked.append("locked")))
    monkeypatch.setattr(reevaluation.Artifact, "open", lambda folder: "artifact")
    monkeypatch.setattr(reevaluation, "require_source", lambda *arguments: checked.append(arguments[:3]))
    monkeypatch.setattr(reevaluation, "evaluation_samples", lambda plan, sources: {"vqa": []})
    monkeypatch.setattr(reevaluation, "refuse_calibration_pictures", lambda artifact, samples: checked.append(samples))
    recipe: Any = None
    job = Reevaluation(tmp_path, recipe, CPU, ignore, store=Store(tmp_path / "answers") if stored else None)
    with job._opened() as made:
        assert made == ("checkpoint", "its recipe", {"vqa": []})
        assert checked == ["locked", ("artifact", "checkpoint", False), {"vqa": []}]
    monkeypatch.setattr(reevaluation, "evaluation_samples", no_memory)
    with pytest.raises(MemoryShortage, match=r"evaluate: .* predicted to take 2\.00 GiB") as caught, job._opened():
        pass
    hint = str(caught.value.hint)
    assert ("the same command resumes; use a smaller --eval-batch" in hint) is stored
    assert hint.endswith("use a smaller --eval-batch or fewer --eval-samples")


def test_an_answer_of_a_server_gets_half_of_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    family = SimpleNamespace(tasks=("vqa",))
    served: dict[str, Any] = {"id": "m"}
    server: Any = SimpleNamespace(served=lambda: served, lacks_start=lambda name: name == "m")
    monkeypatch.setattr(picture_question, "open_source", lambda model, headers_only: (None, family))

    class Served:
        def __init__(self, server: Any, wording: Any, name: str, lacks_start: bool) -> None:
            assert (wording, name, lacks_start) == (family, "m", True)

        def stream(self, sample: str, longest: int, on_text: Any) -> str:
            return f"{sample} {longest}"

    monkeypatch.setattr(picture_question, "ServedPredictor", Served)
    request: Any = SimpleNamespace(sample="s", longest=100, wording=lambda family: family)
    for context, longest in ((None, 100), (150, 75), (1000, 100), (1, 1)):
        served["max_model_len"] = context
        assert picture_question.ask_server("m", request, server, ignore) == f"s {longest}"  # type: ignore[arg-type]
    family.tasks = ("retrieval",)
    family.name = "blip2-itm"
    with pytest.raises(DataError, match="models of the family blip2-itm do not answer with text"):
        picture_question.ask_server("m", request, server, ignore)  # type: ignore[arg-type]


def test_anonymous_memory_is_read_from_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"/proc/7/status": "VmRSS: 9 kB\nRssAnon:\t  12 kB\nRssFile: 3 kB\n", "/proc/8/status": "Name: x\n"}

    def read(path: Path, encoding: str) -> str:
        if str(path) not in texts:
            raise FileNotFoundError(path)
        return texts[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    assert [step_clock.anonymous_bytes(process) for process in (7, 8, 9)] == [12 * 1024, 0, 0]


def test_a_clock_gives_time_and_peaks_to_the_innermost_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now, peaks, resets = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0, 40.0, 41.0]), [(5, 7)], list[Device]()
    monkeypatch.setattr(step_clock, "time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(step_clock, "peak_bytes", lambda device: peaks[0])
    monkeypatch.setattr(step_clock, "anonymous_bytes", lambda: 0)
    monkeypatch.setattr(step_clock, "reset_peak", resets.append)
    clock = step_clock.Clock(CPU)
    with clock.step("outer"):
        with clock.step("inner"):
            peaks[0] = (9, 6)
        peaks[0] = (4, 8)
    assert clock.steps == (Step("outer", 5, 8, 2.0 + 8.0), Step("inner", 9, 6, 4.0))
    clock._host_peak = 100
    with clock.step("outer"):
        pass
    assert clock.steps[0] == Step("outer", 5, 8, 10.0 + 9.0)
    assert resets == [CPU] * 6
    clock._lap()  # outside of every step
    assert len(clock.steps) == 2


def test_a_step_that_takes_nothing_has_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_clock, "time", SimpleNamespace(monotonic=lambda: 5.0))
    monkeypatch.setattr(step_clock, "peak_bytes", lambda device: (0, 0))
    monkeypatch.setattr(step_clock, "anonymous_bytes", lambda: 0)
    clock = step_clock.Clock(CPU)
    with clock.step("plan"):
        pass
    assert clock.steps == (Step("plan", 0, 0, 0.0),)


# Samples


def recipe_of(*tasks: str, calibrated: tuple[str, ...] = ("vqa",), samples: int = 4, test: Any = None) -> Any:
    """A recipe with gates of these tasks."""
    return SimpleNamespace(
        gates=[SimpleNamespace(task=task) for task in tasks],
        calibration=SimpleNamespace(tasks=calibrated, samples=samples, data="training", seed=3),
        evaluation=SimpleNamespace(seed=7, data=test, samples=5),
    )


class Data:
    """A stand-in for the data: which (task, split) have samples; records what is read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *having: tuple[str, str]) -> None:
        self.having, self.read = set(having), list[Any]()
        monkeypatch.setattr(data, "samples_from", self._samples)
        monkeypatch.setattr(data, "places", lambda text: (SimpleNamespace(name=text, path=None),))

    def _samples(self, specs: Any, task: str, split: str, count: int, seed: int) -> list[Sample]:
        self.read.append((specs[0].name, task, split, count, seed))
        if (task, split) not in self.having:
            raise DataError(f"no {task} {split}", "look")
        return samples(count, task)


def test_tasks_of_a_recipe_that_the_data_has(monkeypatch: pytest.MonkeyPatch) -> None:
    having = Data(monkeypatch, ("vqa", "test"), ("vqa", "train"), ("captioning", "test"))
    gates = recipe_of("vqa", "captioning", "vqa", "retrieval")
    assert pipeline_samples.tasks_with_samples(gates, ()) == ("vqa", "captioning")
    both = recipe_of("vqa", "captioning", calibrated=("vqa", "captioning"), test="tests")
    having.read.clear()
    assert pipeline_samples.tasks_with_samples(both, ()) == ("vqa",)
    assert having.read == [
        ("training", "vqa", "train", 1, 7),
        ("tests", "vqa", "test", 1, 7),
        ("training", "captioning", "train", 1, 7),
    ]
    having.having = {("vqa", "train")}
    assert pipeline_samples.tasks_with_samples(recipe_of("vqa"), ()) == ()
    assert pipeline_samples.tasks_with_samples(recipe_of("vqa"), (), skip_evaluation=True) == ("vqa",)
    mine: Any = (SimpleNamespace(name="mine", path=None),)
    having.read.clear()
    pipeline_samples.tasks_with_samples(both, mine)
    assert {read[0] for read in having.read} == {"mine"}


def test_calibration_samples_alternate_between_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    having = Data(monkeypatch, ("vqa", "train"), ("captioning", "train"))
    mixed = recipe_of("vqa", calibrated=("vqa", "captioning"), samples=3)
    identities = [sample.identity for sample in pipeline_samples.training_samples(mixed, ())]
    assert identities == ["vqa 0", "captioning 0", "vqa 1"]
    assert having.read == [("training", task, "train", 2, 3) for task in ("vqa", "captioning")]
    plan: Any = SimpleNamespace(recipe=mixed, needs_calibration=True)
    assert len(pipeline_samples.calibration_samples(plan, ())) == 3
    plan.needs_calibration = False
    assert pipeline_samples.calibration_samples(plan, ()) == []
    monkeypatch.setattr(data, "samples_from", lambda *arguments: [])
    with pytest.raises(DataError, match="no calibration samples for vqa, captioning"):
        pipeline_samples.training_samples(mixed, ())


def test_an_evaluation_reads_the_tasks_of_gates_or_those_of_the_family(monkeypatch: pytest.MonkeyPatch) -> None:
    having = Data(monkeypatch, ("vqa", "test"), ("captioning", "test"), ("retrieval", "test"))

    def tasks(recipe: Any, name: str = "coco") -> list[str]:
        plan: Any = SimpleNamespace(recipe=recipe, family=SimpleNamespace(tasks=("captioning", "vqa")))
        sources: Any = (SimpleNamespace(name=name, path=None),)
        return list(pipeline_samples.evaluation_samples(plan, sources))

    assert tasks(recipe_of("vqa", "retrieval", "vqa")) == ["vqa", "retrieval"]
    assert having.read[0] == ("coco", "vqa", "test", 5, 7)
    assert tasks(recipe_of()) == ["captioning", "vqa"]
    assert tasks(recipe_of("vqa", "captioning"), "drawings") == ["vqa"]
    assert tasks(recipe_of("captioning"), "drawings") == ["vqa"]
    having.having = set()
    with pytest.raises(DataError, match="no vqa test") as caught:
        tasks(recipe_of("vqa", "retrieval"))
    assert str(caught.value.hint).startswith("look; the recipe's gates need samples of vqa and retrieval: give data")


def test_the_data_of_a_plan_are_counted_by_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "notes", lambda calibration, tested: (f"{len(calibration)} and {len(tested)}",))
    monkeypatch.setattr(pipeline_samples, "task_of", lambda sample: sample.identity.split()[0])
    given = pipeline_samples.ExportSamples([], [], {"vqa": samples(1200), "captioning": samples(3, "captioning")})
    assert pipeline_samples.data_lines(given) == [
        "data: calibration none; test 3 captioning, 1,200 vqa; no shared picture",
        "0 and 1203",
    ]


@pytest.mark.parametrize(
    ("missing", "having", "option"),
    [
        (("no captions", "look"), ("vqa",), "add `--task vqa`: the job then needs only what this data has, and drops"),
        (("no captions", None), ("vqa", "retrieval"), "add `--task vqa --task retrieval`: the job"),
        (("no captions", "look"), (), ""),  # no task has samples: an option does not help
        (("no captions", "look"), ("captioning", "retrieval", "vqa"), ""),
    ],
)
def test_data_without_a_task_leads_to_the_option_that_leaves_it_out(
    missing: tuple[str, str | None], having: tuple[str, ...], option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_samples, "tasks_with_samples", lambda *arguments: having)
    recipe = recipe_of("vqa", "captioning", "retrieval")
    with pytest.raises(DataError) as caught, pipeline_samples._offering_tasks(recipe, (), False):
        raise DataError(*missing)
    assert caught.value.message == "no captions"
    hint = caught.value.hint or ""
    assert hint.startswith(option)
    assert hint.endswith("look" if missing[1] else "other tasks")
    assert ("--task" in hint) == bool(option)


# The check of a data source


def split(task: str, name: str, available: int = 0, refusal: str = "") -> SplitCheck:
    return SplitCheck(task, name, available, min(available, 2), refusal)


def test_a_task_is_usable_with_both_splits() -> None:
    parts = (
        split("vqa", "train", 5),
        split("vqa", "test", 2),
        split("captioning", "train", 3),
        split("captioning", "test", 0, "no captions"),
        split("retrieval", "test", 3),
    )
    checked = DataCheck("mine", parts, (), ())
    assert checked.tasks == {"vqa": True, "captioning": False, "retrieval": False}
    assert (checked.usable, checked.trainable) == (("vqa",), ("vqa", "captioning"))
    checked.raise_unless_usable()
    with pytest.raises(DataError, match="mine has 2 unusable rows") as caught:
        DataCheck("mine", parts, ("line 1: x", "line 2: y"), ()).raise_unless_usable()
    assert caught.value.hint == "correct the rows listed above"
    empty = DataCheck("mine", (parts[3], split("vqa", "test", 0, "no questions"), parts[3]), (), ())
    with pytest.raises(DataError) as caught:
        empty.raise_unless_usable()
    assert str(caught.value).splitlines() == ["mine has no samples:", "  no captions", "  no questions"]
    assert [unusable_rows(count) for count in (0, 1, 2)] == ["no unusable row", "1 unusable row", "2 unusable rows"]


def test_every_task_and_split_of_a_source_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(name: str, path: Path, task: str, part: str, most: int, seed: int) -> list[Sample]:
        assert (name, path, most, seed) == ("folder", Path("x"), 3, 0)
        if task == "captioning":
            raise DataError("no captions")
        if part == "train":
            error = DataError("2 unusable rows")
            error.problems = ("line 1: a", "line 2: b")
            raise error
        return samples(3)

    monkeypatch.setattr(data, "samples", read)
    monkeypatch.setattr(data, "notes", lambda calibration, tested: (f"{len(tested)} read",))
    source: Any = SimpleNamespace(name="folder", path=Path("x"), tasks=("vqa", "captioning"))
    events = list[Event]()
    checked = check_data(source, 3, 2, events.append)
    assert {(part.task, part.split): (part.available, part.opened, part.refusal) for part in checked.splits} == {
        ("vqa", "train"): (0, 0, "2 unusable rows"),
        ("vqa", "validation"): (3, 3, ""),
        ("vqa", "test"): (3, 3, ""),
        **{("captioning", part): (0, 0, "no captions") for part in SPLITS},
    }
    assert (checked.problems, checked.has_samples) == (("line 1: a", "line 2: b"), True)
    assert [len(part.examples) for part in checked.splits] == [0, 2, 2, 0, 0, 0]
    assert [(event.stage, event.done, event.total, event.message) for event in events] == [
        ("data", done, 6, "folder") for done in range(7)
    ]
    assert checked.notes == ("6 read",)


def test_examples_whose_picture_cannot_be_opened_are_left_out() -> None:
    def broken() -> Any:
        raise OSError

    good, bad = samples(1)[0], Sample("bad", broken, "?", ("x",))
    part = SplitCheck("vqa", "test", 2, 2, "", (bad, good))
    assert list(opened((part,))) == [(part, good)]


def test_options_make_recipes_fit_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    gates = {"a": ("vqa", "captioning"), "b": ("vqa",), "c": ("retrieval",), "llava-w4-vit8": ("captioning", "vqa")}
    monkeypatch.setattr(data_coverage, "recipes_for", lambda model: tuple(gates) if model is None else ("a", "b"))
    monkeypatch.setattr(data_coverage, "load_recipe", lambda name: recipe_of(*gates[name]))
    covered = data_coverage.covered_recipes(["vqa"], ["vqa", "captioning"])
    assert covered.options == {"a": ("--task", "vqa"), "b": (), "llava-w4-vit8": ("--task", "vqa")}
    assert covered.lines() == [
        "recipes that this data covers: b",
        "recipes that this data covers with --task vqa: a, llava-w4-vit8",
    ]
    only_train = data_coverage.covered_recipes([], ["captioning"])
    assert only_train.options["a"] == ("--task", "captioning", "--skip-evaluation")
    assert data_coverage.covered_recipes(["vqa", "captioning"], []).options["a"] == ()
    assert data_coverage.covered_recipes([], []).commands("mine") == []
    monkeypatch.setattr(data_coverage, "MODELS", ("demo-x", "demo-y"))
    words = ["--recipe", "a", "--model", "demo-x", "--data", "mine", "--task", "vqa"]
    assert data_coverage.Coverage({"a": ("--task", "vqa")}).commands("mine") == [["plan", *words], ["export", *words]]
    assert data_coverage.first_recipe("m") == "a"
    monkeypatch.setattr(data_coverage, "recipes_for", lambda model: tuple(gates))
    assert data_coverage.first_recipe("m") == "llava-w4-vit8"
    monkeypatch.setattr(data_coverage, "recipes_for", lambda model: ())
    assert data_coverage.first_recipe("m") == ""


def test_a_check_is_stored_with_the_weights_that_were_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored: list[Any] = []
    monkeypatch.setattr(serving_check, "reading", lambda folder, on_event: nullcontext())
    monkeypatch.setattr(serving_check, "load_processor", lambda folder: "processor")
    monkeypatch.setattr(serving_check, "check", lambda *arguments, control: (*arguments, control))
    monkeypatch.setattr(serving_check, "store_result", lambda *arguments: stored.append(arguments))
    monkeypatch.setattr(serving_check, "weights_digest", lambda artifact: f"digest of {artifact}")
    monkeypatch.setattr(serving_check.Artifact, "open", lambda folder: "artifact")
    settings: Any = SimpleNamespace(on_event=ignore)
    checked: Any = serving_check.check_artifact(tmp_path, [], settings, control=False)
    assert checked == (tmp_path, [], "processor", settings, False)
    assert stored == [(tmp_path, checked, "digest of artifact")]


# The order of an export


def test_an_export_refuses_its_places_before_the_model_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only needs the command line is refused at once, and what needs the plan before the work."""
    calls: list[Any] = []

    class Destination:
        work = tmp_path / "work"

        def __init__(self, out: Path, work: Path, overwrite: bool) -> None:
            assert (out, work, overwrite) == (tmp_path / "out", tmp_path / "out.work", True)

        def refuse_places(self, *places: Any) -> None:
            calls.append(("places", *places))

        def refuse_inputs(self, paths: Any) -> None:
            calls.append(("inputs", *paths))

        def refuse_occupied(self, digest: str, fingerprint: str | None = None) -> None:
            calls.append(("occupied", digest, fingerprint))

        def reserved(self, on_event: Any) -> Any:
            calls.append("reserved")
            return nullcontext()

    plan = SimpleNamespace(steps=(), recipe=SimpleNamespace(digest=lambda: "planned"), family="family")
    adapter = SimpleNamespace(folder="adapter")
    checkpoint = SimpleNamespace(
        folder="model", adapter=adapter, paths=lambda: ["shard"], start_hashing=lambda: calls.append("hashing")
    )
    job = SimpleNamespace(fingerprint="f")
    monkeypatch.setattr(export_job, "Destination", Destination)
    monkeypatch.setattr(export_job, "data_paths", lambda recipe, sources: ["pictures"])
    monkeypatch.setattr(export_job, "with_suitable_data", lambda recipe: plan.recipe)
    monkeypatch.setattr(export_job, "prepare", lambda *_, **options: calls.append("prepare") or (plan, checkpoint))
    monkeypatch.setattr(export_job, "refuse_shortage", lambda steps, device: calls.append("shortage"))
    monkeypatch.setattr(export_job, "read_samples", lambda *_: calls.append("samples"))
    monkeypatch.setattr(export_job, "_announce", lambda *_: calls.append("announce"))
    monkeypatch.setattr(export_job, "_prepared", lambda *_: job)
    monkeypatch.setattr(export_job, "verify_existing", lambda *_: "verified before")
    monkeypatch.setattr(export_job, "remove_work", lambda *arguments: calls.append(("removed", *arguments[:2])))
    recipe: Any = "recipe"
    arguments: dict[str, Any] = {"device": CPU, "on_event": ignore, "overwrite": True, "skip_evaluation": True}
    result = export_job.export(recipe, out=tmp_path / "out", **arguments)
    assert (result.verified, result.report) == ("verified before", None)
    assert calls == [
        ("places",),
        ("inputs", "pictures"),
        ("occupied", "planned", None),
        "prepare",
        ("places", "model", "adapter"),
        ("inputs", "shard"),
        "hashing",
        "shortage",
        "reserved",
        "samples",
        "announce",
        ("occupied", "planned", "f"),
        ("removed", tmp_path / "work", "f"),
    ]
    calls.clear()
    export_job.export(recipe, out=tmp_path / "out", work=tmp_path / "out.work", **arguments)
    assert calls[-1] == ("occupied", "planned", "f")  # a folder that the user chose stays


def test_every_warning_of_an_export_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "notes", lambda calibration, tested: ("of data",))
    monkeypatch.setattr(
        export_job, "step_warnings", lambda steps, device, skip: tuple(f"{step.name} {skip}" for step in steps)
    )
    steps = [Step(name, 0, 0, 1.0) for name in ("write", "check", "verify")]
    plan: Any = SimpleNamespace(warnings=("of the plan",), steps=steps)
    events = list[Event]()
    given = pipeline_samples.ExportSamples([], [], {})
    export_job._announce(plan, given, CPU, True, events.append)
    assert [event.message for event in events] == ["of the plan", "write True", "verify True", "of data"]
    assert {event.stage for event in events} == {"note"}


@pytest.mark.parametrize(
    ("calibration", "evaluation", "loads"), [(0, {}, False), (1, {}, True), (0, {"vqa": ["s"]}, True)]
)
def test_a_processor_is_loaded_where_there_are_samples(
    calibration: int, evaluation: dict[str, Any], loads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Any] = []
    monkeypatch.setattr(export_job, "load_processor", lambda folder: f"processor of {folder}")
    monkeypatch.setattr(export_job, "refuse_too_long", lambda processor, *more: checked.append(processor))
    monkeypatch.setattr(export_job.identity, "of_job", lambda *arguments: {"job": arguments[2]})
    plan: Any = SimpleNamespace(family="family")
    checkpoint: Any = SimpleNamespace(folder="m")
    given = pipeline_samples.ExportSamples(samples(calibration), [], evaluation)
    events = list[Event]()
    job = export_job._prepared(plan, checkpoint, given, CPU, events.append)
    processor = "processor of m" if loads else None
    assert (job.processor, job.inputs) == (processor, {"job": processor})
    assert checked == [processor] * loads
    assert [event.stage for event in events] == ["prepare"] * 2 * loads


# Work folders


class Work(make_artifact.Workdir):
    """A work folder whose deletion is recorded."""

    cleared = 0

    def clear(self) -> None:
        Work.cleared += 1


def test_a_model_that_changed_during_the_job_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    current = {"shards": "a", "config": "b"}
    monkeypatch.setattr(make_artifact, "of_source", lambda checkpoint: current)
    job: Any = SimpleNamespace(checkpoint=SimpleNamespace(origin="org/x"), inputs={**current, "other": "c"})
    work = Work(tmp_path, "f")
    make_artifact._require_unchanged(job, work)
    assert Work.cleared == 0
    current["shards"] = "changed"
    with pytest.raises(CheckpointError, match=r"org/x changed while the job ran: .*shards"):
        make_artifact._require_unchanged(job, work)
    assert Work.cleared == 1  # its blocks are of another model


def test_the_work_folder_of_another_job_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = list[Event]()
    work = tmp_path / "work"
    work.mkdir()
    make_artifact.remove_work(work, "f", events.append)
    assert work.is_dir()  # it has no job
    (work / make_artifact.JOB).write_text("{}")
    monkeypatch.setattr(make_artifact, "fingerprint_of", lambda content: "f")
    make_artifact.remove_work(work, "other", events.append)
    assert work.is_dir()

    def damaged(content: Any) -> str:
        raise DataError("damaged")

    monkeypatch.setattr(make_artifact, "fingerprint_of", damaged)
    make_artifact.remove_work(work, "f", events.append)
    assert [event.message for event in events] == [f"{work} was not removed: damaged"]
    monkeypatch.setattr(make_artifact, "fingerprint_of", lambda content: "f")
    make_artifact.remove_work(work, "f", events.append)
    assert not work.exists()


# The dtype of an artifact


@pytest.mark.parametrize(
    ("rows", "tensors", "bfloat16", "narrowed", "note"),
    [
        ([("packed", BFLOAT16), ("kept", FLOAT32)], [BFLOAT16], False, None, ""),
        ([("packed", FLOAT16), ("packed", FLOAT32)], [FLOAT16], False, (), preparation.READ_IN_16_BITS),
        ([("packed", BFLOAT16), ("kept", FLOAT32)], [BFLOAT16], True, (), ""),
        ([("packed", FLOAT32)], [FLOAT32, FLOAT16], True, ("F32", "F16"), "float32 and float16 tensors"),
        ([("packed", FLOAT16)], [FLOAT16], True, ("F16",), "source's float16 tensors"),
    ],
)
def test_a_checkpoint_is_read_in_the_dtype_in_which_it_is_served(
    rows: list[Any],
    tensors: list[Dtype],
    bfloat16: bool,
    narrowed: tuple[str, ...] | None,
    note: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []

    def narrow(checkpoint: Any, name: str, *more: Any) -> str:
        calls.append((name, *more))
        return "narrowed"

    monkeypatch.setattr(preparation, "needs_bfloat16", lambda plan: bfloat16)
    monkeypatch.setattr(preparation, "narrowed", narrow)
    plan: Any = SimpleNamespace(
        rows=[SimpleNamespace(decision=decision, tensor=SimpleNamespace(dtype=dtype)) for decision, dtype in rows]
    )
    checkpoint: Any = SimpleNamespace(tensors={str(i): SimpleNamespace(dtype=x) for i, x in enumerate(tensors)})
    made, notes = preparation._in_served_dtype(plan, checkpoint)
    if narrowed is None:
        assert (made, calls, notes) == (checkpoint, [], ())
        return
    assert (made, len(notes)) == ("narrowed", bool(note))
    assert calls == [("bfloat16", narrowed) if bfloat16 else ("bfloat16",)]
    assert all(note in text for text in notes)


@pytest.mark.parametrize(
    ("data_of", "evaluation", "repo", "is_replaced"),
    [
        (("demo",), None, "org/x", True),
        (("demo",), None, "demo-llava", False),
        (("demo",), ("coco",), "org/x", False),
        (("demo", "coco"), None, "org/x", False),
    ],
)
def test_other_models_get_drawings_with_english_words(
    data_of: tuple[str, ...], evaluation: Any, repo: str, is_replaced: bool
) -> None:
    recipe = load_recipe("llava-w4").adjusted(
        calibration={"data": data_of}, evaluation={"data": evaluation}, model={"repo": repo}
    )
    suitable = preparation.with_suitable_data(recipe)
    assert (suitable is not recipe) is is_replaced
    if is_replaced:
        assert (suitable.calibration.data, suitable.evaluation.data) == (("drawings",), ("drawings",))


@pytest.mark.parametrize(
    ("servers", "cluster", "kind"), [("s", "c", "served"), (None, "c", "cluster"), (None, None, "local")]
)
def test_answers_come_from_servers_a_cluster_or_this_process(
    servers: Any, cluster: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = SimpleNamespace(family="family")
    monkeypatch.setattr(measurement.artifact.Artifact, "open", lambda out, device: opened)
    monkeypatch.setattr(measurement, "by_recipe", lambda family, recipe: f"{family} by recipe")
    for name in ("served", "cluster", "local"):
        answerers = lambda *arguments, name=name, **options: (name, arguments, options)  # noqa: E731
        monkeypatch.setattr(measurement, f"{name}_answerers", answerers)
    recipe: Any = SimpleNamespace(evaluation=SimpleNamespace(batch=3))
    checkpoint: Any = "checkpoint"
    made: Any = measurement.answerers(checkpoint, Path("out"), recipe, CPU, servers, ignore, cluster)
    arguments = {
        "served": (checkpoint, opened, "s", "family by recipe"),
        "cluster": ("c", checkpoint, Path("out"), recipe, CPU),
        "local": (checkpoint, opened, CPU, 3, ignore),
    }
    options = {"family": "family by recipe"} if kind == "local" else {}
    assert made == (kind, arguments[kind], options)
    assert measurement.default_store(Path("a/out")).folder == Path("a/.mmq-answers").absolute()
