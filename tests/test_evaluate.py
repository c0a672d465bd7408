"""Evaluation: scores, gates, stored answers, and equal results from both back ends."""

import json
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from exporter.artifact.artifact import Artifact
from exporter.commands.main import cli
from exporter.data import image_key, places, samples_from
from exporter.data.tasks import retrieval
from exporter.data.tasks.bleu import corpus_bleu
from exporter.data.tasks.sample import Sample
from exporter.device import choose
from exporter.errors import EXIT_CODES, DataError, GateFailed, GateNotResolved
from exporter.evaluation import backends, judge
from exporter.evaluation.answers import ABOUT, Backend, Store
from exporter.evaluation.bootstrap import Difference, samples_to_exclude
from exporter.evaluation.evaluate import compare, raise_unless_accepted, store_report
from exporter.evaluation.evaluation_record import EvaluationRecord
from exporter.evaluation.gate_text import accepted, rounded_up, sentence
from exporter.evaluation.gates import Verdict
from exporter.evaluation.report_file import Counts, GateResult, Report, ServingRecord, read_report, write_report
from exporter.evaluation.sample_size import advise, too_few, unpredictable
from exporter.events import ignore
from exporter.model.inference.predict_server import Server
from exporter.model.source import open_source
from exporter.pipeline.export import export
from exporter.pipeline.measurement import answerers, default_store, measure
from exporter.planning.recipe import Gate, Recipe
from exporter.planning.recipe_file import load_recipe
from tests.chat_server import ChatServer, chat_server
from tests.children import running_command
from tests.published_artifact import bootstrap_once

CPU = choose("cpu")


