"""Prompts and answer lengths of a recipe: in calibration, evaluation, check, requests, keys, and every record."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import pytest
from click.testing import CliRunner

from exporter import api
from exporter.artifact.artifact import Artifact
from exporter.artifact.manifest import MANIFEST, read_manifest
from exporter.commands.main import cli
from exporter.commands.plan_tables import plan_notes
from exporter.commands.serving_text import example, shell_line
from exporter.device import choose
from exporter.errors import ArtifactError, PlanError, RecipeError
from exporter.evaluation.answers import digest
from exporter.evaluation.backends import local_answerers, weights_digest
from exporter.evaluation.evaluate import store_report
from exporter.model.embedded import MODELS
from exporter.model.embedded import example as demo_example
from exporter.model.families import FAMILIES
from exporter.model.inference.predict import batches
from exporter.model.inference.predict_server import ServedPredictor, Server
from exporter.model.processors.processor import load_processor
from exporter.model.source import open_source
from exporter.pipeline import picture_question
from exporter.pipeline.preparation import prepare
from exporter.pipeline.samples import calibration_samples
from exporter.pipeline.serving_check import questions
from exporter.planning.overrides import adjusted
from exporter.planning.prompts import by_recipe, prompts_by_task
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import load_recipe, parse_recipe
from exporter.publishing.artifact_summary import folder_reader, read_place, read_summary
from exporter.publishing.card import CardDeclarations, render
from exporter.publishing.proof.evaluation import evaluation_problems
from exporter.publishing.proof.plan import plan_problems
from exporter.publishing.report.content import collect
from exporter.quantization import identity
from exporter.serving import check
from exporter.serving.launch import Program, launch
from exporter.study.prepare import base_recipe
from exporter.study.run import _exam, keys_of_run
from exporter.study.worker_tasks import How, Setup, open_model

CPU = choose("cpu")
LLAVA = FAMILIES["llava"]
CAPTION, QUESTION = "Describe the image.", '{question} Reply in {"one"} word.'
PROMPTS = {"captioning": CAPTION, "vqa": QUESTION}
LENGTHS = {"vqa": 3}


def recipe(**changes: Any) -> Recipe:
    """A small calibrated recipe for the demo model."""
    few = adjusted(load_recipe("llava-w4"), "demo-llava", samples=4, eval_samples=4)
    return Recipe.model_validate(few.model_dump() | {"gates": ()} | changes)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluated artifact with its own prompts."""
    out = tmp_path_factory.mktemp("prompts") / "own"
    api.export(recipe(), out=out, prompts=PROMPTS, max_new_tokens=LENGTHS, device="cpu")
    return out


def test_a_recipe_replaces_the_familys_prompts_and_no_others() -> None:
    family = by_recipe(LLAVA, recipe(prompts={"captioning": CAPTION}, max_new_tokens={"vqa": 3}))
    assert family.text(None) == CAPTION
    assert family.text("why?") == LLAVA.text("why?")
    assert family.max_new_tokens == {"vqa": 3, "captioning": LLAVA.max_new_tokens["captioning"]}
    assert by_recipe(LLAVA, recipe()) == LLAVA
    braces = by_recipe(LLAVA, recipe(prompts={"vqa": QUESTION}))
    assert braces.text("{x}?") == '{x}? Reply in {"one"} word.'  # no other braces have a meaning


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompts: {vqa: 'Answer.'}", "prompts: vqa: {question} is missing"),
        ("prompts: {captioning: '{question}'}", "prompts: captioning: captions have no {question}"),
        ("prompts: {caption: x}", "prompts: caption: only vqa and captioning have a prompt. Did you mean 'captioning'"),
        ("prompts: {retrieval: x}", "prompts: retrieval: only vqa and captioning have a prompt"),
        ("max_new_tokens: {vqa: 0}", "max_new_tokens.vqa: Input should be greater than or equal to 1"),
        ("max_new_tokens: {vqua: 5}", "unknown task with answers in text 'vqua'. Did you mean 'vqa'"),
    ],
)
def test_impossible_prompts_are_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(f"quantize: [{{component: language, bits: 4}}]\n{text}\n", "mine.yaml")
    assert message in caught.value.message


