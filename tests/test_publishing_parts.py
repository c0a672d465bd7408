"""Parts of publishing on summaries that are made here: differences, notes, usage, headline and size of files."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exporter.artifact.manifest import MANIFEST
from exporter.device import Device
from exporter.errors import ArtifactError, HubError, HubMissing, PublishError
from exporter.evaluation.report_file import GateResult
from exporter.events import Event
from exporter.model.families import FAMILIES
from exporter.numerics.kv_caches import BY_FLAG
from exporter.numerics.quantized import Scheme
from exporter.planning.recipe_file import load_recipe
from exporter.publishing import artifact_diff, card, card_serving, card_usage, publication, repository, upload
from exporter.publishing.artifact_diff import Change, flattened
from exporter.publishing.artifact_summary import SchemeGroup, Summary, drawings_note
from exporter.publishing.card import CardDeclarations
from exporter.publishing.proof import answers as proof_answers
from exporter.publishing.proof import plan as proof_plan
from exporter.publishing.proof import serving as proof_serving
from exporter.publishing.publication import PublishRequest
from exporter.publishing.repository import Package, disclosure_note
from exporter.publishing.upload import Target


def measured(samples: int, data: str | None = "coco", seed: int | None = 0, **metrics: tuple[float, float]) -> Any:
    """A summary with metrics of a task: score of full precision, and of the artifact."""
    listed = {f"vqa {name}": scores for name, scores in metrics.items()}
    measures = [SimpleNamespace(task="vqa", metric=name, samples=samples) for name in metrics]
    report = SimpleNamespace(evaluation=SimpleNamespace(data=data, seed=seed), measures=measures, verdict="passed")
    return SimpleNamespace(metrics=lambda: listed, report=report)


def test_scores_of_the_same_samples_are_subtracted() -> None:
    first, second = measured(50, accuracy=(0.75, 0.5)), measured(50, accuracy=(0.75, 0.625))
    assert artifact_diff._metrics(first, second) == [Change("vqa accuracy", "0.5000", "0.6250", 0.125)]
    assert artifact_diff._metrics(first, first) == []
    other = measured(50, accuracy=(0.5, 0.5))
    assert artifact_diff._metrics(first, other) == [Change("vqa accuracy at full precision", "0.7500", "0.5000", -0.25)]


def test_scores_of_other_samples_are_not_compared() -> None:
    first, second = measured(50, accuracy=(0.75, 0.5)), measured(60, None, 3, accuracy=(0.75, 0.625))
    assert artifact_diff._metrics(first, second) == [
        Change(
            "vqa accuracy, not comparable: other samples",
            "0.5000 (50 samples; data coco, seed 0)",
            "0.6250 (60 samples; seed 3)",
        )
    ]
    absent = measured(50, anls=(0.5, 0.25))
    assert artifact_diff._metrics(first, absent) == [
        Change("vqa accuracy", "0.5000", "not measured"),
        Change("vqa anls", "not measured", "0.2500"),
    ]


def test_an_artifact_without_a_report_has_no_scores() -> None:
    unmeasured: Any = SimpleNamespace(report=None)
    assert artifact_diff.samples_of(unmeasured) == {}
    assert artifact_diff.verdict(unmeasured) == "never evaluated"
    assert artifact_diff.verdict(measured(1)) == "passed"


def test_differences_of_recipes_are_by_path_without_prose() -> None:
    recipe = load_recipe("llava-w4")
    other = recipe.model_copy(update={"name": "mine", "summary": "other", "evidence": None})
    assert artifact_diff._recipe(recipe, other) == [Change("recipe.name", "llava-w4", "mine")]
    assert flattened({"a": [{"b": 1}, 2], "c": {"d": None}}, "r") == {"r.a[0].b": "1", "r.a[1]": "2", "r.c.d": "None"}
    assert artifact_diff._versions({"torch": "1", "mmq": "2"}, {"torch": "1", "vllm": "3"}) == [
        Change("mmq version", "2", "absent"),
        Change("vllm version", "absent", "3"),
    ]


def test_components_are_compared_by_scheme_and_method() -> None:
    def summary(*parts: tuple[str, str, tuple[str, ...]]) -> Any:
        names = ("component", "scheme", "methods")
        return SimpleNamespace(parts=[SimpleNamespace(**dict(zip(names, part, strict=True))) for part in parts])

    first = summary(
        ("vision", "W8 row", ("rtn",)), ("language", "W4 g128", ("gptq", "awq")), ("language", "16 bits", ())
    )
    assert artifact_diff.scheme_text(first, "language") == "W4 g128 gptq/awq, 16 bits"
    assert artifact_diff._parts(first, first) == []
    assert artifact_diff._parts(first, summary(("head", "W8 row", ("rtn",)), ("vision", "W8 row", ("rtn",)))) == [
        Change("language", "W4 g128 gptq/awq, 16 bits", "16 bits"),
        Change("head", "16 bits", "W8 row rtn"),
    ]


@pytest.mark.parametrize(
    ("repo", "adapter", "paths"),
    [
        ("org/name", None, ""),
        ("demo-llava", "adapter", ""),
        ("./model", None, "./model"),
        ("/data/model", "~/lora", "/data/model and ~/lora"),
        ("models/a/b", None, "models/a/b"),
        ("org/name", "x/y/z", "x/y/z"),
    ],
)
def test_local_paths_in_a_published_recipe_are_disclosed(repo: str, adapter: str | None, paths: str) -> None:
    summary: Any = SimpleNamespace(recipe=SimpleNamespace(model=SimpleNamespace(repo=repo, adapter=adapter)))
    note = f"recipe.yaml is published unchanged and contains the local path {paths}"
    assert disclosure_note(summary) == (note if paths else "")


def test_data_sources_are_arguments_with_a_path_to_fill_in() -> None:
    assert [card_usage._source(name) for name in ("coco train2017", "folder images")] == ["coco:PATH", "PATH"]


class FakeHub:
    """Stand-ins for the steps of a publication; records those that need the hub."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, online: bool = True) -> None:
        self.calls: list[Any] = []
        self.recipe = SimpleNamespace(repo="org/recipe", private=True)
        summary = SimpleNamespace(recipe=SimpleNamespace(publish=self.recipe))
        for name, result in (
            ("prove", (summary, ("a problem",))),
            ("online", online),
            ("disclosure_note", "a local path"),
            ("with_source_license", "declared"),
            ("package", "packaged"),
        ):
            monkeypatch.setattr(publication, name, lambda *arguments, result=result: result)
        monkeypatch.setattr(publication, "reading", lambda folder, on_event: nullcontext())
        for name in ("require_token", "refuse_unproven"):
            monkeypatch.setattr(publication, name, lambda *arguments, name=name: self.calls.append(name))
        stand_in = SimpleNamespace(
            Target=Target,
            check_target=lambda target: self.calls.append(target),
            existing_repository=lambda target: self.calls.append("read") or "remote",
            publish=lambda packaged, target, remote, on_event: f"{packaged} on {remote}",
        )
        monkeypatch.setattr(publication, "upload", stand_in)

    def publish(self, **request: Any) -> tuple[Any, list[Any], list[Event]]:
        """The publication, the calls, and the events."""
        self.calls.clear()
        events: list[Event] = []
        result = publication.publish_artifact(
            PublishRequest(Path("out"), **request), Device("cpu", "a CPU", 2**30), events.append
        )
        return result.publication, list(self.calls), events