@pytest.fixture(autouse=True)
def one_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several gates on the same scores resample them once."""
    monkeypatch.setattr("exporter.evaluation.judge.paired_bootstrap", bootstrap_once)


def sample(i: int, answer: str, kind: str = "") -> Sample:
    return Sample(f"s{i}", lambda: Image.new("RGB", (2, 2)), f"question {i}?", (answer,), kind)


def crafted(wrong_before: int, wrong_after: int, n: int = 50, **gate: Any) -> Report:
    """VQA answers with distinct right answers; the first `wrong_before` and `wrong_after` are wrong."""
    samples = {"vqa": [sample(i, f"right {i}", "odd" if i % 2 else "even") for i in range(n)]}
    right = [f"right {i}" for i in range(n)]
    before = {"vqa": ["no"] * wrong_before + right[wrong_before:]}
    after = {"vqa": ["no"] * wrong_after + right[wrong_after:]}
    gates = [Gate(task="vqa", metric="accuracy", **{"max_drop": 0.1, **gate})]
    return compare(before, after, samples, gates, seed=3)


def test_means_change_and_kinds() -> None:
    report = crafted(wrong_before=10, wrong_after=13)
    difference = report.measures[0].difference
    assert (difference.before, difference.after) == (0.8, 0.74)
    assert difference.change == pytest.approx(-0.06)
    assert report.by_kind["vqa"] == {"even": (0.8, 0.72, 25), "odd": (0.8, 0.76, 25)}
    assert report.counts["vqa"] == Counts(changed=3, lost=3, gained=0)
    assert [row.id for row in report.changed] == ["s10", "s11", "s12"]
    assert [row.id for row in report.examples] == ["s0", "s1", "s2", "s3"]
    first = report.changed[0]
    assert (first.references, first.scores, first.before, first.after) == (("right 10",), (1.0, 0.0), "right 10", "no")


def test_every_score_of_both_models_is_stored() -> None:
    scores = crafted(wrong_before=10, wrong_after=13).samples["vqa"]
    assert scores.ids == tuple(f"s{i}" for i in range(50))
    assert scores.scores["accuracy"].before == (0.0,) * 10 + (1.0,) * 40
    assert scores.scores["accuracy"].after == (0.0,) * 13 + (1.0,) * 37
    assert scores.changed == (10, 11, 12)
    assert scores.kinds[:2] == ("even", "odd")


def test_the_interval_decides_and_not_the_measured_change() -> None:
    """The artifact loses 50 of 1000 right answers: 5 %, interval -6.4 to -3.7 %."""
    verdicts = {max_drop: crafted(0, 50, 1000, max_drop=max_drop).gates[0] for max_drop in (0.03, 0.045, 0.055, 0.07)}
    assert [gate.verdict for gate in verdicts.values()] == ["failed", "not resolved", "not resolved", "passed"]
    gate = verdicts[0.055]
    assert gate.change == pytest.approx(-0.05)
    assert gate.low is not None
    assert gate.high is not None
    assert -0.065 < gate.low < -0.055 < gate.high < -0.035


def test_a_gate_decides_by_the_relative_loss() -> None:
    """The artifact loses 24 of 800 right answers of 1000 samples: 3 % of the score, 2.4 points."""
    gate = crafted(200, 224, 1000, max_drop=0.05).gates[0]
    assert gate.change == pytest.approx(-0.03)
    assert gate.verdict == "passed"
    assert crafted(200, 224, 1000, max_drop=0.01).gates[0].verdict == "failed"
    assert crafted(224, 200, 1000, max_drop=0.01).gates[0].change == pytest.approx(24 / 776)


def test_few_samples_resolve_nothing() -> None:
    few, many = (crafted(0, 0, n=n, max_drop=0.01) for n in (5, 400))
    gate = few.gates[0]
    assert (gate.verdict, gate.low) == ("not resolved", pytest.approx(-(1 - 0.025**0.2)))
    assert (few.passed, few.verdict) == (False, "not resolved")
    assert many.passed
    assert gate.samples_needed == 368
    needed = [report.measures[0].samples_to_resolve_one_percent for report in (few, many)]
    assert needed == [368, 368]
    assert crafted(0, 0, n=367, max_drop=0.01).verdict == "not resolved"
    assert crafted(0, 0, n=368, max_drop=0.01).verdict == "passed"


def test_the_estimated_number_of_samples_resolves_a_gate() -> None:
    """The artifact loses 7 of 500 answers, 3 % are allowed; the estimate is close to the smallest number that works."""
    gate = crafted(0, 7, 500, max_drop=0.02).gates[0]
    assert gate.verdict == "not resolved"
    needed = gate.samples_needed
    assert needed is not None
    assert crafted(0, round(needed * 1.1 * 0.014), round(needed * 1.1), max_drop=0.02).verdict == "passed"
    assert crafted(0, round(needed * 0.8 * 0.014), round(needed * 0.8), max_drop=0.02).verdict == "not resolved"
    assert f"about {rounded_up(needed):,} samples would resolve it (--eval-samples {rounded_up(needed)})" in sentence(
        gate
    )
    assert [rounded_up(n) for n in (7, 368, 3842, 3900)] == [7, 370, 3900, 3900]


def test_the_estimate_is_above_the_number_of_samples_that_did_not_resolve_the_gate() -> None:
    difference = Difference(1.0, 0.9, change=-0.1, low=-0.1, high=-0.1, sd=0.0)
    assert judge._to_resolve(difference, allowed=0.2, samples=5) == samples_to_exclude(0.2) == 17
    assert judge._to_resolve(difference, allowed=0.2, samples=1000) == 1001


def test_the_estimate_is_relative_to_the_full_precision_score() -> None:
    """Full precision has 800 of 1000 answers right: 2 % of its score are 0.016."""
    gate = crafted(200, 212, 1000, max_drop=0.02).gates[0]
    assert gate.verdict == "not resolved"
    margin, deviation = 0.016 - 0.012, (0.012 - 0.012**2) ** 0.5
    assert gate.samples_needed == pytest.approx((1.96 * deviation / margin) ** 2, rel=0.01)


def test_a_gate_that_ten_million_samples_do_not_resolve_is_too_close() -> None:
    for sd, known in ((15.0, True), (17.0, False)):  # 8.6 and 11.1 million samples for an interval of +- 0.01
        difference = Difference(1.0, 1.0, change=0.0, low=-0.1, high=0.1, sd=sd)
        assert (judge._for_one_percent(difference) is not None) is known
        assert (judge._to_resolve(difference, allowed=0.01, samples=5) is not None) is known
    gate = crafted(0, 7, 500, max_drop=0.02).gates[0].model_copy(update={"samples_needed": None})
    assert sentence(gate).endswith("; the measured change is too close to the bound for more samples to resolve it")


def test_the_recipe_decides_whether_a_gate_must_be_resolved() -> None:
    """`point` accepts a measured change within the bound; the verdict is still `not resolved`."""
    within, beyond = (
        {decide: crafted(0, lost, 100, decide=decide) for decide in ("upper", "point")} for lost in (7, 13)
    )
    assert {report.verdict for report in (*within.values(), *beyond.values())} == {"not resolved"}
    assert not any(report.passed for report in within.values())
    assert [accepted(report.gates[0]) for report in (*within.values(), *beyond.values())] == [False, True, False, False]
    raise_unless_accepted(within["point"], Path("out"))
    for report in (within["upper"], *beyond.values()):
        with pytest.raises(
            GateNotResolved, match=r"1 of 1 gates are not resolved\n  vqa accuracy: not resolved with 100"
        ):
            raise_unless_accepted(report, Path("out"))
    with pytest.raises(GateNotResolved) as caught:
        raise_unless_accepted(within["upper"], Path("my out"))
    needed = within["upper"].gates[0].samples_needed
    assert needed is not None
    assert f"`mmq evaluate 'my out' --eval-samples {rounded_up(needed)}` runs" in (caught.value.hint or "")
    failed, passed = crafted(0, 90, 100, decide="point"), crafted(0, 0, 100, decide="point")
    assert (failed.verdict, passed.verdict) == ("failed", "passed")
    raise_unless_accepted(passed, Path("out"))
    with pytest.raises(GateFailed, match="1 of 1 gates failed"):
        raise_unless_accepted(failed, Path("out"))


def test_a_gate_without_samples_says_so() -> None:
    gate = GateResult(task="vqa", metric="accuracy", max_drop=0.1, decide="upper", verdict="not measured")
    assert sentence(gate) == "vqa accuracy: not measured, the evaluation has no samples of this task"


def test_a_baseline_of_zero_is_not_comparable() -> None:
    report = crafted(50, 50)
    assert report.gates[0].verdict == report.verdict == "not comparable"
    assert report.measures[0].samples_to_resolve_one_percent is None
    assert json.loads(json.dumps(report.plain(), allow_nan=False))["gates"][0]["change"] is None
    with pytest.raises(GateNotResolved, match="scores 0, so a relative change is undefined") as raised:
        raise_unless_accepted(report, Path("out"))
    assert "bits" not in f"{raised.value.message} {raised.value.hint}"


def yes_or_no(share: float, n: int = 400) -> Report:
    """Yes/no questions with equal shares, and a model with the given accuracy on both."""
    samples = {"vqa": [sample(i, "yes" if i % 2 else "no") for i in range(n)]}
    right = [s.references[0] for s in samples["vqa"]]
    other = {"yes": "no", "no": "yes"}
    answers = {"vqa": [a if (i // 2) % 100 < 100 * share else other[a] for i, a in enumerate(right)]}
    return compare(answers, answers, samples, [Gate(task="vqa", metric="accuracy", max_drop=0.05)], seed=0)


def test_a_full_precision_model_at_chance_level_is_not_comparable() -> None:
    """Half of the answers are yes, so an accuracy of one half is chance level."""
    guessing = yes_or_no(0.5).gates[0]
    assert (guessing.verdict, guessing.before, guessing.chance) == ("not comparable", 0.5, 0.5)
    reason = (
        "the full-precision model scores at chance level (0.5000 on 400 samples; answers that ignore the picture score"
    )
    assert reason in sentence(guessing)
    assert sentence(guessing).endswith("so a relative change has no meaning; check prompt and data")
    assert yes_or_no(0.4).gates[0].verdict == "not comparable"
    assert yes_or_no(0.8).gates[0].verdict == "passed"
    with pytest.raises(GateNotResolved, match="1 of 1 gates could not be decided") as raised:
        raise_unless_accepted(yes_or_no(0.5), Path("out"))
    assert "mmq report" in str(raised.value.hint)
    assert "bits" not in f"{raised.value.message} {raised.value.hint}"


def test_a_captioner_that_ignores_its_pictures_is_at_chance_level() -> None:
    """One sentence for all pictures is at chance level; specific sentences score higher."""
    things = ["dog", "cat", "horse", "ball", "tree", "boat", "house", "plane", "train", "car"]
    texts = [f"a {color} {thing} on a hill" for color in ("red", "green", "blue", "small") for thing in things]
    samples = {
        "captioning": [Sample(f"c{i}", lambda: Image.new("RGB", (2, 2)), None, (t,)) for i, t in enumerate(texts)]
    }
    gates = [Gate(task="captioning", metric="cider", max_drop=0.2)]
    blind, seeing = ({"captioning": answers} for answers in (["a red dog on a hill"] * len(texts), texts))
    assert compare(blind, blind, samples, gates, 0).gates[0].verdict == "not comparable"
    good = compare(seeing, seeing, samples, gates, 0).gates[0]
    assert good.verdict == "passed"
    assert good.chance is not None
    assert good.before is not None
    assert 0 < good.chance < 0.5 * good.before


def test_ranks_at_random_are_chance_level() -> None:
    """Recall at 1 of 100 pictures with 2 texts each: 1 of 100 pictures, and 2 of 200 texts."""
    pooled = retrieval.with_pool(
        [Sample(f"r{i}", lambda: Image.new("RGB", (2, 2)), None, (f"text {i} a", f"text {i} b")) for i in range(100)]
    )
    gates = [Gate(task="retrieval", metric=metric, max_drop=0.2) for metric in ("text_r1", "image_r1", "r1")]
    lucky = {"retrieval": ["1 | 1 1"] + ["50 | 50 50"] * 99}
    report = compare(lucky, lucky, {"retrieval": pooled}, gates, 0)
    assert [gate.verdict for gate in report.gates] == ["not comparable"] * 3
    assert [gate.chance for gate in report.gates] == pytest.approx([0.01, 0.01, 0.01])
    good = {"retrieval": ["1 | 1 1"] * 60 + ["50 | 50 50"] * 40}
    assert [gate.verdict for gate in compare(good, good, {"retrieval": pooled}, gates, 0).gates] == ["passed"] * 3


def test_a_gate_without_samples_of_its_task_is_not_measured() -> None:
    gates = [Gate(task="vqa", metric="accuracy", max_drop=0.1), Gate(task="captioning", metric="cider", max_drop=0.1)]
    samples = {"vqa": [sample(i, f"right {i}") for i in range(100)]}
    answers = {"vqa": [f"right {i}" for i in range(100)]}
    report = compare(answers, answers, samples, gates, 0)
    assert [gate.verdict for gate in report.gates] == ["passed", "not measured"]
    assert (report.verdict, report.passed) == ("not measured", False)
    with pytest.raises(GateNotResolved, match="captioning cider: not measured"):
        raise_unless_accepted(report, Path("out"))


def test_changed_answers_alternate_between_tasks_with_the_largest_losses_first() -> None:
    samples = {
        "captioning": [Sample(f"c{i}", lambda: Image.new("RGB", (2, 2)), None, (f"a dog {i}",)) for i in range(3)],
        "vqa": [sample(i, "yes") for i in range(3)],
    }
    before = {"captioning": ["a dog 0", "a dog 1", "cat"], "vqa": ["no", "yes", "no"]}
    after = {"captioning": ["a dog 0 and", "cat", "a dog 2"], "vqa": ["yes", "no", "no"]}
    listed = [row.id for row in compare(before, after, samples, [], 0).changed]
    assert listed == ["c1", "s1", "c0", "s0", "c2"]


def test_corpus_metrics_are_listed_where_they_are_not_means() -> None:
    """BLEU of a corpus is not the mean of its captions' BLEU; an accuracy is the mean of its samples'."""
    texts = ["a red ball on the table", "two dogs run on a long beach", "a man rides one horse"]
    given = ["a red ball on the table", "two dogs run on a beach", "a man rides one"]
    captions = [Sample(f"c{i}", lambda: Image.new("RGB", (2, 2)), None, (text,)) for i, text in enumerate(texts)]
    samples = {"captioning": captions, "vqa": [sample(0, "yes")]}
    report = compare({"captioning": texts, "vqa": ["yes"]}, {"captioning": given, "vqa": ["yes"]}, samples, [], 0)
    words = [[text.split()] for text in texts]
    expected = [corpus_bleu([text.split() for text in listed], words) for listed in (texts, given)]
    assert [report.corpus["captioning"][f"bleu{n}"] for n in (1, 2, 3, 4)] == list(zip(*expected, strict=True))
    assert expected[1][3] < 0.9 < expected[0][3]
    assert "cider" not in report.corpus["captioning"]
    assert report.corpus["vqa"] == {}
    assert json.loads(json.dumps(report.plain()))["corpus"]["captioning"]["bleu4"] == [scores[3] for scores in expected]


def test_a_new_report_keeps_the_result_of_mmq_check(tmp_path: Path) -> None:
    report = crafted(1, 2)
    store_report(tmp_path, report)
    assert read_report(tmp_path) == (report, None)
    serving = ServingRecord(
        engine="1", build="cpu", questions=1, bound=0.1, problems=(), schemes={}, kernels=(), passed=True
    )
    write_report(tmp_path, None, serving)
    assert read_report(tmp_path) == (None, serving)
    store_report(tmp_path, report)
    assert read_report(tmp_path) == (report, serving)


def test_a_report_on_more_samples_is_not_replaced_by_one_on_fewer(tmp_path: Path) -> None:
    large, small = crafted(1, 2), crafted(1, 2, n=49)
    assert store_report(tmp_path, large)
    before = (tmp_path / "mmq_report.json").read_text()
    assert not store_report(tmp_path, small)
    assert (tmp_path / "mmq_report.json").read_text() == before
    other = small.model_copy(update={"evaluation": EvaluationRecord(data="coco")})  # other data says something else
    assert store_report(tmp_path, other)


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
    def of(measures: list[tuple[str, str, int]]) -> Report:
        (template,) = report.measures
        named = (template.model_copy(update={"task": t, "metric": m, "samples": n}) for t, m, n in measures)
        return report.model_copy(update={"measures": tuple(named)})

    report = crafted(1, 2)
    assert store_report(tmp_path, of(had))
    assert store_report(tmp_path, of(has)) == replaced


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
        shown = {(row.references[0], row.image, row.file) for row in rows}
        files = [f"test/pictures/{i}.png" for i in range(2)]
        assert shown == {(f"a dog {i}", image_key(Image.open(tmp_path / files[i])), files[i]) for i in range(2)}


def test_a_plan_reports_the_number_of_samples_that_a_gate_needs() -> None:
    recipe = load_recipe("llava-w4-vit8").adjusted(evaluation={"samples": 3842})
    (item,) = advise(recipe)  # of CIDEr nothing can be assumed
    assert (item.task, item.metric, item.needed) == ("vqa", "accuracy", 3842)
    assert item.half_width == pytest.approx(1.0, abs=1e-3)
    assert "3842 samples measure it to within one point" in str(item)
    assert unpredictable(recipe).startswith("captioning cider: ")


def test_a_plan_warns_about_gates_with_too_few_samples() -> None:
    """With the advised number of unchanged samples the gate passes; with one sample fewer it does not."""
    recipe = load_recipe("llava-w4-vit8")
    assert too_few(recipe) == ()
    (item,), (short,) = advise(recipe), advise(recipe, {"vqa": 12})
    assert (short.samples, short.half_width > item.half_width) == (12, True)
    assert "12 samples cannot resolve" in too_few(recipe, {"vqa": 12})[0]
    assert too_few(recipe, {"vqa": 12})[0].endswith("(the data has no more)")
    assert advise(recipe, {"vqa": 0}) == ()
    few = too_few(recipe.adjusted(evaluation={"samples": 100}))
    assert few == (
        "gate vqa accuracy: 100 samples cannot resolve a loss of 3.0%, which needs at least 122 (--eval-samples 122)",
    )
    assert [crafted(0, 0, n=n, max_drop=0.03).verdict for n in (121, 122)] == ["not resolved", "passed"]
    nothing = recipe.model_copy(update={"gates": (Gate(task="vqa", metric="accuracy", max_drop=0.0),)})
    assert "no number of samples" in too_few(nothing)[0]
    assert crafted(0, 0, n=600, max_drop=0.0).gates[0].verdict == "not resolved"
    arguments = ["plan", "--model", "demo-llava", "--recipe", "llava-w4-vit8", "--eval-samples", "100"]
    shown = CliRunner().invoke(cli, arguments)
    assert f"warning: {few[0]}" in " ".join(shown.output.split())
    assert json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)["too_few_samples"] == list(few)


def test_retrieval_has_advice_and_captioning_has_a_reason_for_none() -> None:
    items = advise(load_recipe("blip2-retrieval-w4"))
    assert [(item.task, item.metric, item.needed) for item in items] == [
        ("retrieval", "text_r1", 3842),
        ("retrieval", "image_r1", 3842),
    ]
    assert unpredictable(load_recipe("blip2-retrieval-w4")) == ""
    with_plan = CliRunner().invoke(cli, ["plan", "--model", "demo-llava", "--recipe", "llava-w4-vit8"])
    assert "after a first evaluation" in " ".join(with_plan.output.split())


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """An artifact with few bits, so that answers change."""
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
def report(out: Path, recipe: Recipe, samples: dict[str, list[Sample]]) -> Report:
    """An evaluation by transformers with the default answer store."""
    return measure(open_source("demo-llava")[0], out, samples, recipe, CPU, ignore, store=default_store(out))


def test_stored_answers_give_the_same_report_without_loading_a_model(
    out: Path,
    recipe: Recipe,
    samples: dict[str, list[Sample]],
    report: Report,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert report.evaluation.models["artifact"].weights != report.evaluation.models["full precision"].weights
    assert report.evaluation.bootstrap
    assert (report.evaluation.seed, report.evaluation.bootstrap.seed) == (0, 0)

    def loaded(*arguments: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(backends, "load_whole", loaded)
    source = open_source("demo-llava")[0]
    assert measure(source, out, samples, recipe, CPU, ignore, store=default_store(out)) == report
    with pytest.raises(AssertionError, match="a model was loaded"):
        measure(source, out, samples, recipe, CPU, ignore)


def test_other_weights_run_again(out: Path, report: Report) -> None:
    artifact = Artifact.open(out)
    digest = backends.weights_digest(artifact)
    assert digest == report.evaluation.models["artifact"].weights
    artifact.manifest.files["model.safetensors"] = "0" * 64
    assert backends.weights_digest(artifact) != digest


@contextmanager
def both_served(out: Path, recipe: Recipe, samples: dict[str, list[Sample]]) -> Iterator[list[ChatServer]]:
    """Two servers that give the answers of source and artifact."""
    family = open_source("demo-llava")[1]
    flat = [sample for of_task in samples.values() for sample in of_task]
    with (
        chat_server(lambda *request: "", "source") as first,
        chat_server(lambda *request: "", "mine", "other") as second,
    ):
        for server, model in zip(
            (first, second), answerers(open_source("demo-llava")[0], out, recipe, CPU, None), strict=True
        ):
            with model.opened() as backend:
                server.answer = table(backend, flat, family)
        yield [first, second]


def table(backend: Backend, flat: list[Sample], family: Any) -> Any:
    replies = {i: text for piece in backend.pieces(flat) for i, text in piece.items()}
    known = {(family.text(s.question), s.image().tobytes()): replies[i] for i, s in enumerate(flat)}
    return lambda text, image: known[text, image.tobytes()]


def mmq(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_a_server_gives_the_scores_that_transformers_gives(
    out: Path, recipe: Recipe, samples: dict[str, list[Sample]], report: Report, tmp_path: Path
) -> None:
    """Both models through servers, one after the other as on a machine with one GPU."""
    with both_served(out, recipe, samples) as (first, second):
        fixed = ["evaluate", out, "--answers", tmp_path, "--device", "cpu"]
        alone = mmq(*fixed, "--server", second.url, "--served-model", "mine")
        assert alone.exit_code == 1
        assert "with --baseline-server only, then serve the artifact" in alone.stderr
        first_run = mmq(*fixed, "--baseline-server", first.url)
        assert "now serve the artifact" in first_run.output
        requests = len(first.bodies)
        done = mmq(*fixed, "--server", second.url, "--served-model", "mine", "--json")
        assert done.exit_code == 5, done.output  # six samples resolve nothing
        assert len(first.bodies) == requests  # the baseline is not asked twice
        unnamed = mmq("evaluate", out, "--fresh", "--server", second.url, "--baseline-server", first.url)
        assert "it serves: mine, other" in unnamed.stderr
    printed = json.loads(done.stdout.splitlines()[0])
    expected = json.loads(json.dumps(report.plain()))
    assert {k: v for k, v in printed.items() if k != "evaluation"} == {
        k: v for k, v in expected.items() if k != "evaluation"
    }
    assert printed["evaluation"]["models"]["artifact"]["backend"] == "openai"
    assert {body["model"] for body in second.bodies} == {"mine"}


def test_a_server_that_serves_another_folder_is_refused(
    out: Path, recipe: Recipe, samples: dict[str, list[Sample]], tmp_path: Path
) -> None:
    with chat_server(lambda *request: "x", root=str(tmp_path)) as server:
        both = backends.Servers(Server(server.url), Server(server.url))
        with pytest.raises(DataError, match=f"serves {tmp_path}, not"):
            measure(open_source("demo-llava")[0], out, samples, recipe, CPU, ignore, servers=both)
        server.models[0]["root"] = str(out)
        report = measure(
            open_source("demo-llava")[0], out, samples, recipe, CPU, ignore, servers=both, store=Store(tmp_path)
        )
    assert report.counts["vqa"].changed == 0


@pytest.mark.parametrize(("suffix", "fragment"), [("png", "calibration sample"), ("jpg", "looks like")])
def test_calibration_pictures_are_refused_as_test_pictures(
    suffix: str, fragment: str, out: Path, tmp_path: Path
) -> None:
    """The evaluation data differ from the export's, so the manifest is the only record of calibration pictures."""
    (tmp_path / "test").mkdir()
    lines = []
    for i, s in enumerate(samples_from(places("demo"), "captioning", "train", 2, 0)):
        s.image().save(tmp_path / "test" / f"{i}.{suffix}", quality=95)
        about = {"file_name": f"{i}.{suffix}", "question": "what?", "answers": ["x"]}
        lines += [json.dumps(about), json.dumps({"file_name": f"{i}.{suffix}", "captions": ["x"]})]
    (tmp_path / "test" / "metadata.jsonl").write_text("\n".join(lines))
    store = tmp_path / "answers"
    done = mmq("evaluate", out, "--data", tmp_path, "--answers", store, "--device", "cpu")
    assert done.exit_code == 1
    assert "evaluation samples use a picture that is also used for calibration" in done.stderr
    assert fragment in done.stderr
    assert not store.exists()