def test_prompts_that_a_model_cannot_take_are_refused_by_the_plan() -> None:
    with pytest.raises(PlanError, match=r"prompts\.captioning: remove <image>: mmq puts the picture before the prompt"):
        prepare(recipe(prompts={"captioning": "<image> Describe."}), CPU, headers_only=True)
    itm = adjusted(load_recipe("blip2-retrieval-w4"), "demo-blip2-itm", prompts={"captioning": "A"})
    with pytest.raises(
        PlanError, match=r"prompts\.captioning: family blip2-itm answers no task in text, not captioning"
    ):
        prepare(itm, CPU, headers_only=True)


def test_recipes_without_prompts_keep_their_digest_and_others_change_it() -> None:
    assert recipe().digest() == recipe(prompts={}, max_new_tokens={}).digest()
    others = [recipe(prompts={"captioning": CAPTION}), recipe(max_new_tokens={"vqa": 3}), recipe()]
    assert len({other.digest() for other in others}) == 3


def tokens(adjusted_recipe: Recipe) -> list[list[int]]:
    """Token ids of every calibration sample."""
    plan, checkpoint = prepare(adjusted_recipe, CPU, headers_only=True)
    processor = load_processor(checkpoint.folder)
    rows = batches(processor, plan.family, calibration_samples(plan, ()), 1)
    return [row["input_ids"][0].tolist() for row in rows]


def test_calibration_reads_the_prompts_and_its_identity_changes_with_them() -> None:
    changed = recipe(prompts={"captioning": CAPTION})
    processor = load_processor(MODELS["demo-llava"])
    words = processor.tokenizer(CAPTION, add_special_tokens=False)["input_ids"]

    def holds(row: list[int]) -> bool:
        return any(row[i : i + len(words)] == words for i in range(len(row)))

    assert [holds(row) for row in tokens(changed)] == [True, False, True, False]  # captions and questions alternate
    assert not any(holds(row) for row in tokens(recipe()))
    identities = []
    for variant in (recipe(), changed):
        plan, checkpoint = prepare(variant, CPU, headers_only=True)
        samples = calibration_samples(plan, ())
        identities.append(identity.of_job(plan, checkpoint, processor, samples, ["a"] * len(samples), CPU))
    assert identities[0]["samples"] != identities[1]["samples"]
    assert [before == after for before, after in zip(*(entry["samples"] for entry in identities), strict=True)] == [
        False,
        True,
        False,
        True,
    ]


def test_manifest_report_card_and_page_hold_the_prompts(artifact: Path) -> None:
    manifest, summary = read_manifest(artifact), read_place(str(artifact))
    records = {task: record.model_dump() for task, record in manifest.prompts.items()}
    assert records == {
        "vqa": {"prompt": QUESTION, "max_new_tokens": 3},
        "captioning": {"prompt": CAPTION, "max_new_tokens": LLAVA.max_new_tokens["captioning"]},
    }
    assert summary.report
    assert {task: record.model_dump() for task, record in summary.report.evaluation.prompts.items()} == records
    expected = {"prompt captioning": CAPTION, "prompt vqa": QUESTION, "max_new_tokens vqa": "3"}
    assert manifest.recipe.overrides == summary.report.evaluation.overrides == expected
    card = render("me/x", summary, CardDeclarations(), (), "")
    assert f'captioning "{CAPTION}", up to 64 new tokens' in card
    assert "What is in the picture? Reply in" in card
    assert CAPTION in collect(summary, {})["prompts"]
    assert plan_problems(read_summary("own", folder_reader(artifact)), Artifact.open(artifact)) == []