def test_only_a_publication_that_sends_something_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    hub, target = FakeHub(monkeypatch), Target("org/recipe", None, True, False, False)
    published, calls, events = hub.publish()
    assert published == "packaged on remote"
    assert calls == ["refuse_unproven", target, "require_token", "read"]
    assert [(event.stage, event.message) for event in events] == [("note", "a local path")]
    assert hub.publish(dry_run=True)[:2] == (None, ["refuse_unproven", target, "read"])
    assert hub.publish(force=True)[1] == [target, "require_token", "read"]
    offline = FakeHub(monkeypatch, online=False)
    assert offline.publish(dry_run=True)[:2] == (None, ["refuse_unproven", target])
    assert offline.publish()[1] == ["refuse_unproven", target, "require_token", "read"]


@pytest.mark.parametrize(
    ("public", "private_recipe", "private"),
    [(False, True, True), (True, True, False), (False, False, False), (True, False, False)],
)
def test_a_repository_is_private_unless_the_recipe_or_the_request_makes_it_public(
    public: bool, private_recipe: bool, private: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(monkeypatch)
    hub.recipe.private = private_recipe
    _, calls, _ = hub.publish(repo="me/mine", public=public, force=True, revision="v1", create_pr=True, replace=True)
    assert calls[0] == Target("me/mine", "v1", private, True, True)


def test_a_publication_needs_a_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch)
    hub.recipe.repo = None
    with pytest.raises(PublishError, match="no repository to publish to"):
        hub.publish()


