"""The proof before publishing: it recomputes all figures and refuses edited artifacts.

Every edit is made as somebody would who knows the files: hashes of what changed are renewed, and the report is made to
name the weights that are there.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from exporter.artifact.artifact import Artifact
from exporter.artifact.manifest import MANIFEST
from exporter.artifact.verify import verify
from exporter.commands.main import cli
from exporter.device import choose
from exporter.errors import ArtifactError
from exporter.evaluation.backends import weights_digest
from exporter.evaluation.report_file import REPORT
from exporter.events import ignore
from exporter.files.file_hashes import sha256
from exporter.pipeline.export import export
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import load_recipe
from exporter.publishing.proof.prove import prove
from tests.consistent_edits import CONSISTENT_EDITS
from tests.published_artifact import bootstrap_once, score_captions_once
from tests.slow import some_of

Plain = dict[str, Any]
Edit = Callable[["Files"], None]
VQA, CAPTIONS = "vqa", "captioning"
SAMPLES = 100  # of each task; the gates are resolved


class Files:
    """Files of an artifact for editing: manifest and report as plain data, other files in the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Plain = json.loads((folder / MANIFEST).read_text())
        self.report: Plain = json.loads((folder / REPORT).read_text())

    def text(self, name: str, change: Callable[[Any], Any]) -> None:
        """Change a JSON or YAML file and renew its hash."""
        path = self.folder / name
        data = change(yaml.safe_load(path.read_text()))
        path.write_text(json.dumps(data) if name.endswith(".json") else yaml.safe_dump(data, sort_keys=False))
        self.renew(name)

    def renew(self, name: str) -> None:
        """Renew the file's hash in the manifest."""
        self.manifest["files"][name] = sha256(self.folder / name)

    def scores(self, task: str = VQA, metric: str = "accuracy") -> Plain:
        """The scores of single samples by a metric."""
        scores: Plain = self.report["samples"][task]["scores"][metric]
        return scores

    def write(self, about_these_weights: bool = True) -> None:
        """Write manifest and report into the folder, with the digest of the current weights in the report."""
        (self.folder / MANIFEST).write_text(json.dumps(self.manifest))
        models = self.report.get("evaluation", {}).get("models", {}) if isinstance(self.report, dict) else {}
        if about_these_weights and "artifact" in models:
            with suppress(ArtifactError):  # then it cannot be opened
                models["artifact"]["weights"] = weights_digest(Artifact.open(self.folder))
        (self.folder / REPORT).write_text(json.dumps(self.report))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """good: a publishable artifact. other: a publishable artifact of the same model with other bits."""
    place = tmp_path_factory.mktemp("proof")
    for name, source in (("good", "llava-w4-vit8"), ("other", "llava-w8")):
        data = load_recipe(source).adjusted(model={"repo": "demo-llava"}, calibration={"samples": 8}).model_dump()
        data["evaluation"]["samples"] = SAMPLES
        data["gates"] = data["gates"][: 2 if name == "good" else 1]
        data["gates"][0]["max_drop"] = 0.04
        export(Recipe.model_validate(data), out=place / name, device=choose("cpu"), on_event=ignore)
    return place