def test_answers_of_the_artifact_use_its_prompts_and_its_answer_length(artifact: Path) -> None:
    checkpoint, opened = open_source("demo-llava")[0], Artifact.open(artifact)
    assert opened.family.text(None) == CAPTION
    sample = questions(artifact, (), 1)[0]
    _, own = local_answerers(checkpoint, opened, CPU, 4)
    _, other = local_answerers(checkpoint, opened, CPU, 4, family=LLAVA)
    assert own.identity["generation"]["vqa"]["max_tokens"] == 3
    assert digest(dict(own.identity)) != digest(dict(other.identity))
    assert "Reply in" in own.prompt(sample)
    assert own.prompt(sample) != other.prompt(sample)
    with own.opened() as backend:
        answers = next(iter(backend.pieces([sample])))
    assert len(load_processor(artifact).tokenizer(answers[0], add_special_tokens=False)["input_ids"]) <= 3
    body = ServedPredictor(Server("http://127.0.0.1:1"), opened.family, "m").body(sample)
    assert body["max_tokens"] == 3
    assert "Reply in" in json.dumps(body["messages"][0]["content"][1])


def test_evaluate_replaces_prompts_and_records_them_without_changing_the_artifact(
    artifact: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(artifact, tmp_path / "copy"))
    before = (out / MANIFEST).read_bytes()
    arguments = ["evaluate", str(out), "--device", "cpu", "--prompt", "captioning=A picture of", "--json"]
    done = CliRunner().invoke(cli, [*arguments, "--max-new-tokens", "captioning=2"])
    assert done.exit_code == 0, done.output
    evaluated = json.loads(done.stdout.splitlines()[-1])["evaluation"]
    assert evaluated["prompts"]["captioning"] == {"prompt": "A picture of", "max_new_tokens": 2}
    assert evaluated["prompts"]["vqa"] == {"prompt": QUESTION, "max_new_tokens": 3}
    assert evaluated["overrides"]["prompt captioning"] == "A picture of"
    for model in evaluated["models"].values():
        assert model["generation"]["captioning"]["max_tokens"] == 2
    assert (out / MANIFEST).read_bytes() == before
    summary, opened = read_place(str(out)), Artifact.open(out)
    assert summary.report
    assert evaluation_problems(summary, summary.report, opened, weights_digest(opened)) == []
    record = summary.report.evaluation.model_copy(update={"prompts": {}})  # then the lengths would be the artifact's
    hidden = summary.report.model_copy(update={"evaluation": record})
    (problem,) = evaluation_problems(summary, hidden, opened, weights_digest(opened))
    assert "generation settings are not those of mmq" in problem


def test_a_report_with_other_prompts_replaces_one_on_more_samples(artifact: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(artifact, tmp_path / "copy"))
    few = api.evaluate(out, eval_samples=2, device="cpu")
    api.evaluate(out, eval_samples=4, device="cpu")
    assert not store_report(out, few)
    assert store_report(out, few.model_copy(update={"evaluation": few.evaluation.model_copy(update={"prompts": {}})}))


class StubEngine:
    """An engine that records the prompts that it is asked."""

    asked: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait_healthy(self, seconds: float) -> float:
        return seconds

    def ask(self, text: str, picture: bytes, longest: int) -> str:
        self.asked.append((text, longest))
        return ""

    def schemes(self) -> dict[str, str]:
        return {}

    def kernels(self) -> tuple[str, ...]:
        return ()