@pytest.mark.parametrize("text", ["vqa", "vqa=org/data", "vqa=data:x", "vqa=a/b/c:x", "=org/data:x", "vqa=org/data:"])
def test_a_benchmark_that_is_not_understood_is_refused(text: str) -> None:
    assert publication.benchmark("vqa=org/data:x") == ("vqa", ("org/data", "x"))
    with pytest.raises(PublishError, match="not understood"):
        publication.benchmark(text)


@pytest.mark.parametrize(("token", "offline", "online"), [("t", False, True), (None, False, False), ("t", True, False)])
def test_a_dry_run_reads_from_the_hub_with_a_token(
    token: str | None, offline: bool, online: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: offline)
    assert publication.online() is online


# Sentences of the card


def card_summary(family: str = "llava", **manifest: Any) -> Any:
    """A summary with a manifest of a family."""
    calibration = SimpleNamespace(data="coco train2017", samples=[], seed=3)
    fields: dict[str, Any] = {
        "family": family,
        "format": "compressed_tensors",
        "source": SimpleNamespace(adapter=None),
        "bytes": SimpleNamespace(before=14_126_854_144, after=4_000_000),
        "bits_per_weight": 4.256,
        "kv_cache": None,
        "notes": (),
        "prompts": {},
        "provenance": SimpleNamespace(calibration=calibration, device="H200"),
    }
    recipe = SimpleNamespace(name="llava-w4", changes=lambda: "", kv_cache=None, prompts={})
    parts = (SchemeGroup("language", "W4 g128", 4, ("gptq",), 7, True, "kernel M"),)
    values = {"source": "mine", "recipe": recipe, "parts": parts, "report": None, "serving": None, "speed": None}
    return SimpleNamespace(manifest=SimpleNamespace(**fields | manifest), **values)


def test_the_introduction_has_adapter_changes_and_sizes() -> None:
    summary = card_summary(source=SimpleNamespace(adapter="my-lora"))
    summary.recipe.changes = lambda: "language bits 3"
    assert card._introduction(summary, CardDeclarations("org/x")) == (
        "[org/x](https://huggingface.co/org/x) with the LoRA adapter `my-lora` merged, quantized by mmq with the "
        "recipe `llava-w4` (changed: language bits 3) into an artifact that vLLM serves: 4.0 MB instead of 14.13 GB, "
        "4.26 bits per weight, including scales and all other tensors."
    )
    assert [card.gigabytes(count) for count in (1e9, 1e9 - 1e5, 2_345_000)] == ["1.00 GB", "999.9 MB", "2.3 MB"]
    assert [card.signed(value) for value in (0.01234, -0.5, -1e-9)] == ["+0.0123", "-0.5000", "+0.0000"]


@pytest.mark.parametrize(
    ("source", "base"),
    [("org/x@abc", "org/x"), ("org/x", None), ("a/b/c@abc", None), ("mine@abc", None), ("mine", None)],
)
def test_a_base_model_is_a_repository_at_a_commit(source: str, base: str | None) -> None:
    summary: Any = SimpleNamespace(source=source)
    assert card.base_model(summary, CardDeclarations()) == base
    assert card.base_model(summary, CardDeclarations("me/y")) == "me/y"


