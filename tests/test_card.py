"""Model cards and differences of artifacts: every figure is the manifest's or the report's, and nothing is made up."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCard, parse_eval_result_entries

from exporter.artifact import REPORT
from exporter.card import RESULTS, Declared, render, table
from exporter.cli import cli
from exporter.data import place
from exporter.difference import difference, flattened
from exporter.errors import ArtifactError, PublishError
from exporter.facts import Facts, Read, component_of, folder_reader, read_facts, read_place
from exporter.fields import GATE_FIELDS, MEASURE_FIELDS, REPORT_FIELDS
from exporter.manifest import MANIFEST, Manifest
from exporter.package import package
from tests.published_artifact import tiny_artifact, tiny_model

REPO = "me/tiny"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """w4, w3: two artifacts of one source."""
    place = tmp_path_factory.mktemp("made")
    model = tiny_model(place / "model")
    tiny_artifact(place / "w4", model)
    tiny_artifact(place / "w3", model, bits=3)
    return place


@pytest.fixture
def facts(made: Path) -> Facts:
    return read_facts("w4", folder_reader(made / "w4"))


def changed(facts: Facts, **values: Any) -> Facts:
    """Facts whose manifest says something else."""
    manifest = Manifest.model_validate(facts.manifest.model_dump() | values, strict=False)
    return replace(facts, manifest=manifest)


def card(facts: Facts, declared: Declared | None = None, problems: tuple[str, ...] = ()) -> ModelCard:
    """The rendered card, parsed by the hub's library."""
    return ModelCard(render(REPO, facts, declared or Declared(), problems, ""))


def test_metadata_is_what_the_hub_library_reads(facts: Facts) -> None:
    declared = Declared("org/llava", {"license": "other", "license_name": "x"}, ("org/data",), ("en",))
    data = card(facts, declared).data
    assert data.base_model == "org/llava"
    assert data.to_dict()["base_model_relation"] == "quantized"
    assert (data.license, data.license_name) == ("other", "x")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-text-to-text")
    assert data.tags == ["vllm", "compressed-tensors", "w4a16", "rtn", "vision", "mmq"]
    (result,) = data.eval_results
    assert (result.task_type, result.metric_type) == ("visual-question-answering", "accuracy")
    assert result.metric_value == 0.88
    assert "500 samples" in result.dataset_name


def test_the_base_model_is_the_hubs_or_none(facts: Facts) -> None:
    assert card(facts).data.base_model is None
    assert "base_model_relation" not in card(facts).data.to_dict()
    from_hub = changed(facts, source={"model": "llava-hf/llava-1.5-7b-hf@abc", "shards": {}})
    assert card(from_hub).data.base_model == "llava-hf/llava-1.5-7b-hf"
    odd = changed(facts, source={"model": "my@folder", "shards": {}})
    assert card(odd).data.base_model is None


def test_the_card_says_what_was_done(facts: Facts) -> None:
    text = card(facts).text
    assert f"| language | {len(facts.manifest.linears)} | W4 g16 | rtn | packed |" in text
    assert "| vision |  | 16 bits, not quantized |" in text
    assert "| vqa | accuracy | 500 | 0.9000 | 0.8800 | -0.0200 | -0.0300 to -0.0100 |" in text
    assert "lost 2.2% of the full-precision score, allowed 3.0% | point | passed |" in text
    assert f"vllm serve {REPO} --limit-mm-per-prompt" in text
    assert f"--model {REPO}" in text
    assert facts.manifest.recipe.sha256 in text
    assert "None: no method of this recipe looks at data." in text
    assert "Published by force" not in text
    assert "humming" not in text


def test_requests_ask_for_the_start_token_where_the_template_lacks_it(facts: Facts) -> None:
    with_it, without = (render(REPO, facts, Declared(), (), "", lacks) for lacks in (True, False))
    assert "add_special_tokens" not in without
    request = with_it.partition("-d '")[2].partition("'\n```")[0]
    asked = json.loads(request)
    assert asked.pop("add_special_tokens") is True
    assert asked == json.loads(without.partition("-d '")[2].partition("'\n```")[0])
    assert "`add_special_tokens` is needed with every request" in with_it


def test_calibration_and_measured_data_are_named(facts: Facts) -> None:
    calibration = {"data": "coco train2014", "seed": 7, "batch": 8, "samples": [{"id": "a", "image": "b" * 64}] * 3}
    told = changed(facts, provenance={"calibration": calibration, "device": "H100"})
    assert "3 training samples of coco train2014, chosen with seed 7" in card(told).text
    assert "answered the same samples (coco train2014)" in card(told).text
    report = {**dict(facts.report or {}), "evaluation": {"data": "vqav2 val", "models": {}}}
    assert "answered the same samples (vqav2 val)" in card(replace(told, report=report)).text
    assert "drawings" not in card(told).text
    assert "drawings" in card(facts).text


