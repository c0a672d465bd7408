"""Scores beside each other, gates, and one model asked through either back end with the same result."""

import json
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from exporter import backends, evaluate
from exporter.advice import advise, unknown
from exporter.answers import ABOUT, Backend, Store
from exporter.artifact import Artifact
from exporter.cli import cli
from exporter.data import image_key, places, samples_from
from exporter.device import choose
from exporter.errors import DataError, GateFailed
from exporter.evaluate import compare, raise_if_failed, write_report
from exporter.events import ignore
from exporter.export import default_store, export, measure, models
from exporter.predict_server import Server
from exporter.recipe import Gate, Recipe
from exporter.recipe_file import load_recipe
from exporter.source import open_source
from exporter.tasks.bleu import corpus_bleu
from exporter.tasks.sample import Sample
from tests.chat_server import ChatServer, chat_server
from tests.children import running_command

CPU = choose("cpu")


def sample(i: int, answer: str, kind: str = "") -> Sample:
    return Sample(f"s{i}", lambda: Image.new("RGB", (2, 2)), f"question {i}?", (answer,), kind)


def crafted(wrong_before: int, wrong_after: int, n: int = 50, **gate: Any) -> evaluate.Report:
    """VQA answers of which the first so many are wrong."""
    samples = {"vqa": [sample(i, "yes", "odd" if i % 2 else "even") for i in range(n)]}
    before = {"vqa": ["no"] * wrong_before + ["yes"] * (n - wrong_before)}
    after = {"vqa": ["no"] * wrong_after + ["yes"] * (n - wrong_after)}
    gates = [Gate(task="vqa", metric="accuracy", **{"max_drop": 0.1, **gate})]
    return compare(before, after, samples, gates, seed=3)


def test_means_drop_and_kinds() -> None:
    report = crafted(wrong_before=10, wrong_after=13)
    found = report.measures[0].difference
    assert (found.before, found.after) == (0.8, 0.74)
    assert found.drop == pytest.approx(0.06)
    assert report.by_kind["vqa"] == {"even": (0.8, 0.72, 25), "odd": (0.8, 0.76, 25)}
    assert report.counts == {"vqa": {"changed": 3, "lost": 3, "gained": 0}}
    assert [row["id"] for row in report.changed] == ["s10", "s11", "s12"]
    assert [row["id"] for row in report.examples] == ["s0", "s1", "s2", "s3"]
    assert report.changed[0] | {"references": ["yes"], "scores": [1.0, 0.0], "before": "yes", "after": "no"} == dict(
        report.changed[0]
    )


def test_a_gate_decides_by_the_share_that_is_lost() -> None:
    """3 of 40 right answers lost: 7.5 % of the score; its interval reaches beyond 10 %."""
    assert crafted(10, 13).verdicts[0].lost == pytest.approx(0.075)
    assert crafted(10, 13, max_drop=0.075001).passed
    assert not crafted(10, 13, max_drop=0.0749).passed
    upper = crafted(10, 13, decide="upper").verdicts[0]
    assert 0.1 < upper.lost < 0.2
    assert not upper.passed
    assert crafted(13, 10).verdicts[0].lost == pytest.approx(-3 / 37)


def test_two_samples_without_a_change_exclude_nothing() -> None:
    few, many = (crafted(0, 0, n=n, decide="upper", max_drop=0.01) for n in (2, 400))
    assert few.verdicts[0].lost == pytest.approx(1 - 0.025**0.5)
    assert not few.passed
    assert many.passed
    assert crafted(0, 0, n=2, max_drop=0.01).passed  # `decide: point` asks what was measured
    assert [report.measures[0].needed for report in (few, many)] == [368, 368]
    assert not crafted(0, 0, n=367, decide="upper", max_drop=0.01).passed
    assert crafted(0, 0, n=368, decide="upper", max_drop=0.01).passed


def test_a_baseline_of_zero_proves_nothing() -> None:
    report = crafted(50, 50)
    assert math.isnan(report.verdicts[0].lost)
    assert report.measures[0].needed is None
    assert json.loads(json.dumps(report.as_json(), allow_nan=False))["gates"][0]["lost"] is None
    with pytest.raises(GateFailed, match="nothing can be compared"):
        raise_if_failed(report, Path("out"))


def test_tasks_are_listed_in_turn_with_the_largest_losses_first() -> None:
    samples = {
        "captioning": [Sample(f"c{i}", lambda: Image.new("RGB", (2, 2)), None, (f"a dog {i}",)) for i in range(3)],
        "vqa": [sample(i, "yes") for i in range(3)],
    }
    before = {"captioning": ["a dog 0", "a dog 1", "cat"], "vqa": ["no", "yes", "no"]}
    after = {"captioning": ["a dog 0 and", "cat", "a dog 2"], "vqa": ["yes", "no", "no"]}
    listed = [row["id"] for row in compare(before, after, samples, [], 0).changed]
    assert listed == ["c1", "s1", "c0", "s0", "c2"]