@pytest.mark.parametrize(
    ("scheme", "tag"),
    [
        ("W4 g128", "w4a16"),
        ("W8 row A8", "w8a8"),
        ("W4 g128 A-FP8", "w4a8"),
        ("FP8 row", "fp8"),
        ("NVFP4 g16", "nvfp4"),
    ],
)
def test_the_tag_of_a_scheme_has_its_inputs(scheme: str, tag: str) -> None:
    assert card._width(scheme) == tag


def test_the_card_says_how_keys_and_values_are_stored() -> None:
    assert card._cache_text(None) == ""
    assert card._cache_text("fp8") == " The KV cache is in float8 (e4m3)."
    flag, bits = next(iter(BY_FLAG.items()))
    assert card._cache_text(flag) == (f" The scores hold for a KV cache of {bits} bits, `--kv-cache-dtype {flag}`.")


def test_the_calibration_and_limits_of_a_card() -> None:
    summary = card_summary(notes=("a note",))
    assert card._calibration(summary) == "None: no method of this recipe needs data."
    calibration = SimpleNamespace(data="drawings", samples=["a", "b"], seed=3)
    summary.manifest.provenance.calibration = calibration
    assert card._calibration(summary).startswith(
        "2 training samples of mmq's built-in drawings, selected with seed 3. `mmq_manifest.json` lists"
    )
    drawn, note, *others = card._limits(summary).splitlines()
    assert drawn.startswith("- The drawings show colored shapes.")
    assert note == "- note of the quantization: a note"
    assert len(others) == 2
    calibration.data, summary.manifest.notes = "coco", ()
    assert card._limits(summary).splitlines() == others


@pytest.mark.parametrize(
    ("gates", "text"), [((), "The recipe has no gates."), (("passed", "failed"), "| vqa | accuracy | **failed** |")]
)
def test_verdicts_that_did_not_pass_are_bold(gates: tuple[str, ...], text: str) -> None:
    results = [GateResult(task="vqa", metric="accuracy", max_drop=0.1, decide="upper", verdict=x) for x in gates]  # type: ignore[arg-type]
    lines = card._gates(SimpleNamespace(gates=results)).splitlines()  # type: ignore[arg-type]
    assert text in lines
    assert lines[2:] == (
        [
            "| vqa | accuracy | passed |",
            text,
            "",
            "- vqa accuracy: passed: allowed -10.0%",
            "- vqa accuracy: failed: allowed -10.0%",
        ]
        if gates
        else []
    )


def test_the_commands_for_vllm_have_the_cache_and_the_packages() -> None:
    text = card_serving.serving("me/x", card_summary())
    assert "vllm serve me/x --limit-mm-per-prompt '{\"image\": 1}'\n" in text
    assert "humming" not in text
    wide = card_summary(kv_cache="fp8")
    wide.parts = tuple(
        SchemeGroup("language", f"W{bits} g128", bits, (), 1, packed)
        for bits, packed in ((3, True), (2, True), (5, False))
    )
    text = card_serving.serving("me/x", wide)
    assert text.count('{"image": 1}\' --kv-cache-dtype fp8\n```') == 2
    assert "\n\n2 and 3-bit weights need vLLM 0.25.1 or later with `humming-kernels` on an NVIDIA GPU." in text


def test_a_retrieval_model_has_code_for_transformers_alone() -> None:
    summary = card_summary("blip2-itm")
    text = card_serving.serving("me/x", summary)
    family = FAMILIES["blip2-itm"]
    assert text.startswith(f"{family.unserved}, with `pip install transformers compressed-tensors`:")
    assert f'model = {family.architectures[0]}.from_pretrained("me/x")' in text
    assert "vllm serve" not in text
    assert card_usage.python_example("me/x", summary) == ""
    assert card_usage.hardware(summary) == f"- {family.unserved}\n- quantized on: H200"


def test_the_hardware_of_packed_parts() -> None:
    summary = card_summary()
    assert card_usage.hardware(summary) == "- language, W4 g128: kernel M\n- quantized on: H200"
    summary.parts = (
        SchemeGroup("language", "W4 g128", 4, (), 7, False, "kernel M"),
        SchemeGroup("x", "W4", 4, (), 1, True),
    )
    nothing = "- all hardware that vLLM supports: nothing is packed\n- quantized on: H200"
    assert card_usage.hardware(summary) == nothing