def test_check_and_the_example_of_serve_use_the_artifacts_prompts(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened, program = Artifact.open(artifact), Program("vllm", "0.32.0", cpu=False)
    monkeypatch.setattr(check, "Engine", StubEngine)
    session = check.CheckSettings(program, CPU, lambda _: None, 1, (), 1.0, 0.015, None, None)
    check._run_engine(artifact, opened, questions(artifact, (), 1), session, tmp_path / "log")
    (text, longest), *_ = StubEngine.asked
    assert text.endswith('Reply in {"one"} word.')
    assert longest == 3
    text = f'{demo_example.QUESTION} Reply in {{"one"}} word.'
    assert example(opened.family) == (text, 3)
    assert json.dumps(text)[1:-1] in shell_line(launch(artifact, {}, program), opened.family)
    assert example(FAMILIES["llava"])[1] == LLAVA.max_new_tokens["vqa"]
    request = picture_question.question(demo_example.PICTURE, None, 8, False, str(artifact))
    assert request.wording(LLAVA).text(None) == CAPTION  # mmq ask, also for the source beside the artifact
    assert picture_question.question(demo_example.PICTURE, None, 8, False, "demo-llava").wording(LLAVA) == LLAVA
    captions = SimpleNamespace(
        max_new_tokens={"captioning": 9}, text=lambda question: CAPTION if question is None else ""
    )
    assert example(captions) == (CAPTION, 9)  # type: ignore[arg-type]


def test_a_manifest_whose_prompt_lost_its_question_is_damaged(artifact: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(artifact, tmp_path / "copy"))
    content = json.loads((out / MANIFEST).read_text())
    content["prompts"]["vqa"]["prompt"] = "Answer."
    (out / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"prompts.*\{question\} is missing"):
        read_manifest(out)
    content["prompts"]["vqa"]["prompt"] = "{question} Be brief."
    (out / MANIFEST).write_text(json.dumps(content))
    problems = plan_problems(read_summary("copy", folder_reader(out)), Artifact.open(out))
    assert "the manifest and recipe.yaml have different prompts" in problems


def test_an_artifact_of_an_older_mmq_has_the_familys_prompts(artifact: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(artifact, tmp_path / "copy"))
    content = json.loads((out / MANIFEST).read_text())
    del content["prompts"]
    (out / MANIFEST).write_text(json.dumps(content))
    assert prompts_by_task(Artifact.open(out).family) == prompts_by_task(LLAVA)


def test_plan_shows_the_prompts() -> None:
    arguments = ["plan", "--recipe", "llava-w4", "--model", "demo-llava", "--device", "cpu"]
    done = CliRunner().invoke(cli, [*arguments, "--prompt", f"captioning={CAPTION}", "--json"])
    assert json.loads(done.stdout)["prompts"]["captioning"]["prompt"] == CAPTION
    plan, _ = prepare(recipe(prompts={"captioning": CAPTION}), CPU, headers_only=True)
    assert any(f'captioning "{CAPTION}", up to 64 new tokens' in note for note in plan_notes(plan))
    assert not any("prompts" in note for note in plan_notes(prepare(recipe(), CPU, headers_only=True)[0]))
    wrong = CliRunner().invoke(cli, [*arguments, "--prompt", CAPTION])
    assert wrong.exit_code == 2
    assert "expected TASK=TEXT like captioning='Describe the image.'" in wrong.output


def test_units_and_scores_of_a_study_depend_on_the_prompts(tmp_path: Path) -> None:
    def setup_with(how: How = "forced", **options: Any) -> Setup:
        base = base_recipe("demo-llava", None, (), 4, 0).model_copy(update=options)
        return Setup(tmp_path, base.model_dump_json(), samples=4, device="cpu", how=how)

    def keys(**options: Any) -> Any:
        open_model.cache_clear()
        return keys_of_run(setup_with(**options), open_model(setup_with(**options)), lambda _: None)

    plain, changed = keys(), keys(prompts={"captioning": CAPTION})
    assert plain == keys()
    assert plain.calibration != changed.calibration
    assert plain.exam != changed.exam
    assert plain.source == changed.source
    lengths = {"max_new_tokens": {"vqa": 3}}
    assert _exam(setup_with("forced", **lengths), plain) == _exam(setup_with("forced"), plain)  # nothing is generated
    assert _exam(setup_with("generated", **lengths), plain) != _exam(setup_with("generated"), plain)


def test_a_start_token_that_nothing_writes_is_mentioned_once(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MODELS["demo-llava"], tmp_path / "m"))
    with_folder = adjusted(load_recipe("llava-w4"), folder)

    def notes() -> list[str]:
        return [note for note in prepare(with_folder, CPU, headers_only=True)[0].warnings if "start token" in note]

    assert notes() == []
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    assert len(notes()) == 1
    assert "writes the tokenizer's start token '<s>'" in notes()[0]
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text("{{ '<s>' }}" + template)
    assert notes() == []