def test_one_server_without_the_other_is_a_usage_error(out: Path) -> None:
    assert mmq("evaluate", out, "--served-model", "x").exit_code == 2
    assert mmq("evaluate", out, "--fresh", "--server", "http://127.0.0.1:1").exit_code == 2


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stopped_evaluation_resumes(how: signal.Signals, out: Path, report: Report, tmp_path: Path) -> None:
    """The command is stopped after its first batches; the same command runs the other samples with equal results."""
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
    files = [path for path in store.glob("*/*.json") if path.name != ABOUT]
    assert files
    lines = mmq(*arguments).stderr.splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{")]
    assert next(e["done"] for e in events if e["stage"] == "evaluate") >= 4
    assert json.loads((out / "mmq_report.json").read_text())["measures"] == report.plain()["measures"]


@pytest.mark.parametrize("verdict", ["passed", "failed", "not comparable", "not measured", "not resolved"])
def test_the_documented_exit_code_of_a_verdict_is_the_one_of_its_error(verdict: Verdict) -> None:
    """3: the loss is too large; 5: nothing failed, but a gate is not decided."""
    table = (Path(__file__).parent.parent / "docs" / "explanation" / "gates.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^\| \*\*([a-z ]+)\*\* \|.*\| (\d) \|$", table, re.MULTILINE))
    gate = crafted(50, 50).gates[0].model_copy(update={"verdict": verdict})
    report = crafted(50, 50).model_copy(update={"gates": (gate,), "verdict": verdict})
    code = 0
    try:
        raise_unless_accepted(report, Path("out"))
    except GateFailed as error:
        code = error.exit_code
    except GateNotResolved as error:
        code = error.exit_code
        assert EXIT_CODES[code][1].count(verdict) == 1
    assert documented[verdict] == str(code)