def test_code_for_transformers_is_for_its_format_alone() -> None:
    summary = card_summary()
    assert "CompressedTensorsConfig" in card_usage.python_example("me/x", summary)
    summary.manifest.format = "gptq"
    client = card_usage.python_example("me/x", summary)
    assert "CompressedTensorsConfig" not in client
    assert "OpenAI" in client


@pytest.mark.parametrize(
    ("prompts", "text"), [({}, "What is in the picture?"), ({"vqa": "Q"}, "asked"), ({"captioning": "C"}, "described")]
)
def test_the_request_has_the_recipe_s_own_prompt(prompts: dict[str, str], text: str) -> None:
    summary = card_summary()
    summary.recipe.prompts = prompts
    family: Any = SimpleNamespace(text=lambda question: "described" if question is None else "asked")
    assert card_serving._text(summary, family) == f'"{text}"'
    quoting: Any = SimpleNamespace(text=lambda question: "it's")
    summary.recipe.prompts = {"vqa": ""}
    assert card_serving._text(summary, quoting) == "\"it'\\''s\""


@pytest.mark.parametrize(
    ("passed", "problems", "verdict"),
    [(True, (), "agreed with"), (False, (), "**differed from**"), (True, ("x",), "**differed from**")],
)
def test_the_result_of_a_check_on_the_card(passed: bool, problems: tuple[str, ...], verdict: str) -> None:
    summary = card_summary()
    assert card_serving._checked(summary) == ""
    summary.serving = SimpleNamespace(
        engine="0.32.0", build="cpu", questions=8, bound=0.015, passed=passed, problems=problems
    )
    assert card_serving._checked(summary) == (
        "\n\nvLLM 0.32.0 (cpu) served this artifact and answered 8 questions about pictures; its log-probabilities "
        f"{verdict} those of the dequantized weights in transformers (bound 0.015)."
    )


def test_a_card_without_a_measured_speed_has_no_section() -> None:
    assert card_serving.speed_section(card_summary()) == ""


@pytest.mark.parametrize(
    ("is_source", "weights", "other"),
    [
        (None, "right", ""),
        (True, "right", ""),
        (True, None, ""),
        (True, "wrong", "mine, not org/x"),
        (None, "wrong", "unknown, not org/x"),
        (False, "right", "mine, not org/x"),
    ],
)
def test_another_baseline_is_named(is_source: bool | None, weights: str | None, other: str) -> None:
    baseline = None if is_source is None else SimpleNamespace(is_source=is_source, model="mine")
    models = {} if weights is None else {"full precision": SimpleNamespace(weights=weights)}
    report: Any = SimpleNamespace(evaluation=SimpleNamespace(baseline=baseline, models=models), measures=())
    manifest: Any = SimpleNamespace(source=SimpleNamespace(digest="right", model="org/x"))
    recipe: Any = None
    summary = Summary("x", manifest, report, recipe, ())
    assert summary.other_baseline == other
    assert dataclasses.replace(summary, report=None).other_baseline == ""
    assert summary.metrics() == dataclasses.replace(summary, report=None).metrics() == {}
    manifest.source.digest = None  # of an older manifest
    assert summary.other_baseline == ("" if is_source is not False else other)


@pytest.mark.parametrize(
    ("data", "source", "has_note"),
    [
        ("drawings", "org/x", True),
        ("coco, drawings", "org/x", True),
        ("coco", "org/x", False),
        (None, "org/x", False),
        ("drawings", "demo-llava", False),
    ],
)
def test_scores_on_drawings_have_a_note(data: str | None, source: str, has_note: bool) -> None:
    summary: Any = SimpleNamespace(source=source, report=SimpleNamespace(evaluation=SimpleNamespace(data=data)))
    assert bool(drawings_note(summary)) is has_note
    summary.report = None
    assert drawings_note(summary) == ""


# The state of a repository