def test_figures_of_the_whole_set_are_told_where_they_are_no_means() -> None:
    """BLEU of a corpus is not the mean of its captions' BLEU; an accuracy is the mean of its samples'."""
    texts = ["a red ball on the table", "two dogs run on a long beach", "a man rides one horse"]
    given = ["a red ball on the table", "two dogs run on a beach", "a man rides one"]
    made = [Sample(f"c{i}", lambda: Image.new("RGB", (2, 2)), None, (text,)) for i, text in enumerate(texts)]
    samples = {"captioning": made, "vqa": [sample(0, "yes")]}
    report = compare({"captioning": texts, "vqa": ["yes"]}, {"captioning": given, "vqa": ["yes"]}, samples, [], 0)
    words = [[one.split()] for one in texts]
    expected = [corpus_bleu([one.split() for one in listed], words) for listed in (texts, given)]
    assert [report.corpus["captioning"][f"bleu{n}"] for n in (1, 2, 3, 4)] == list(zip(*expected, strict=True))
    assert expected[1][3] < 0.9 < expected[0][3]
    assert "cider" not in report.corpus["captioning"]
    assert report.corpus["vqa"] == {}
    assert json.loads(json.dumps(report.as_json()))["corpus"]["captioning"]["bleu4"] == [one[3] for one in expected]


def test_a_new_report_keeps_what_the_engine_was_found_to_answer(tmp_path: Path) -> None:
    report = crafted(1, 2)
    write_report(tmp_path, report)
    path = tmp_path / "mmq_report.json"
    old = json.loads(path.read_text())
    assert "serving" not in old
    path.write_text(json.dumps(old | {"serving": {"ok": True}, "stale": 1}))
    write_report(tmp_path, report)
    assert json.loads(path.read_text()) == old | {"serving": {"ok": True}}


def test_a_report_on_more_samples_is_not_replaced_by_one_on_fewer(tmp_path: Path) -> None:
    large = crafted(1, 2)
    assert write_report(tmp_path, large)
    kept = (tmp_path / "mmq_report.json").read_text()
    measure = replace(large.measures[0], samples=large.measures[0].samples - 1)
    assert not write_report(tmp_path, replace(large, measures=(measure,)))
    assert (tmp_path / "mmq_report.json").read_text() == kept
    other = replace(large, measures=(measure,), about={"data": "coco"})  # other data says something else
    assert write_report(tmp_path, other)


@pytest.mark.parametrize(
    ("had", "has", "replaced"),
    [
        ([("captioning", "cider", 500)], [("captioning", m, 300) for m in ("cider", "bleu")], False),
        ([("captioning", m, 500) for m in ("cider", "bleu")], [("captioning", "cider", 500)], True),
        ([("vqa", "accuracy", 500), ("captioning", "cider", 500)], [("vqa", "accuracy", 500)], False),
        ([("vqa", "accuracy", 500), ("captioning", "cider", 500)], [("vqa", "accuracy", 900)], True),
        ([("vqa", "accuracy", 500)], [("captioning", "cider", 20), ("vqa", "accuracy", 500)], True),
    ],
)
def test_samples_are_counted_by_task_whatever_metrics_there_are(
    had: list[tuple[str, str, int]], has: list[tuple[str, str, int]], replaced: bool, tmp_path: Path
) -> None:
    report = crafted(1, 2)
    difference = report.measures[0].difference
    old, new = (replace(report, measures=tuple(evaluate.Measure(*one, difference) for one in m)) for m in (had, has))
    assert write_report(tmp_path, old)
    assert write_report(tmp_path, new) == replaced


