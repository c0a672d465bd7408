"""Model cards and differences between artifacts: every figure comes from the manifest or the report."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCard, parse_eval_result_entries

from exporter.artifact.manifest import MANIFEST, Manifest
from exporter.commands.main import cli
from exporter.data import place
from exporter.errors import ArtifactError, PublishError
from exporter.evaluation.evaluation_record import EvaluationRecord
from exporter.evaluation.report_file import REPORT, ServingRecord
from exporter.publishing.artifact_diff import difference, flattened
from exporter.publishing.artifact_summary import Summary, component_of, folder_reader, read_place, read_summary
from exporter.publishing.card import RESULTS, CardDeclarations, benchmark_results, render
from exporter.publishing.card_table import table
from exporter.publishing.repository import package

REPO = "me/tiny"


@pytest.fixture(scope="module")
def exported(random_artifacts: Path) -> Path:
    """w4, w3: two artifacts of one source."""
    return random_artifacts


@pytest.fixture
def summary(exported: Path) -> Summary:
    return read_summary("w4", folder_reader(exported / "w4"))


def changed(summary: Summary, **values: Any) -> Summary:
    """A summary with changed manifest values."""
    manifest = Manifest.model_validate(summary.manifest.model_dump() | values, strict=False)
    return replace(summary, manifest=manifest)


def measured_on(summary: Summary, data: str) -> Summary:
    """A summary whose report names other data."""
    assert summary.report
    return replace(summary, report=summary.report.model_copy(update={"evaluation": EvaluationRecord(data=data)}))


def card(summary: Summary, declared: CardDeclarations | None = None, problems: tuple[str, ...] = ()) -> ModelCard:
    """The rendered card, parsed by the hub's library."""
    return ModelCard(render(REPO, summary, declared or CardDeclarations(), problems, ""))


def test_the_hub_library_reads_the_metadata(summary: Summary) -> None:
    declared = CardDeclarations("org/llava", {"license": "other", "license_name": "x"}, ("org/data",), ("en",))
    data = card(summary, declared).data
    assert data.base_model == "org/llava"
    assert data.to_dict()["base_model_relation"] == "quantized"
    assert (data.license, data.license_name) == ("other", "x")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-text-to-text")
    assert data.tags == ["vllm", "compressed-tensors", "w4a16", "rtn", "vision", "mmq"]
    (result,) = data.eval_results
    assert (result.task_type, result.metric_type) == ("visual-question-answering", "accuracy")
    assert result.metric_value == 0.88
    assert "500 samples" in result.dataset_name


def test_the_base_model_is_a_hub_id_or_absent(summary: Summary) -> None:
    assert card(summary).data.base_model is None
    assert "base_model_relation" not in card(summary).data.to_dict()
    from_hub = changed(summary, source={"model": "llava-hf/llava-1.5-7b-hf@abc", "shards": {}})
    assert card(from_hub).data.base_model == "llava-hf/llava-1.5-7b-hf"
    unusual = changed(summary, source={"model": "my@folder", "shards": {}})
    assert card(unusual).data.base_model is None


def test_the_card_lists_schemes_scores_and_provenance(summary: Summary) -> None:
    text = card(summary).text
    assert f"| language | {len(summary.manifest.linears)} | W4 g16 | rtn | packed |" in text
    assert "| vision |  | 16 bits, not quantized |" in text
    assert "| vqa | accuracy | 500 | 0.9000 | 0.8800 | 97.8% | -0.0200 | -0.0340 to -0.0080 |" in text
    assert "| vqa | accuracy | passed |" in text
    changed = "changed by -2.2% of the full-precision score (95 % interval -3.8% to -0.9%), allowed -5.0%"
    assert f"- vqa accuracy: passed: {changed}" in text
    assert f"vllm serve {REPO} --limit-mm-per-prompt" in text
    assert f"--model {REPO}" in text
    assert summary.manifest.recipe.sha256 in text
    assert "None: no method of this recipe needs data." in text
    assert "Published by force" not in text
    assert "humming" not in text.partition("## Hardware")[0]
    assert "needs the humming-kernels package" in text  # groups of 16