class Remotes:
    """Stand-ins for repositories by name and revision; an absent one raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **repos: Any) -> None:
        self.repos = repos
        monkeypatch.setattr(upload, "open_remote", self._open)

    def _open(self, repo: str, revision: str | None = None) -> Any:
        name = revision or repo
        if self.repos.get(name) is None:
            raise HubMissing("absent")
        return self.repos[name]


def remote(*files: str, private: bool = True, commit: str = "c") -> Any:
    return SimpleNamespace(private=private, commit=commit, files=dict.fromkeys(files))


def test_an_existing_repository_must_fit_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, foreign = remote(MANIFEST, "w"), remote("README.md", ".gitattributes", "a.bin", "b.bin")
    remotes = Remotes(monkeypatch, mine=ours, v1=foreign)
    assert upload.existing_repository(Target("none")) is None
    assert upload.existing_repository(Target("mine")) is ours
    assert upload.existing_repository(Target("mine", "new")) is ours  # a new branch begins at main
    with pytest.raises(PublishError, match=r"mine@v1 has 2 files that mmq did not publish, such as a\.bin"):
        upload.existing_repository(Target("mine", "v1"))
    assert upload.existing_repository(Target("mine", "v1", replace=True)) is foreign
    remotes.repos["mine"] = remote("README.md", ".gitattributes")
    assert upload.existing_repository(Target("mine")) is remotes.repos["mine"]
    with pytest.raises(PublishError, match="mine exists and is private"):
        upload.existing_repository(Target("mine", private=False))
    remotes.repos["mine"] = remote(private=False)
    with pytest.raises(PublishError, match="mine exists and is public"):
        upload.existing_repository(Target("mine"))
    assert upload.existing_repository(Target("mine", private=False)) is remotes.repos["mine"]


def test_a_target_is_no_commit_and_a_pull_request_is_against_main() -> None:
    upload.check_target(Target("me/x", "v1"))
    upload.check_target(Target("me/x", "a" * 39))
    upload.check_target(Target("me/x", create_pr=True))
    with pytest.raises(PublishError, match="is a commit, which cannot change"):
        upload.check_target(Target("me/x", "A1" * 20))
    with pytest.raises(PublishError, match="--create-pr and --revision v1 exclude each other"):
        upload.check_target(Target("me/x", "v1", create_pr=True))


def test_a_commit_whose_response_was_lost_is_recognized_by_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "same_content", lambda local, stored: stored is None)
    files: Any = {"new": b"1", "kept": b"2"}
    package = Package(files, ("old",), ())
    parent = remote("old", "kept", "other", ".gitattributes", commit="before")

    def arrived(**head: Any) -> str | None:
        Remotes(monkeypatch, **({"me": remote(*head["files"], commit=head["commit"])} if head else {}))
        return upload._arrived(package, Target("me"), parent)

    assert arrived(files=("new", "kept", "other"), commit="after") == "after"
    assert arrived(files=("new", "kept", "other", ".gitattributes"), commit="after") == "after"
    assert arrived(files=("new", "kept", "other"), commit="before") is None
    assert arrived(files=("new", "kept", "other", "old"), commit="after") is None
    assert arrived(files=("new", "kept"), commit="after") is None
    monkeypatch.setattr(upload, "same_content", lambda local, stored: False)
    assert arrived(files=("new", "kept", "other"), commit="after") is None
    assert arrived() is None


def test_a_repository_that_another_process_created_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    created: list[Any] = []
    api = SimpleNamespace(create_repo=lambda *repo, **options: created.append((repo, options)))
    remotes = Remotes(monkeypatch, me=remote(".gitattributes"))
    assert upload._created(api, Target("me")) is remotes.repos["me"]
    assert created == [(("me",), {"private": True, "exist_ok": True})]
    remotes.repos["me"] = remote(MANIFEST)
    with pytest.raises(HubError, match="another process created me at the same time"):
        upload._created(api, Target("me"))
    del remotes.repos["me"]
    with pytest.raises(HubError, match="another process created me at the same time"):
        upload._created(api, Target("me"))


@pytest.mark.parametrize("error", [ArtifactError("x: missing", "again"), HubError("no route")])
def test_an_error_after_the_commit_says_that_it_exists(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(remote: Any, on_event: Any) -> None:
        raise error

    monkeypatch.setattr(upload, "open_remote", lambda repo, commit: f"{repo}@{commit}")
    monkeypatch.setattr(upload, "verify_remote", fails)
    with pytest.raises(type(error), match=r"^the commit exists \(url\), but ") as caught:
        upload._read_back("me/x", "abc", "url", lambda event: None)
    hint = "again" if isinstance(error, ArtifactError) else "verify it with `mmq verify hub:me/x@abc`"
    assert caught.value.hint == hint  # type: ignore[attr-defined]


# Parts of the proof


def problems_of_linears(**changes: Any) -> list[str]:
    """Problems of a manifest with two packed linears; changes: of what the plan or the manifest has."""
    four, tensor = Scheme(4, 128), Scheme(8, "tensor")
    rows = [
        SimpleNamespace(module="a", decision="packed", scheme=four),
        SimpleNamespace(module="b", decision="packed", scheme=tensor),
        SimpleNamespace(module="c", decision="dequantized", scheme=four),
        SimpleNamespace(module="d", decision="kept", scheme=None),
    ]
    plan: Any = SimpleNamespace(rows=rows, units=[SimpleNamespace(block="0", rows=rows[:3])])
    manifest = {"errors": {"a": 0, "b": 0, "c": 0}, "units": ("0",)} | changes
    schemes = {"a": four, "b": Scheme(8, "row")} | manifest.pop("schemes", {})
    summary: Any = SimpleNamespace(manifest=SimpleNamespace(**manifest))
    return list(proof_plan._of_linears(plan, summary, {name: scheme for name, scheme in schemes.items() if scheme}))


def test_the_packed_linears_of_a_manifest_are_those_of_the_plan() -> None:
    assert problems_of_linears() == []
    assert problems_of_linears(schemes={"b": None}) == [
        "the recipe packs 2 linears, the manifest names 1: b is in one of the two"
    ]
    assert problems_of_linears(schemes={"a": Scheme(3, 128)}) == [
        f"config.json has scheme {Scheme(3, 128).label()} for a, the recipe has {Scheme(4, 128).label()}"
    ]
    assert problems_of_linears(errors={"a": 0, "b": 0}) == [
        "the linears in the manifest's errors differ from the linears that the recipe quantizes"
    ]
    assert problems_of_linears(units=()) == ["the manifest's units differ from the blocks that the recipe quantizes"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, ""),
        ({"after": 31}, "the manifest counts 31 bytes of tensors, the artifact has 30"),
        ({"planned": 31}, "the manifest counts 30 bytes of tensors, the artifact has 30"),
        ({"stored": 31}, "the manifest counts 30 bytes of tensors, the artifact has 31"),
        ({"before": 101}, "the manifest counts 101 bytes of source tensors, the plan 100"),
        ({"components": {"vision": 2}}, "the manifest's bytes of the components differ from the plan's"),
        ({"components": {}}, ""),  # of an older manifest
        ({"bits": 4.5 * (1 + 1e-8)}, "the manifest has 4.5000 bits per weight, the plan 4.5000"),
    ],
)
def test_sizes_of_a_manifest_are_those_of_plan_and_files(
    changes: dict[str, Any], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof_plan, "size_record", lambda plan: SimpleNamespace(components={"vision": 1}))
    values = {
        "after": 30,
        "planned": 30,
        "stored": 30,
        "before": 100,
        "components": {"vision": 1},
        "bits": 4.5,
    } | changes
    sizes = SimpleNamespace(after=values["after"], before=values["before"], components=values["components"])
    tensors = {
        "a": SimpleNamespace(name="a.weight", bytes=values["stored"]),
        "b": SimpleNamespace(name=f"b{proof_plan.CACHE_SCALES[0]}", bytes=4),  # the plan does not count them
    }
    plan: Any = SimpleNamespace(bytes_after=values["planned"], bytes_before=100, bits_per_weight=4.5)
    summary: Any = SimpleNamespace(manifest=SimpleNamespace(bytes=sizes, bits_per_weight=values["bits"]))
    artifact: Any = SimpleNamespace(checkpoint=SimpleNamespace(tensors=tensors))
    assert list(proof_plan._of_sizes(plan, summary, artifact)) == [problem] * bool(problem)


@pytest.mark.parametrize(
    ("ids", "changes", "problem"),
    [
        ("ab", {}, ""),
        ("", {}, "the recipe's methods need calibration samples, but the manifest names none"),
        ("ab", {"needed": False}, "the manifest names calibration samples, but no method of the recipe needs them"),
        ("", {"needed": False}, ""),
        ("abc", {}, "the manifest names 3 calibration samples, the recipe allows 2"),
        ("aa", {}, "the manifest names a calibration sample twice"),
        ("aa", {"tasks": ("vqa", "captioning")}, ""),  # both tasks may use a picture
        ("ab", {"seed": 4}, "the manifest has calibration seed 4, the recipe 3"),
        ("ab", {"seed": None}, ""),
    ],
)
def test_the_calibration_of_a_manifest_is_that_of_the_recipe(ids: str, changes: dict[str, Any], problem: str) -> None:
    record = SimpleNamespace(
        samples=[SimpleNamespace(id=name) for name in ids], seed=changes.get("seed", 3), batch=8, vision_weight=None
    )
    recipe = SimpleNamespace(samples=2, tasks=changes.get("tasks", ("vqa",)), seed=3, batch=8, vision_weight=1.0)
    plan: Any = SimpleNamespace(
        needs_calibration=changes.get("needed", True), recipe=SimpleNamespace(calibration=recipe)
    )
    summary: Any = SimpleNamespace(manifest=SimpleNamespace(provenance=SimpleNamespace(calibration=record)))
    assert list(proof_plan._of_calibration(plan, summary)) == [problem] * bool(problem)


def test_lists_of_a_config_are_compared_without_order() -> None:
    first = {"config_groups": {"group_0": {"targets": ["a", "b"]}, "group_1": {"targets": []}}, "n": 1}
    second = {"n": 1, "config_groups": {"x": {"targets": []}, "y": {"targets": ("b", "a")}}}
    assert proof_plan._unordered(first) == proof_plan._unordered(second)
    assert proof_plan._unordered(first) != proof_plan._unordered(second | {"n": 2})


@pytest.mark.parametrize(("weights", "is_problem"), [("w", False), ("other", True), (None, True)])
def test_a_speed_is_that_of_these_weights(weights: str | None, is_problem: bool) -> None:
    summary: Any = SimpleNamespace(speed=SimpleNamespace(weights=weights))
    assert len(list(proof_serving.speed_problems(summary, "w"))) == is_problem
    summary.speed = None
    assert list(proof_serving.speed_problems(summary, "w")) == []


def test_values_are_the_same_within_the_error_of_a_sum() -> None:
    assert proof_answers.same({"a": (1.0, 2)}, {"a": (1.0 + 1e-10, 2)})
    for other in ({"a": (1.0 + 1e-8, 2)}, {"a": (1.0, 3)}, {"a": (1.0,)}, {"b": (1.0, 2)}, {"a": (1.0, 2), "b": 1}):
        assert not proof_answers.same({"a": (1.0, 2)}, other)
    assert proof_answers.same(0.0, 1e-13)
    assert not proof_answers.same(0.0, 1e-11)
    assert not proof_answers.same("a", 1.0)


@pytest.mark.parametrize(
    ("base", "given", "card_of_source", "license"),
    [
        (
            "org/x",
            {},
            {"license": "other", "license_link": "u", "license_name": ""},
            {"license": "other", "license_link": "u"},
        ),
        ("org/x", {"license": "mit"}, {"license": "other"}, {"license": "mit"}),
        (None, {}, {"license": "other"}, {}),
        ("org/x", {}, {}, {}),
        ("org/x", {}, None, {}),
    ],
)
def test_the_license_is_the_publisher_s_or_the_source_s(
    base: str | None,
    given: dict[str, str],
    card_of_source: dict[str, str] | None,
    license: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(repo: str) -> dict[str, str]:
        assert repo == base
        if card_of_source is None:
            raise HubError("no route")
        return card_of_source

    monkeypatch.setattr(repository, "_card_data", read)
    summary: Any = SimpleNamespace(source="mine")
    declared = repository.with_source_license(summary, CardDeclarations(base, given))
    assert (declared.license, declared.base_model) == (license, base)