def test_a_card_without_report_promises_nothing(facts: Facts) -> None:
    bare = card(replace(facts, report=None), problems=("it was never evaluated\n  at all",))
    assert "It was never measured." in bare.text
    assert "> - it was never evaluated\n> -   at all" in bare.text
    assert bare.data.eval_results is None
    assert "unproven" in bare.data.tags


def test_odd_bits_need_more_of_the_engine(made: Path) -> None:
    text = card(read_facts("w3", folder_reader(made / "w3"))).text
    assert "3-bit weights need vLLM 0.25.1 or later with `humming-kernels`" in text


def test_the_engines_check_is_on_the_card(facts: Facts) -> None:
    serving = {"engine": "0.32.0", "build": "CPU", "questions": 8, "bound": 0.1, "problems": []}
    assert "vLLM 0.32.0 (CPU) served it and answered 8 questions" in card(replace(facts, serving=serving)).text
    failing = serving | {"problems": ["x"]}
    assert "**differed from**" in card(replace(facts, serving=failing)).text


def test_benchmark_results_only_for_benchmarks(made: Path, facts: Facts) -> None:
    declared = Declared(benchmarks={"vqa": ("org/VQA", "vqa_test")})
    with pytest.raises(PublishError, match="drawings, which are no benchmark"):
        package(made / "w4", facts, REPO, declared, (), None)
    report = {**dict(facts.report or {}), "evaluation": {"data": "vqav2 val", "models": {}}}
    measured = replace(facts, report=report)
    wrong = Declared(benchmarks={"captioning": ("org/COCO", "x")})
    with pytest.raises(PublishError, match="not measured on this task"):
        package(made / "w4", measured, REPO, wrong, (), None)
    found = package(made / "w4", measured, REPO, declared, (), None).files[RESULTS]
    assert isinstance(found, bytes)
    (entry,) = parse_eval_result_entries(yaml.safe_load(found))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("org/VQA", "vqa_test", 0.88)
    assert RESULTS not in package(made / "w4", measured, REPO, Declared(), (), None).files


def test_data_sets_of_the_hub_are_known(facts: Facts) -> None:
    def calibrated(data: str, samples: int = 1) -> Facts:
        wanted = {"data": data, "seed": 0, "batch": 8, "samples": [{"id": "a", "image": "b" * 64}] * samples}
        return changed(facts, provenance={"calibration": wanted, "device": "cpu"})

    told = ", ".join(str(place(text)) for text in ("hub:vqav2", "hub:org/data@v1", "coco:/data/coco", "hub:/data/mine"))
    assert told == "hub vqav2, hub org/data@v1, coco coco, hub mine"
    assert card(calibrated(told)).data.datasets == ["lmms-lab/VQAv2", "org/data"]
    assert card(calibrated(told), Declared(datasets=("me/data",))).data.datasets == ["me/data"]
    assert card(calibrated(told, samples=0)).data.datasets is None
    assert card(calibrated("demo")).data.datasets is None


def test_nothing_is_minus_zero(facts: Facts) -> None:
    report = copy.deepcopy(dict(facts.report or {}))
    report["measures"][0]["difference"] |= {"after": 0.9, "drop": 0.0, "low": 1e-6, "high": 0.0}
    report["gates"][0]["lost"] = -1e-5
    text = card(replace(facts, report=report)).text
    assert "| +0.0000 | +0.0000 to +0.0000 |" in text
    assert "lost 0.0% of" in text
    assert "-0.0" not in text


def test_the_introduction_names_the_source_as_what_it_is(facts: Facts) -> None:
    def text(source: str, declared: Declared | None = None) -> str:
        return card(changed(facts, source={"model": source, "shards": {}}), declared).text

    assert "The small model `demo-llava` that comes with mmq, quantized by mmq with" in text("demo-llava")
    assert "A local model (`mine`), quantized by mmq with" in text("mine")
    assert "[org/x](https://huggingface.co/org/x), quantized by mmq with" in text("mine", Declared("org/x"))


def test_bars_in_cells_do_not_break_a_table() -> None:
    assert table(["a", "b"], [["x|y", "z"]]).splitlines()[-1] == "| x\\|y | z |"


def test_every_linear_has_a_component(facts: Facts) -> None:
    found = {component_of(name, "llava") for name in facts.manifest.linears}
    assert found == {"language"}
    with pytest.raises(ArtifactError, match="names lm_head, which is in no component of llava"):
        component_of("lm_head", "llava")