def test_the_request_of_the_card_has_no_field_besides_model_and_messages(summary: Summary) -> None:
    """The artifact's chat template writes the start token, so that no request needs `add_special_tokens`."""
    text = card(summary).text
    assert "add_special_tokens" not in text
    assert set(json.loads(text.partition("-d '")[2].partition("'\n```")[0])) == {"model", "messages"}


def test_calibration_and_measured_data_are_named(summary: Summary) -> None:
    calibration = {"data": "coco train2014", "seed": 7, "batch": 8, "samples": [{"id": "a", "image": "b" * 64}] * 3}
    with_data = changed(summary, provenance={"calibration": calibration, "device": "H100"})
    assert "3 training samples of coco train2014, selected with seed 7" in card(with_data).text
    assert summary.report
    unnamed = replace(with_data, report=summary.report.model_copy(update={"evaluation": EvaluationRecord()}))
    assert "answered the same samples (coco train2014)" in card(unnamed).text
    assert "answered the same samples (vqav2 val)" in card(measured_on(with_data, "vqav2 val")).text
    assert "drawings" not in card(measured_on(with_data, "vqav2 val")).text


def test_scores_on_the_built_in_drawings_are_marked(summary: Summary) -> None:
    drawings = measured_on(summary, "drawings")
    note = "Measured on mmq's built-in drawings of colored shapes: the scores show that the model works, not how much"
    assert note in card(drawings).text
    assert "answered the same samples (mmq's built-in drawings)" in card(drawings).text
    assert note not in card(measured_on(summary, "folder mine")).text
    embedded = changed(drawings, source={"model": "demo-llava", "shards": {}})
    assert note not in card(embedded).text  # it was trained on them


def test_a_card_without_report_states_that_there_was_no_evaluation(summary: Summary) -> None:
    bare = card(replace(summary, report=None), problems=("it was never evaluated\n  at all",))
    assert "The artifact was never evaluated." in bare.text
    assert "> - it was never evaluated\n> -   at all" in bare.text
    assert bare.data.eval_results is None
    assert "unproven" in bare.data.tags


def test_unusual_widths_need_a_newer_engine(exported: Path) -> None:
    text = card(read_summary("w3", folder_reader(exported / "w3"))).text
    assert "3-bit weights need vLLM 0.25.1 or later with `humming-kernels`" in text


def test_the_card_has_the_result_of_mmq_check(summary: Summary) -> None:
    serving = ServingRecord(
        engine="0.32.0", build="CPU", questions=8, bound=0.1, problems=(), schemes={}, kernels=(), passed=True
    )
    assert (
        "vLLM 0.32.0 (CPU) served this artifact and answered 8 questions"
        in card(replace(summary, serving=serving)).text
    )
    failing = serving.model_copy(update={"problems": ("x",)})
    assert "**differed from**" in card(replace(summary, serving=failing)).text


def test_benchmark_results_only_for_benchmarks(exported: Path, summary: Summary) -> None:
    declared = CardDeclarations(benchmarks={"vqa": ("org/VQA", "vqa_test")})
    with pytest.raises(PublishError, match="drawings, not on a benchmark data set"):
        package(exported / "w4", measured_on(summary, "drawings"), REPO, declared, (), None)
    measured = measured_on(summary, "vqav2 val")
    wrong = CardDeclarations(benchmarks={"captioning": ("org/COCO", "x")})
    with pytest.raises(PublishError, match="not measured on this task"):
        package(exported / "w4", measured, REPO, wrong, (), None)
    content = package(exported / "w4", measured, REPO, declared, (), None).files[RESULTS]
    assert isinstance(content, bytes)
    (entry,) = parse_eval_result_entries(yaml.safe_load(content))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("org/VQA", "vqa_test", 0.88)
    assert entry.notes == "accuracy, 500 samples, full precision 0.9000"
    assert RESULTS not in package(exported / "w4", measured, REPO, CardDeclarations(), (), None).files