@pytest.fixture
def files(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.setattr("exporter.publishing.proof.prove.verify", partial(verify, load="nothing"))
    monkeypatch.setattr("exporter.evaluation.judge.paired_bootstrap", bootstrap_once)
    monkeypatch.setattr("exporter.data.tasks.captioning.score", score_captions_once)
    return Files(shutil.copytree(exported / "good", tmp_path / "artifact"))


def reasons(folder: Path) -> str:
    """Reasons against publishing an artifact; empty when there are none."""
    try:
        return "\n".join(prove(folder, choose("cpu"), ignore)[1])
    except ArtifactError as error:
        return error.message


def served(files: Files, **changes: Any) -> Plain:
    """Write the result of a passed check with some changed values; the manifest gets its verdict."""
    near, floor = {"mean": 0.004, "largest": 0.02, "tokens": 90}, {"mean": 0.004, "largest": 0.02, "tokens": 90}
    far = {"mean": 1.0, "largest": 4.0, "tokens": 90}
    close = {"distance": near, "floor": floor}
    serving = {
        "engine": "0.32.0",
        "build": "cpu",
        "questions": 16,
        "bound": 0.015,
        "problems": [],
        "schemes": {"CompressedTensorsWNA16": 26},
        "kernels": [],
        "passed": True,
        "compared": close,
        "control": {"component": "vision", "moved": far, "restored": close},
        "startup_seconds": 1.0,
        "weights": weights_digest(Artifact.open(files.folder)),
    }
    files.report["serving"] = serving | changes
    files.manifest["serving"] = {"engine": "vllm 0.32.0", "build": "cpu", "passed": serving["passed"]}
    return files.report["serving"]


def test_an_unedited_artifact_is_published(files: Files) -> None:
    assert reasons(files.folder) == ""
    files.write()
    assert reasons(files.folder) == ""
    served(files)
    files.write()
    assert reasons(files.folder) == ""


def every(rows: list[Plain], **values: Any) -> None:
    for row in rows:
        row.update(values)


def lose_all_scores(f: Files) -> None:
    for measure in f.report["measures"]:
        measure["difference"].update(after=0.0, change=-measure["difference"]["before"])
    every(f.report["gates"], change=-1.0)


def no_numbers(f: Files) -> None:
    every(f.report["measures"], samples=0)
    for measure in f.report["measures"]:
        measure["difference"].update(before=float("nan"), after=float("nan"))
    every(f.report["gates"], change=float("nan"))


def hidden_loss(f: Files) -> None:
    """Halve the scores of single samples and keep all derived figures."""
    scores = f.scores()
    scores["after"] = [0.0 if i % 2 else value for i, value in enumerate(scores["after"])]


def shortened(f: Files) -> None:
    """Remove samples and keep all figures that followed from them."""
    task = f.report["samples"][VQA]
    for key in ("ids", "pictures", "kinds"):
        task[key] = task[key][:75]
    task["changed"] = [i for i in task["changed"] if i < 75]
    for scores in task["scores"].values():
        scores.update({key: values[:75] for key, values in scores.items()})


def changed_recipe(f: Files, change: Callable[[Plain], None]) -> None:
    """Change recipe.yaml and renew its digest in the manifest."""

    def edit(data: Plain) -> Plain:
        change(data)
        return data

    f.text("recipe.yaml", edit)
    f.manifest["recipe"]["sha256"] = load_recipe(str(f.folder / "recipe.yaml")).digest()


def config(f: Files, change: Callable[[Plain], None]) -> None:
    def edit(data: Plain) -> Plain:
        change(data["quantization_config"])
        return data

    f.text("config.json", edit)


def groups(config: Plain) -> list[Plain]:
    return list(config["config_groups"].values())


def foreign_weights(f: Files) -> None:
    """Replace the codes of one linear by those of another linear of the same shape."""
    path = f.folder / "model.safetensors"
    tensors = load_file(path)
    names = ["language_model.model.layers.0.mlp.gate_proj", "language_model.model.layers.0.mlp.up_proj"]
    first, second = (f"{name}.weight_packed" for name in names)
    tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()
    save_file(tensors, path, {"format": "pt"})
    f.renew("model.safetensors")


def calibrated_on_a_test_picture(f: Files) -> None:
    f.manifest["provenance"]["calibration"]["samples"][0]["image"] = f.report["samples"][VQA]["pictures"][7]


def forgotten(f: Files, task: str) -> None:
    """Remove a task from the whole report."""
    for key in ("samples", "by_kind", "corpus", "counts"):
        f.report[key].pop(task)
    for key in ("measures", "gates", "changed", "examples"):
        f.report[key] = [row for row in f.report[key] if row["task"] != task]


EDITS: list[tuple[str, Edit, str]] = [
    # the report's figures
    ("all is lost, passed", lose_all_scores, "report's measure of vqa accuracy has difference"),
    ("NaN, no samples", no_numbers, "samples: Input should be greater than or equal to 1"),
    ("max_drop 1e9", lambda f: every(f.report["gates"], max_drop=1e9), "max_drop: Input should be less than or equal"),
    ("max_drop NaN", lambda f: every(f.report["gates"], max_drop=float("nan")), "max_drop: Input should be"),
    ("max_drop -1", lambda f: every(f.report["gates"], max_drop=-1.0), "max_drop: Input should be greater"),
    (
        "max_drop of no recipe",
        lambda f: every(f.report["gates"], max_drop=0.9),
        "has max_drop 0.9, but the scores give 0.04",
    ),
    (
        "decided by another rule",
        lambda f: every(f.report["gates"], decide="point"),
        "has decide point, but the scores give upper",
    ),
    (
        "a gate of no task",
        lambda f: f.report["gates"][0].update(task="nope", metric="nope"),
        "has task nope, but the scores give vqa",
    ),
    ("a gate less", lambda f: f.report["gates"].pop(), "has 1 gates, but its scores and the recipe give 2"),
    ("no gates", lambda f: f.report.update(gates=[]), "has 0 gates, but its scores and the recipe give 2"),
    (
        "a gate twice",
        lambda f: f.report["gates"].append(f.report["gates"][0]),
        "has 3 gates, but its scores and the recipe give 2",
    ),
    ("no measures", lambda f: f.report.update(measures=[]), "has 0 measures, but its scores and the recipe give 4"),
    ("passed: false", lambda f: f.report.update(passed=False), "verdict 'passed' and passed false"),
    ("another verdict", lambda f: f.report.update(verdict="failed"), "verdict 'failed' and passed true"),
    (
        "a gate failed",
        lambda f: f.report["gates"][0].update(verdict="failed"),
        "has verdict failed, but the scores give passed",
    ),
    ("a closer interval", lambda f: f.report["gates"][1].update(low=-1e-5), "has low -1e-05, but"),
    ("a higher full score", lambda f: f.report["measures"][1]["difference"].update(before=9.5), "has difference"),
    (
        "more samples",
        lambda f: every(f.report["measures"], samples=50_000),
        f"has samples 50000, but the scores give {SAMPLES}",
    ),
    (
        "fewer needed",
        lambda f: every(f.report["measures"], samples_to_resolve_one_percent=2),
        "to_resolve_one_percent 2",
    ),
    ("counts", lambda f: f.report["counts"][CAPTIONS].update(changed=0, lost=0), "counts of changed answers do not"),
    (
        "scores by type",
        lambda f: f.report["by_kind"][VQA]["color"].__setitem__(1, 0.5),
        "by question type do not follow",
    ),
    ("a key of nobody", lambda f: f.report.update(lost=0.0), "lost: unknown key"),
    ("nothing but a verdict", lambda f: f.report.clear() or f.report.update(passed=True), "is damaged"),
    ("empty", lambda f: f.report.clear(), "the artifact was never evaluated"),
    # the single scores
    ("scores of another artifact", hidden_loss, "report's measure of vqa accuracy"),
    (
        "the baseline's scores",
        lambda f: f.scores(CAPTIONS, "cider").update(after=f.scores(CAPTIONS, "cider")["before"]),
        "captioning cider",
    ),
    ("lower full scores", lambda f: f.scores().update(before=[0.5] * SAMPLES), "report's measure of vqa accuracy"),
    ("scores beyond 1", lambda f: f.scores()["after"].__setitem__(0, 2.0), "not within 0 to 1"),
    ("negative scores", lambda f: f.scores()["before"].__setitem__(0, -1.0), "not within 0 to 1"),
    (
        "an infinite score",
        lambda f: f.scores()["after"].__setitem__(0, float("inf")),
        "Input should be a finite number",
    ),
    ("a score less", lambda f: f.scores()["after"].pop(), f"{SAMPLES} ids, but {SAMPLES - 1} accuracy after"),
    ("no scores", lambda f: f.scores().update(before=[], after=[], chance=[]), f"{SAMPLES} ids, but 0 accuracy before"),
    ("samples left out", shortened, f"has samples {SAMPLES}, but the scores give 75"),
    (
        "a sample twice",
        lambda f: f.report["samples"][VQA]["ids"].__setitem__(1, f.report["samples"][VQA]["ids"][0]),
        "counts samples of vqa twice",
    ),
    ("no samples", lambda f: f.report["samples"].clear(), "has no scores of single samples"),
    ("no scores at all", lambda f: f.report.pop("samples"), "has no scores of single samples"),
    (
        "a metric of nobody",
        lambda f: f.report["samples"][VQA]["scores"].update(luck=f.scores()),
        "'luck', which is not a metric of vqa",
    ),
    (
        "a task of nobody",
        lambda f: f.report["samples"].update(luck=f.report["samples"][VQA]),
        "'luck', which is not a task",
    ),
    ("chance hidden", lambda f: f.scores().pop("chance"), "has no chance scores"),
    ("chance lowered", lambda f: f.scores().update(chance=[0.0] * SAMPLES), "has chance"),
    ("captions forgotten", lambda f: forgotten(f, CAPTIONS), "has 1 gates, but its scores and the recipe give 2"),
    (
        "other answers listed",
        lambda f: f.report["changed"][0].update(scores=[1.0, 1.0]),
        "that does not match its samples",
    ),
    (
        "a picture of another sample",
        lambda f: f.report["examples"][0].update(image="0" * 64),
        "that does not match its samples",
    ),
    (
        "losses not listed",
        lambda f: f.report.update(changed=[]),
        "listed answers of captioning are not the changed ones",
    ),
    # how it was measured
    (
        "other baseline",
        lambda f: f.report["evaluation"]["models"]["full precision"].update(weights="0" * 64),
        "compares the artifact with another model than its source",
    ),
    ("no models", lambda f: f.report["evaluation"].update(models={}), "does not name the two models"),
    (
        "asked otherwise",
        lambda f: f.report["evaluation"]["models"]["artifact"].update(dtype="float16"),
        "answered with different settings: dtype",
    ),
    (
        "longer answers",
        lambda f: f.report["evaluation"]["models"]["artifact"].update(generation={}),
        "different settings: generation",
    ),
    (
        "another seed",
        lambda f: f.report["evaluation"]["bootstrap"].update(seed=3),
        "do not use 10,000 resamples with the",
    ),
    (
        "few resamples",
        lambda f: f.report["evaluation"]["bootstrap"].update(resamples=10),
        "do not use 10,000 resamples",
    ),
    ("less confidence", lambda f: f.report["evaluation"]["bootstrap"].update(confidence=0.5), "do not use 10,000"),
    ("chosen otherwise", lambda f: f.report["evaluation"].update(seed=7), "were not selected with the recipe's seed"),
    ("few were asked for", lambda f: f.report["evaluation"].update(samples=3), "but its limit is 3"),
    (
        "calibrated on a test picture",
        calibrated_on_a_test_picture,
        "test pictures of vqa are also calibration pictures",
    ),
    # the manifest
    ("no linears", lambda f: f.manifest.update(linears={}), "packed, but not among the manifest's linears"),
    ("a linear less", lambda f: f.manifest["linears"].popitem(), "packed, but not among the manifest's linears"),
    (
        "nothing quantized",
        lambda f: f.manifest.update(linears={}, errors={}),
        "names no quantized linear, so it verifies",
    ),
    ("no errors", lambda f: f.manifest.update(errors={}), "the manifest has no quantization error for it"),
    ("an error less", lambda f: f.manifest["errors"].popitem(), "the manifest has no quantization error for it"),
    ("no units", lambda f: f.manifest.update(units=[]), "in none of the manifest's units"),
    ("units in another order", lambda f: f.manifest["units"].reverse(), "units differ from the blocks"),
    ("no files", lambda f: f.manifest.update(files={}), "model.safetensors: not in the manifest"),
    ("no hash of the config", lambda f: f.manifest["files"].pop("config.json"), "config.json: not in the manifest"),
    ("no hash of the recipe", lambda f: f.manifest["files"].pop("recipe.yaml"), "recipe.yaml: not in the manifest"),
    ("no hash of the weights", lambda f: f.manifest["files"].pop("model.safetensors"), "model.safetensors: not in the"),
    (
        "a smaller artifact",
        lambda f: f.manifest["bytes"].update(after=1000),
        "counts 1,000 bytes of tensors, the artifact",
    ),
    ("a larger source", lambda f: f.manifest["bytes"].update(before=10**9), "counts 1,000,000,000 bytes of source"),
    ("fewer bits", lambda f: f.manifest.update(bits_per_weight=2.0), "2.0000 bits per weight"),
    (
        "another recipe's digest",
        lambda f: f.manifest["recipe"].update(sha256="0" * 64),
        "digest differs from the manifest's",
    ),
    ("another recipe's name", lambda f: f.manifest["recipe"].update(name="w2"), "have different recipe names"),
    (
        "no calibration samples",
        lambda f: f.manifest["provenance"]["calibration"].update(samples=[]),
        "the manifest names none",
    ),
    (
        "more calibration samples",
        lambda f: f.manifest["provenance"]["calibration"].update(
            samples=f.manifest["provenance"]["calibration"]["samples"] * 2
        ),
        "names 16 calibration samples, the recipe allows 8",
    ),
    (
        "another calibration seed",
        lambda f: f.manifest["provenance"]["calibration"].update(seed=5),
        "calibration seed 5",
    ),
    (
        "no digest of the source",
        lambda f: f.manifest["source"].pop("digest"),
        "does not identify the full-precision model",
    ),
    ("another format", lambda f: f.manifest.update(format="gptq"), "does not describe weights of format gptq"),
    ("another family", lambda f: f.manifest.update(family="blip2"), ""),
    # recipe.yaml and config.json
    (
        "laxer gates",
        lambda f: f.text("recipe.yaml", lambda d: d | {"gates": [g | {"max_drop": 0.9} for g in d["gates"]]}),
        "digest differs from the manifest's",
    ),
    (
        "laxer gates, digest renewed",
        lambda f: changed_recipe(f, lambda d: every(d["gates"], max_drop=0.9)),
        "has max_drop 0.04, but the scores give 0.9",
    ),
    (
        "a gate that allows all",
        lambda f: f.text("recipe.yaml", lambda d: d | {"gates": [g | {"max_drop": 1e9} for g in d["gates"]]}),
        "gates[0].max_drop: Input should be less than 1",
    ),
    ("no gates in the recipe", lambda f: changed_recipe(f, lambda d: d.update(gates=[])), "the recipe has no gates"),
    (
        "more bits in the recipe",
        lambda f: changed_recipe(f, lambda d: d["quantize"][2].update(bits=8)),
        "the recipe has W8",
    ),
    (
        "another part in the recipe",
        lambda f: changed_recipe(f, lambda d: d["quantize"].pop()),
        "the recipe packs 12 linears",
    ),
    (
        "another seed in the recipe",
        lambda f: changed_recipe(f, lambda d: d["evaluation"].update(seed=9)),
        "recipe's seed 9",
    ),
    (
        "float8 keys and values in the recipe",
        lambda f: changed_recipe(f, lambda d: d.update(kv_cache="fp8")),
        "number types of the KV cache",
    ),
    (
        "keys and values with scales per head in the recipe",
        lambda f: changed_recipe(f, lambda d: d.update(kv_cache="int8_per_token_head")),
        "number types of the KV cache",
    ),
    (
        "rounded inputs",
        lambda f: config(
            f,
            lambda c: groups(c)[0].update(
                input_activations={
                    "num_bits": 8,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "token",
                    "dynamic": True,
                }
            ),
        ),
        "config.json",
    ),
    (
        "a linear is ignored",
        lambda f: config(f, lambda c: c["ignore"].append("language_model.model.layers.0.mlp.up_proj")),
        "config.json differs from the one that the recipe writes",
    ),
    (
        "a wider pattern",
        lambda f: config(f, lambda c: groups(c)[0]["targets"].append("re:.*")),
        "config.json gives it a scheme",
    ),
    (
        "a scheme of no linear",
        lambda f: config(
            f,
            lambda c: c["config_groups"].update(
                group_9=groups(c)[0] | {"targets": ["re:nothing"], "weights": groups(c)[0]["weights"] | {"num_bits": 5}}
            ),
        ),
        "a scheme that no linear uses",
    ),
    (
        "no quantization in the config",
        lambda f: f.text("config.json", lambda d: {k: v for k, v in d.items() if k != "quantization_config"}),
        "; expected one",
    ),
    (
        "another chat template",
        lambda f: (f.folder / "chat_template.jinja").write_text("{{ messages }}") and f.renew("chat_template.jinja"),
        "chat_template.jinja differs from the source's",
    ),
    (
        "another source's processor",
        lambda f: f.manifest["source"]["processor"].update({"vocab.json": "0" * 64}),
        "answered with another processor than the source's",
    ),
    # weights
    ("swapped codes", foreign_weights, "its codes, scales or zero points differ from the computed ones"),
    # what an engine answered
    (
        "a failed check passes",
        lambda f: served(f, problems=["it answers otherwise"]),
        "the engine's answers differ from the reference",
    ),
    (
        "a failed check is contradicted",
        lambda f: served(f, passed=False),
        "verdicts of `mmq check` in manifest and report contradict each other",
    ),
    ("the manifest's check passes alone", lambda f: served(f) and f.report.pop("serving"), "the report has none"),
    ("the report's check passes alone", lambda f: served(f) and f.manifest.pop("serving"), "contradict each other"),
    (
        "a check of other weights",
        lambda f: served(f, weights="0" * 64),
        "the result of `mmq check` is about other weights",
    ),
    ("a check of nobody's weights", lambda f: served(f).pop("weights"), "does not identify its weights"),
    ("far answers", lambda f: served(f)["compared"]["distance"].update(mean=2.0), "log-probabilities are too far"),
    ("far answers, wide bound", lambda f: served(f, bound=1e6)["compared"]["distance"].update(mean=2.0), "too far"),
    (
        "a control that shows nothing",
        lambda f: served(f)["control"]["moved"].update(mean=0.0),
        "the comparison cannot detect an error",
    ),
    ("nothing was compared", lambda f: served(f, compared=None), "no answers were compared"),
    ("nothing was asked", lambda f: served(f, questions=0), "no answers were compared"),
    ("answers that are no numbers", lambda f: served(f)["compared"]["distance"].update(mean=None), "too far"),
    ("a floor that is no number", lambda f: served(f)["compared"]["floor"].update(mean=None), "are impossible"),
    ("a mean above the largest", lambda f: served(f)["compared"]["distance"].update(largest=0.0), "are impossible"),
    ("negative differences", lambda f: served(f)["compared"]["distance"].update(mean=-5.0), "are impossible"),
    (
        "fewer tokens than answers",
        lambda f: served(f)["compared"]["distance"].update(tokens=1),
        "answers have no tokens",
    ),
    ("no control", lambda f: served(f, control=None), "ran without its negative control"),
    ("a control of nothing", lambda f: served(f)["control"].update(component="x"), "scales of x, which has no packed"),
    ("one linear in the log", lambda f: served(f, schemes={"CompressedTensorsWNA16": 1}), "for 1 of 16 linears"),
    ("other schemes in the log", lambda f: served(f, schemes={"Unquantized": 26}), "for 0 of 16 linears"),
]


REASON_OF = {name: reason for name, _, reason in [*EDITS, *CONSISTENT_EDITS]}
ONE_OF_A_REASON = {reason: name for name, reason in reversed(REASON_OF.items())}.values()


@pytest.mark.parametrize(
    ("edit", "fragment"),
    some_of({name: (edit, reason) for name, edit, reason in [*EDITS, *CONSISTENT_EDITS]}, set(ONE_OF_A_REASON)),
)
def test_an_edited_artifact_is_refused_with_the_reason(files: Files, edit: Edit, fragment: str) -> None:
    edit(files)
    files.write()
    listed = reasons(files.folder)
    assert listed
    assert fragment in listed


def test_a_report_of_another_artifact_is_refused(files: Files, exported: Path) -> None:
    """The report is from another artifact of the same source on the same samples."""
    shutil.copy(exported / "other" / REPORT, files.folder / REPORT)
    assert "the report was measured on other weights" in reasons(files.folder)
    files.report = json.loads((exported / "other" / REPORT).read_text())
    files.write()  # and names these weights
    assert "has 1 gates, but its scores and the recipe give 2" in reasons(files.folder)


def test_the_command_lists_every_reason(files: Files) -> None:
    files.report.update(passed=False)
    files.manifest["bytes"]["before"] = 10**9
    files.write()
    result = CliRunner().invoke(cli, ["publish", str(files.folder), "--repo", "me/x", "--dry-run", "--device", "cpu"])
    assert result.exit_code == 1
    assert "verdict 'passed' and passed false" in result.stderr
    assert "bytes of source tensors" in result.stderr