def test_difference_finds_what_was_changed_and_nothing_else(made: Path, facts: Facts) -> None:
    assert difference(facts, facts) == ()
    other = read_facts("w3", folder_reader(made / "w3"))
    changes = {c.what: c for c in difference(facts, other)}
    assert (changes["language"].first, changes["language"].second) == ("W4 g16 rtn", "W3 g16 rtn")
    assert changes["bits a weight"].change == other.manifest.bits_per_weight - facts.manifest.bits_per_weight
    assert changes["bytes"].change == other.bytes - facts.bytes < 0
    assert changes["recipe.quantize[0].bits"].second == "3"
    assert changes["quantized linears with other integers"].second == "14 of 14"
    assert changes.keys() - {"recipe.name"} == {
        "language",
        "bits a weight",
        "bytes",
        "recipe.quantize[0].bits",
        "quantized linears with other integers",
    }
    report = copy.deepcopy(dict(facts.report or {}))
    report["measures"][0]["difference"]["after"] = 0.8
    (metric,) = difference(facts, replace(facts, report=report))
    assert (metric.what, metric.first, metric.second) == ("vqa accuracy", "0.8800", "0.8000")
    assert metric.change == pytest.approx(-0.08)
    unmeasured = {c.what: c.second for c in difference(facts, replace(facts, report=None))}
    assert unmeasured == {"vqa accuracy": "not measured", "gates": "never evaluated"}


def test_flattened_paths() -> None:
    assert flattened({"a": [1, {"b": 2}], "c": None}, "r") == {"r.a[0]": "1", "r.a[1].b": "2", "r.c": "None"}


def test_diff_on_the_command_line(made: Path) -> None:
    run = CliRunner().invoke
    text = run(cli, ["diff", str(made / "w4"), str(made / "w3")])
    assert text.exit_code == 0
    assert "W3 g16 rtn" in text.output
    found = json.loads(run(cli, ["diff", str(made / "w4"), str(made / "w3"), "--json"]).stdout)
    assert {"what": "language", "first": "W4 g16 rtn", "second": "W3 g16 rtn", "change": None} in found
    assert "no difference" in run(cli, ["diff", str(made / "w4"), str(made / "w4")]).output
    nothing = run(cli, ["diff", str(made / "model"), str(made / "w4")])
    assert nothing.exit_code == 1
    assert f"has no {MANIFEST}: not an artifact of mmq" in nothing.output


@pytest.mark.parametrize("broken", ["{", '{"source": 1}', "[]"])
def test_damaged_manifests_are_one_clear_error(made: Path, broken: str) -> None:
    read = folder_reader(made / "w4")
    with pytest.raises(ArtifactError, match="is damaged"):
        read_facts("w4", lambda name: broken.encode() if name == MANIFEST else read(name))
    with pytest.raises(ArtifactError, match="is damaged"):
        read_facts("w4", lambda name: b"{" if name == REPORT else read(name))


def damaged(file: str, data: dict[str, Any], path: str, read: Read) -> Read:
    """The same files, but `path` of `file` is missing."""
    data = copy.deepcopy(data)
    *outer, last = path.split(".")
    holder: Any = data
    for part in outer:
        holder = holder[int(part) if part.isdigit() else part]
    del holder[last]
    return lambda name: json.dumps(data).encode() if name == file else read(name)


def test_every_field_that_is_read_must_be_there(made: Path) -> None:
    read = folder_reader(made / "w4")
    report = json.loads(read(REPORT) or b"")
    paths = [*REPORT_FIELDS, *(f"measures.0.{p}" for p in MEASURE_FIELDS), *(f"gates.0.{p}" for p in GATE_FIELDS)]
    for path in paths:
        with pytest.raises(ArtifactError, match=f"has no {path.rpartition('.0.')[2]}"):
            read_facts("w4", damaged(REPORT, report, path, read))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (REPORT, None),
        (REPORT, []),
        (REPORT, {}),
        (REPORT, {"gates": [{}]}),
        (REPORT, {"measures": [1]}),
        (REPORT, {"passed": 1}),
        (REPORT, {"serving": [1]}),
        (REPORT, {"serving": {"engine": "0.32.0"}}),
    ],
)
def test_fields_of_another_kind_are_damage_too(made: Path, file: str, change: Any) -> None:
    read = folder_reader(made / "w4")
    data = {**json.loads(read(file) or b""), **change} if change else change
    with pytest.raises(ArtifactError, match="is damaged"):
        read_facts("w4", lambda name: json.dumps(data).encode() if name == file else read(name))


def test_diff_of_folders_as_one_names_them(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made / "w4")
    assert read_place(".").name == "w4"
    nothing = CliRunner().invoke(cli, ["diff", "/nope", "."])
    assert nothing.exit_code == 1
    assert "Error: no folder /nope" in nothing.output