def test_a_benchmark_has_the_first_metric_of_each_of_its_tasks() -> None:
    measures = [
        SimpleNamespace(task=task, metric=metric, samples=8, difference=SimpleNamespace(before=0.9, after=after))
        for task, metric, after in (
            ("vqa", "accuracy", 0.12345678),
            ("vqa", "anls", 0.5),
            ("retrieval", "r1", 0.5),
            ("captioning", "cider", 0.25),
        )
    ]
    summary: Any = SimpleNamespace(report=SimpleNamespace(measures=measures))
    declared = CardDeclarations(benchmarks={"vqa": ("org/VQA", "a"), "captioning": ("org/COCO", "b")})
    entries = parse_eval_result_entries(yaml.safe_load(benchmark_results(summary, declared)))
    assert [(entry.dataset_id, entry.value) for entry in entries] == [("org/VQA", 0.123457), ("org/COCO", 0.25)]
    summary.report = None
    assert benchmark_results(summary, declared) == ""


def test_data_sets_of_the_hub_are_known(summary: Summary) -> None:
    def calibrated(data: str, samples: int = 1) -> Summary:
        calibration = {"data": data, "seed": 0, "batch": 8, "samples": [{"id": "a", "image": "b" * 64}] * samples}
        return changed(summary, provenance={"calibration": calibration, "device": "cpu"})

    sources = ", ".join(
        str(place(text)) for text in ("hub:vqav2", "hub:org/data@v1", "coco:/data/coco", "hub:/data/mine")
    )
    assert sources == "hub vqav2, hub org/data@v1, coco coco, hub mine"
    assert card(calibrated(sources)).data.datasets == ["lmms-lab/VQAv2", "org/data"]
    assert card(calibrated(sources), CardDeclarations(datasets=("me/data",))).data.datasets == ["me/data"]
    assert card(calibrated(sources, samples=0)).data.datasets is None
    assert card(calibrated("demo")).data.datasets is None


def test_a_rounded_zero_has_no_minus_sign(summary: Summary) -> None:
    assert summary.report
    (measure,), (gate,) = summary.report.measures, summary.report.gates
    tiny = {"change": -1e-6, "low": -1e-6, "high": -0.0}
    difference = measure.difference.model_copy(update={"after": 0.9, **tiny})
    changes = {
        "measures": (measure.model_copy(update={"difference": difference, "samples": 10**8}),),
        "gates": (gate.model_copy(update=tiny),),
    }
    text = card(replace(summary, report=summary.report.model_copy(update=changes))).text
    assert "| +0.0000 | +0.0000 to +0.0000 |" in text
    assert "changed by +0.0% of the full-precision score (95 % interval +0.0% to +0.0%)" in text
    assert "-0.0" not in text


def test_the_introduction_names_the_kind_of_source(summary: Summary) -> None:
    def text(source: str, declared: CardDeclarations | None = None) -> str:
        return card(changed(summary, source={"model": source, "shards": {}}), declared).text

    assert "The small model `demo-llava` that mmq includes, quantized by mmq with" in text("demo-llava")
    assert "A local model (`mine`), quantized by mmq with" in text("mine")
    assert "[org/x](https://huggingface.co/org/x), quantized by mmq with" in text("mine", CardDeclarations("org/x"))


def test_bars_in_cells_do_not_break_a_table() -> None:
    assert table(["a", "b"], [["x|y", "z"]]).splitlines()[-1] == "| x\\|y | z |"


def test_every_linear_has_a_component(summary: Summary) -> None:
    components = {component_of(name, "llava") for name in summary.manifest.linears}
    assert components == {"language"}
    with pytest.raises(ArtifactError, match="names lm_head, which is in no component of llava"):
        component_of("lm_head", "llava")