def test_every_listed_sample_names_its_picture(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for i in range(2):
        Image.new("RGB", (2, 2), (i, 0, 0)).save(tmp_path / "pictures" / f"{i}.png")
    lines = [json.dumps({"file_name": f"pictures/{i}.png", "caption": f"a dog {i}"}) for i in range(2)]
    (tmp_path / "test").mkdir()
    (tmp_path / "pictures").rename(tmp_path / "test" / "pictures")
    (tmp_path / "test" / "metadata.jsonl").write_text("\n".join(lines))
    read = samples_from(places(tmp_path), "captioning", "test", 2, 0)
    answers = [[text] * 2 for text in ("a dog 0", "a cat")]
    report = compare({"captioning": answers[0]}, {"captioning": answers[1]}, {"captioning": read}, [], 0)
    for rows in (report.changed, report.examples):
        told = {(row["references"][0], row["image"], row["file"]) for row in rows}
        files = [f"test/pictures/{i}.png" for i in range(2)]
        assert told == {(f"a dog {i}", image_key(Image.open(tmp_path / files[i])), files[i]) for i in range(2)}


def test_a_plan_says_how_many_samples_a_gate_needs() -> None:
    recipe = load_recipe("llava-w4-vit8").adjusted(evaluation={"samples": 3842})
    (found,) = advise(recipe)  # of CIDEr nothing can be assumed
    assert (found.task, found.metric, found.needed) == ("vqa", "accuracy", 3842)
    assert found.half_width == pytest.approx(1.0, abs=1e-3)
    assert "3842 samples resolve one point" in str(found)
    assert unknown(recipe).startswith("captioning cider: ")


def test_retrieval_has_advice_and_captioning_says_why_not() -> None:
    found = advise(load_recipe("blip2-retrieval-w4"))
    assert [(one.task, one.metric, one.needed) for one in found] == [
        ("retrieval", "text_r1", 3842),
        ("retrieval", "image_r1", 3842),
    ]
    assert unknown(load_recipe("blip2-retrieval-w4")) == ""
    with_plan = CliRunner().invoke(cli, ["plan", "--model", "demo-llava", "--recipe", "llava-w4-vit8"])
    assert "after a first evaluation" in " ".join(with_plan.output.split())


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """Few bits, so that answers change."""
    data = load_recipe("llava-w3-vit4").model_dump()
    data["model"] |= {"repo": "demo-llava"}
    data["calibration"] |= {"samples": 4, "batch": 4}
    data["evaluation"] |= {"samples": 6, "batch": 4}
    return Recipe.model_validate(data)


@pytest.fixture(scope="module")
def out(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "artifact"
    export(recipe, out=folder, device=CPU, on_event=ignore, skip_evaluation=True)
    return folder


@pytest.fixture(scope="module")
def samples() -> dict[str, list[Sample]]:
    return {task: samples_from(places("demo"), task, "test", 6, 0) for task in ("vqa", "captioning")}


@pytest.fixture(scope="module")
def report(out: Path, recipe: Recipe, samples: dict[str, list[Sample]]) -> evaluate.Report:
    """By transformers, with answers kept in the default place."""
    return measure(open_source("demo-llava")[0], out, samples, recipe, CPU, ignore, store=default_store(out))


def test_kept_answers_give_the_same_report_without_loading_a_model(
    out: Path,
    recipe: Recipe,
    samples: dict[str, list[Sample]],
    report: evaluate.Report,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert report.about["models"]["artifact"]["weights"] != report.about["models"]["full precision"]["weights"]
    assert (report.about["seed"], report.about["bootstrap"]["seed"]) == (0, 0)

    def loaded(*arguments: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(backends, "load_whole", loaded)
    source = open_source("demo-llava")[0]
    assert measure(source, out, samples, recipe, CPU, ignore, store=default_store(out)) == report
    with pytest.raises(AssertionError, match="a model was loaded"):
        measure(source, out, samples, recipe, CPU, ignore)


def test_other_weights_are_asked_anew(out: Path, report: evaluate.Report) -> None:
    artifact = Artifact.open(out)
    kept = backends.weights_digest(artifact)
    assert kept == report.about["models"]["artifact"]["weights"]
    artifact.manifest.files["model.safetensors"] = "0" * 64
    assert backends.weights_digest(artifact) != kept


@contextmanager
def both_served(out: Path, recipe: Recipe, samples: dict[str, list[Sample]]) -> Iterator[list[ChatServer]]:
    """Two servers that answer as source and artifact really do."""
    family = open_source("demo-llava")[1]
    flat = [sample for found in samples.values() for sample in found]
    with chat_server(lambda *asked: "", "source") as first, chat_server(lambda *asked: "", "mine", "other") as second:
        for server, model in zip(
            (first, second), models(open_source("demo-llava")[0], out, recipe, CPU, None), strict=True
        ):
            with model.opened() as backend:
                server.answer = table(backend, flat, family)
        yield [first, second]


def table(backend: Backend, flat: list[Sample], family: Any) -> Any:
    said = {i: text for piece in backend.pieces(flat) for i, text in piece.items()}
    known = {(family.text(s.question), s.image().tobytes()): said[i] for i, s in enumerate(flat)}
    return lambda text, image: known[text, image.tobytes()]


def mmq(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_a_server_gives_the_scores_that_transformers_gives(
    out: Path, recipe: Recipe, samples: dict[str, list[Sample]], report: evaluate.Report, tmp_path: Path
) -> None:
    """Both models through servers, one after the other as on a machine with one GPU."""
    with both_served(out, recipe, samples) as (first, second):
        fixed = ["evaluate", out, "--answers", tmp_path, "--device", "cpu"]
        alone = mmq(*fixed, "--server", second.url, "--served-model", "mine")
        assert alone.exit_code == 1
        assert "with --baseline-server alone first" in alone.stderr
        kept = mmq(*fixed, "--baseline-server", first.url)
        assert "now serve the artifact" in kept.output
        asked = len(first.bodies)
        found = mmq(*fixed, "--server", second.url, "--served-model", "mine", "--json")
        assert found.exit_code in (0, 3), found.output
        assert len(first.bodies) == asked  # the baseline is not asked twice
        unnamed = mmq("evaluate", out, "--fresh", "--server", second.url, "--baseline-server", first.url)
        assert "it serves: mine, other" in unnamed.stderr
    said = json.loads(found.stdout.splitlines()[0])
    expected = json.loads(json.dumps(report.as_json()))
    assert {k: v for k, v in said.items() if k != "evaluation"} == {
        k: v for k, v in expected.items() if k != "evaluation"
    }
    assert said["evaluation"]["models"]["artifact"]["backend"] == "openai"
    assert {body["model"] for body in second.bodies} == {"mine"}


def test_a_server_that_serves_another_folder_is_refused(
    out: Path, recipe: Recipe, samples: dict[str, list[Sample]], tmp_path: Path
) -> None:
    with chat_server(lambda *asked: "x", root=str(tmp_path)) as server:
        both = backends.Servers(Server(server.url), Server(server.url))
        with pytest.raises(DataError, match=f"serves {tmp_path}, not"):
            measure(open_source("demo-llava")[0], out, samples, recipe, CPU, ignore, servers=both)
        server.models[0]["root"] = str(out)
        found = measure(
            open_source("demo-llava")[0], out, samples, recipe, CPU, ignore, servers=both, store=Store(tmp_path)
        )
    assert found.counts["vqa"]["changed"] == 0


@pytest.mark.parametrize(("suffix", "told"), [("png", "calibrated on as"), ("jpg", "looks like")])
def test_pictures_that_were_calibrated_on_prove_nothing(suffix: str, told: str, out: Path, tmp_path: Path) -> None:
    """Other data than the export's: the manifest alone knows what was calibrated on, exactly and as a copy."""
    (tmp_path / "test").mkdir()
    lines = []
    for i, s in enumerate(samples_from(places("demo"), "captioning", "train", 2, 0)):
        s.image().save(tmp_path / "test" / f"{i}.{suffix}", quality=95)
        about = {"file_name": f"{i}.{suffix}", "question": "what?", "answers": ["x"]}
        lines += [json.dumps(about), json.dumps({"file_name": f"{i}.{suffix}", "captions": ["x"]})]
    (tmp_path / "test" / "metadata.jsonl").write_text("\n".join(lines))
    kept = tmp_path / "answers"
    found = mmq("evaluate", out, "--data", tmp_path, "--answers", kept, "--device", "cpu")
    assert found.exit_code == 1
    assert "evaluation samples show a picture that is also calibrated on" in found.stderr
    assert told in found.stderr
    assert not kept.exists()


def test_half_named_servers_are_wrong_usage(out: Path) -> None:
    assert mmq("evaluate", out, "--served-model", "x").exit_code == 2
    assert mmq("evaluate", out, "--fresh", "--server", "http://127.0.0.1:1").exit_code == 2


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_evaluation_goes_on(how: signal.Signals, out: Path, report: evaluate.Report, tmp_path: Path) -> None:
    """Stopped after its first finished batches; the same command then asks the rest and finds the same."""
    store = tmp_path / "answers"
    arguments = ["evaluate", str(out), "--answers", str(store), "--device", "cpu", "--json"]
    with running_command(arguments, tmp_path) as command:
        command.wait_for('"evaluate", "done": 4')
        code = command.ended_by(how)
    if how == signal.SIGTERM:
        assert code == 130
        assert str(store) in json.loads(command.stdout.read_text())["error"]
    else:
        assert code == -how
    kept = [path for path in store.glob("*/*.json") if path.name != ABOUT]
    assert kept
    events = [json.loads(line) for line in mmq(*arguments).stderr.splitlines()]
    assert next(e["done"] for e in events if e["stage"] == "evaluate") >= 4
    assert json.loads((out / "mmq_report.json").read_text())["measures"] == report.as_json()["measures"]