def test_difference_lists_exactly_the_changes(exported: Path, summary: Summary) -> None:
    assert difference(summary, summary) == ()
    other = read_summary("w3", folder_reader(exported / "w3"))
    changes = {c.what: c for c in difference(summary, other)}
    assert (changes["language"].first, changes["language"].second) == ("W4 g16 rtn", "W3 g16 rtn")
    assert changes["bits per weight"].change == other.manifest.bits_per_weight - summary.manifest.bits_per_weight
    assert changes["bytes"].change == other.bytes - summary.bytes < 0
    assert changes["recipe.quantize[0].bits"].second == "3"
    assert changes["quantized linears with different integers"].second == "14 of 14"
    assert changes.keys() - {"recipe.name"} == {
        "language",
        "bits per weight",
        "bytes",
        "recipe.quantize[0].bits",
        "quantized linears with different integers",
    }
    assert summary.report
    (measure,) = summary.report.measures
    other_score = measure.model_copy(update={"difference": measure.difference.model_copy(update={"after": 0.8})})
    report = summary.report.model_copy(update={"measures": (other_score,)})
    (metric,) = difference(summary, replace(summary, report=report))
    assert (metric.what, metric.first, metric.second) == ("vqa accuracy", "0.8800", "0.8000")
    assert metric.change == pytest.approx(-0.08)
    fewer = replace(
        summary, report=report.model_copy(update={"measures": (other_score.model_copy(update={"samples": 9}),)})
    )
    (marked,) = (c for c in difference(summary, fewer) if c.what.startswith("vqa"))
    assert marked.what == "vqa accuracy, not comparable: other samples"
    assert marked.change is None
    assert marked.second.startswith("0.8000 (9 samples")
    seed = report.evaluation.model_copy(update={"seed": 77})
    reseeded = replace(summary, report=report.model_copy(update={"evaluation": seed}))
    assert "not comparable" in next(c.what for c in difference(summary, reseeded) if c.what.startswith("vqa"))
    unmeasured = {c.what: c.second for c in difference(summary, replace(summary, report=None))}
    assert unmeasured == {"vqa accuracy": "not measured", "gates": "never evaluated"}


def test_flattened_paths() -> None:
    assert flattened({"a": [1, {"b": 2}], "c": None}, "r") == {"r.a[0]": "1", "r.a[1].b": "2", "r.c": "None"}


def test_diff_on_the_command_line(exported: Path) -> None:
    run = CliRunner().invoke
    text = run(cli, ["diff", str(exported / "w4"), str(exported / "w3")])
    assert text.exit_code == 0
    assert "W3 g16 rtn" in text.output
    listed = json.loads(run(cli, ["diff", str(exported / "w4"), str(exported / "w3"), "--json"]).stdout)
    assert {"what": "language", "first": "W4 g16 rtn", "second": "W3 g16 rtn", "change": None} in listed
    assert "no difference" in run(cli, ["diff", str(exported / "w4"), str(exported / "w4")]).output
    nothing = run(cli, ["diff", str(exported / "model"), str(exported / "w4")])
    assert nothing.exit_code == 1
    assert f"has no {MANIFEST}: it is not an mmq artifact" in nothing.output


@pytest.mark.parametrize("broken", ["{", '{"source": 1}', "[]"])
def test_damaged_manifests_are_one_clear_error(exported: Path, broken: str) -> None:
    read = folder_reader(exported / "w4")
    with pytest.raises(ArtifactError, match="is damaged"):
        read_summary("w4", lambda name: broken.encode() if name == MANIFEST else read(name))
    with pytest.raises(ArtifactError, match="is damaged"):
        read_summary("w4", lambda name: b"{" if name == REPORT else read(name))


def test_diff_takes_relative_folders(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(exported / "w4")
    assert read_place(".").name == "w4"
    nothing = CliRunner().invoke(cli, ["diff", "/nope", "."])
    assert nothing.exit_code == 1
    assert "Error: folder /nope does not exist" in nothing.output
