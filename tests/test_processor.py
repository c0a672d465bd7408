"""Processors of unknown origin: loaded in a helper process first, compared with config.json, never running code."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from exporter.commands.main import cli
from exporter.data.tasks.sample import Sample
from exporter.device import choose
from exporter.errors import CheckpointError, MmqError, PlanError
from exporter.events import ignore
from exporter.model.embedded import MODELS
from exporter.model.families import FAMILIES
from exporter.model.inference.encoding import encode, render
from exporter.model.processors import inspector
from exporter.model.processors.chat_template import PROBES, Template, parse_template
from exporter.model.processors.inspector import inspect
from exporter.model.processors.processor import load_processor
from exporter.model.processors.tokenizer_check import try_out
from exporter.model.stream import build_skeleton
from exporter.pipeline.export import export
from exporter.pipeline.preparation import prepare
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import load_recipe
from tests.conftest import header_config


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODELS["demo-llava"], tmp_path / "m"))


def change(file: Path, **values: Any) -> None:
    """Change keys of a JSON file; ... deletes."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def plan(folder: Path, recipe: str = "llava-w4-vit8") -> tuple[str, ...]:
    """Warnings of the plan."""
    adjusted = load_recipe(recipe).adjusted(model={"repo": str(folder)})
    return prepare(adjusted, choose("cpu"), headers_only=True)[0].warnings


@pytest.mark.parametrize("name", MODELS)
def test_the_embedded_models_processors_fit(name: str) -> None:
    recipes = {"demo-llava": "llava-w4-vit8", "demo-blip2": "blip2-caption-w4", "demo-blip2-itm": "blip2-retrieval-w4"}
    assert not any("processor" in warning for warning in plan(MODELS[name], recipes[name]))


def test_prompts_are_those_of_the_chat_template() -> None:
    processor = load_processor(MODELS["demo-llava"])
    for text in ("what is it?", "  two\n", "{{ 7 * 7 }} {text} %d"):
        content = [{"type": "image"}, {"type": "text", "text": text}]
        expected = processor.library.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        assert processor.template is not None
        assert processor.template.prompt(text) == expected
    family = FAMILIES["llava"]
    question = Sample("s", lambda: None, "what?", ("x",))  # type: ignore[arg-type, return-value]
    assert render(processor, family, question, None) == f"USER: <image>\n{family.text('what?')} ASSISTANT:"


def test_a_template_is_parsed_only_when_it_writes_texts_unchanged() -> None:
    assert parse_template([f"<{text}>" for text in PROBES], "m") == Template("<", ">")
    assert parse_template([f"<{text.strip()}>" for text in PROBES], "m") == Template("<", ">", strips=True)
    assert Template("<", ">", strips=True).prompt(" a ") == "<a>"
    for write in (
        str.upper,
        lambda text: f"{text}{text}",
        lambda text: text[:9],
        lambda text: text.replace("<", "&lt;"),
    ):
        with pytest.raises(CheckpointError, match="m: its chat template does not write"):
            parse_template([f"<{write(text)}>" for text in PROBES], "m")


TEMPLATES = {
    "{{": "TemplateSyntaxError",
    "{{ x.y }}": "'x' is undefined",
    "{{ raise_exception('boo') }}": "boo",
    "{{ ''.__class__.__mro__ }}": "SecurityError",
    "{{ 'x' * 1000000 }}": "more than 100,000 characters",
    "{{ '%100000000d' % 1 }}": "time limit|memory|more than 100,000",
    "{{ '%10000000000d' % 1 }}": "time limit|memory|more than 100,000",
    "{{ messages[0]['content'][1]['text'] | upper }}": "does not write a user's text exactly once and unchanged",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "exceeds the time limit",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_unusable_template_is_refused_by_the_plan(model: Path, template: str) -> None:
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match=TEMPLATES[template]):
        plan(model)


FIT: list[tuple[str, str, str, dict[str, Any], str, str]] = [
    ("demo-llava", "llava-w4-vit8", "processor_config.json", {"patch_size": ...}, "cannot encode", '"patch_size": 8'),
    ("demo-llava", "llava-w4-vit8", "processor_config.json", {"patch_size": 4}, "256 image tokens", '"patch_size": 8'),
    ("demo-llava", "llava-w4-vit8", "processor_config.json", {"patch_size": 0}, "ZeroDivisionError", '"patch_size": 8'),
    ("demo-llava", "llava-w4-vit8", "processor_config.json", {"num_additional_image_tokens": ...},
     r"63 image tokens \(id 4\), but the model expects 64", '"num_additional_image_tokens": 1'),
    ("demo-llava", "llava-w4-vit8", "processor_config.json", {"vision_feature_select_strategy": "full"},
     "65 image tokens", '"vision_feature_select_strategy": "default"'),
    ("demo-llava", "llava-w4-vit8", "processor_config.json", {"num_additional_image_tokens": 10**7}, "signal", ""),
    ("demo-llava", "llava-w4-vit8", "config.json", {"image_token_index": 5}, r"has 0 image tokens \(id 5\)", ""),
    ("demo-llava", "llava-w4-vit8", "preprocessor_config.json", {"crop_size": {"height": 32, "width": 32}},
     "makes pictures of 32 x 32 pixels, but the vision tower expects 64 x 64", ""),
    ("demo-llava", "llava-w4-vit8", "preprocessor_config.json", {"size": {"shortest_edge": 10**9}},
     "exceeds the limit of 8192", ""),
    ("demo-llava", "llava-w4-vit8", "preprocessor_config.json", {"crop_size": {"height": 10**6, "width": 10**6}},
     "memory limit", ""),
    ("demo-llava", "llava-w4-vit8", "preprocessor_config.json", {"size": {"shortest_edge": 9000}},
     "exceeds the limit of 8192", ""),
    ("demo-blip2", "blip2-caption-w4", "processor_config.json", {"num_query_tokens": ...},
     "has 0 image tokens .* would not see the picture", '"num_query_tokens": 32'),
]  # fmt: skip


# Ten million image tokens take seconds until the time is up; a template above exceeds the same limit.
FIT_CASES = [
    pytest.param(*case, id=str(case[3]), marks=pytest.mark.slow if case[4] == "signal" else ()) for case in FIT
]


@pytest.mark.parametrize(("name", "recipe", "file", "values", "reason", "hint"), FIT_CASES)
def test_a_processor_that_does_not_match_the_config_is_refused_by_the_plan(
    tmp_path: Path, name: str, recipe: str, file: str, values: dict[str, Any], reason: str, hint: str
) -> None:
    folder = Path(shutil.copytree(MODELS[name], tmp_path / "m"))
    change(folder / file, **values)
    with pytest.raises(MmqError, match=reason) as caught:
        plan(folder, recipe)
    assert hint in (caught.value.hint or "")


def test_the_hint_solves_the_problem(model: Path) -> None:
    change(model / "processor_config.json", patch_size=..., num_additional_image_tokens=...)
    with pytest.raises(PlanError) as caught:
        plan(model)
    added = json.loads("{" + (caught.value.hint or "").partition(": ")[2] + "}")
    change(model / "processor_config.json", **added)
    assert plan(model) == plan(MODELS["demo-llava"]) or not any("processor" in warning for warning in plan(model))


DAMAGE = {
    "tokenizer.json": [
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b"\xff",
        b'{"model": {"type": "WordLevel", "vocab": {"a": -1}}}',
    ],
    "tokenizer_config.json": [b"[", b"[]", b"null", b"\xff"],
    "preprocessor_config.json": [b"", b"null", b'{"image_processor_type": 3}'],
    "processor_config.json": [b"]", b"[]"],
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name, all_ in DAMAGE.items() for content in all_])
def test_damaged_processor_files_end_in_one_error_that_names_the_file(model: Path, name: str, content: bytes) -> None:
    (model / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"m/{name}|{model}: its processor cannot be loaded"):
        plan(model)


def tokenizer_with(folder: Path, model: dict[str, Any] | None = None, **values: Any) -> None:
    """The embedded words in a tokenizer of another kind."""
    content = json.loads((folder / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    if model:
        listed = [[word, -1.0] for word in sorted(words, key=words.__getitem__)]
        content["model"] = {"vocab": listed if model["type"] == "Unigram" else words, "unk_token": "<unk>"} | model
    if more := values.pop("vocab", None):
        content["model"]["vocab"] |= more
    (folder / "tokenizer.json").write_text(json.dumps(content | values))


KINDS: dict[str, dict[str, Any]] = {
    "WordLevel": {},
    "WordPiece": {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
    "BPE": {"merges": []},
    "Unigram": {"unk_id": 0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_that_cannot_encode_unknown_words_is_refused_by_the_plan(model: Path, kind: str) -> None:
    tokenizer_with(model, {"type": kind, **KINDS[kind]})
    plan(model)
    shutil.copy(MODELS["demo-llava"] / "tokenizer.json", model)
    tokenizer_with(model, {"type": kind, **KINDS[kind], "unk_token": "nope", "unk_id": None})
    with pytest.raises(
        CheckpointError, match=r"m/tokenizer\.json: its tokenizer cannot encode and decode texts"
    ) as caught:
        plan(model)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece", "BPE"])
def test_two_tokens_with_one_id_are_refused_whichever_the_library_keeps(model: Path, kind: str) -> None:
    tokenizer_with(model, {"type": kind, **KINDS[kind]}, vocab={"zz": 0})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: .*: two tokens have the id 0: '<unk>', 'zz'"):
        plan(model)


def test_tokens_without_an_embedding_are_refused_by_the_plan(model: Path) -> None:
    change(model / "special_tokens_map.json", eos_token="<end>", pad_token="<fill>")
    with pytest.raises(
        PlanError, match=r"tokens with the ids 256 \('<(end|fill)>'\), 257 \(.*\), but the model has only 256 tokens"
    ):
        plan(model)
    shutil.copy(MODELS["demo-llava"] / "special_tokens_map.json", model)
    tokenizer_with(model, vocab={"zz": 9999})
    with pytest.raises(PlanError, match=r"tokens with the ids 9999 \('zz'\), but the model has only 256 tokens"):
        plan(model)


def test_an_image_token_without_embedding_is_allowed_if_no_prompt_contains_it(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MODELS["demo-blip2-itm"], tmp_path / "m"))
    content = json.loads((folder / "tokenizer.json").read_text())
    assert content["added_tokens"].pop()["content"] == "<image>"
    content["model"]["vocab"]["<old>"] = content["model"]["vocab"].pop("<image>")
    (folder / "tokenizer.json").write_text(json.dumps(content))
    plan(folder, "blip2-retrieval-w4")
    assert inspect(folder, rows=256).beyond == (("<image>", 256),)
    assert load_processor(folder).tokenizer.convert_tokens_to_ids("<image>") == 256


def test_a_tokenizer_that_cannot_pad_is_refused_by_the_plan(model: Path) -> None:
    change(model / "special_tokens_map.json", pad_token=...)
    change(model / "tokenizer_config.json", pad_token=...)
    with pytest.raises(CheckpointError, match="does not have a padding token"):
        plan(model)


def test_a_tokenizer_is_tried_on_padded_and_truncated_texts_of_both_sides() -> None:
    tokenizer = load_processor(MODELS["demo-llava"]).tokenizer
    given: list[dict[str, Any]] = []

    class Recording:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, texts: Any, **options: Any) -> Any:
            given.append(options)
            return tokenizer(texts, **options)

    assert try_out(Recording(), 512) == []
    padded = [options for options in given if options]
    assert [options["padding_side"] for options in padded] == ["left", "right"]
    assert all(options["padding"] and options["truncation"] for options in padded)


@pytest.mark.parametrize(("name", "recipe"), [("demo-llava", "llava-w4-vit8"), ("demo-blip2", "blip2-caption-w4")])
def test_padding_with_the_image_token_is_refused_by_the_plan(tmp_path: Path, name: str, recipe: str) -> None:
    folder = Path(shutil.copytree(MODELS[name], tmp_path / "m"))
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        change(folder / file, pad_token="<image>")
    with pytest.raises(PlanError, match=r"Mismatch in `image` token|padded prompt .* \(id 4\), expected 32"):
        plan(folder, recipe)


def test_padding_with_the_image_token_is_no_picture_where_prompts_have_none(tmp_path: Path) -> None:
    """Texts of different lengths are encoded; the padding is masked."""
    folder = Path(shutil.copytree(MODELS["demo-blip2-itm"], tmp_path / "m"))
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        change(folder / file, pad_token="<image>")
    plan(folder, "blip2-retrieval-w4")
    samples = [Sample(text, lambda: Image.new("RGB", (9, 9)), None, (text,)) for text in ("red", "a red square")]
    inputs = encode(load_processor(folder), FAMILIES["blip2-itm"], samples, ["red", "a red square"], "right")
    assert not bool(inputs["attention_mask"].all())


def test_a_pipe_in_place_of_a_file_is_not_read(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    os.mkfifo(model / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a regular file"):
        plan(model)


@pytest.mark.parametrize(
    ("removed", "named"),
    [
        (("*processor*", "tokenizer*"), ("preprocessor_config.json", "tokenizer.json")),
        (("*processor*",), ("preprocessor_config.json",)),
        (("tokenizer*",), ("tokenizer.json",)),
        (("preprocessor_config.json",), ("preprocessor_config.json",)),
    ],
)
def test_a_folder_that_lacks_files_of_a_processor_is_refused_by_the_plan(
    removed: tuple[str, ...], named: tuple[str, ...], model: Path
) -> None:
    """An export would need them only after it had read the data."""
    change(model / "processor_config.json", image_processor=...)
    for path in [path for pattern in removed for path in model.glob(pattern)]:
        path.unlink()
    for attempt in (plan, load_processor):
        with pytest.raises(CheckpointError, match="the folder has no processor: it lacks") as caught:
            attempt(model)
        assert str(model) in caught.value.message
        files = {"preprocessor_config.json", "tokenizer.json"}
        assert {name for name in files if f" {name} (" in caught.value.message} == set(named)
        assert "copy the missing files from the model's repository" in str(caught.value.hint)


@pytest.mark.parametrize("skip_evaluation", [False, True])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_only_an_export_that_encodes_no_samples_needs_no_processor(
    method: str, skip_evaluation: bool, model: Path, tmp_path: Path
) -> None:
    """Plan and export agree: without calibration and evaluation the weights alone are sufficient."""
    for path in [*model.glob("*processor*"), *model.glob("tokenizer*"), *model.glob("chat_template*")]:
        path.unlink()
    rule = {"component": "vision", "method": method, "bits": 8, "group_size": "row"}
    recipe = load_recipe("llava-w4").model_dump() | {"quantize": [rule], "gates": (), "model": {"repo": str(model)}}
    valid, cpu, out = Recipe.model_validate(recipe), choose("cpu"), tmp_path / "out"
    if method == "rtn" and skip_evaluation:
        warnings = prepare(valid, cpu, headers_only=True, skip_evaluation=True)[0].warnings
        assert any("the model folder has no processor" in warning for warning in warnings)
        export(valid, out=out, device=cpu, on_event=ignore, skip_evaluation=True)
        return
    with pytest.raises(CheckpointError, match="the folder has no processor"):
        prepare(valid, cpu, headers_only=True, skip_evaluation=skip_evaluation)
    with pytest.raises(CheckpointError, match="the folder has no processor"):
        export(valid, out=out, device=cpu, on_event=ignore, skip_evaluation=skip_evaluation)
    assert not out.exists()


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json", "tokenizer_config.json"])
def test_a_file_that_is_not_json_is_named(name: str, model: Path) -> None:
    (model / name).write_text("{{")
    with pytest.raises(CheckpointError, match=rf"{name}: its processor cannot be loaded"):
        plan(model)


def evil(folder: Path) -> None:
    """The processor's files name code of the folder, which would write a file."""
    (folder / "evil.py").write_text(f"open({str(folder / 'PWNED')!r}, 'w')\nclass Evil: pass\n")
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        change(folder / name, processor_class="EvilProcessor", auto_map={"AutoProcessor": "evil.Evil"})


def test_code_of_a_model_folder_never_runs_and_no_question_is_asked(model: Path) -> None:
    evil(model)
    command = ["plan", "--recipe", "llava-w4-vit8", "--model", str(model)]
    done = CliRunner().invoke(cli, command, input="y\n" * 9)
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert f"Error: {model}: its processor cannot be loaded" in done.stderr
    assert "[y/N]" not in done.output
    assert not (model / "PWNED").exists()


def test_attention_code_of_the_hub_is_refused(model: Path) -> None:
    change(model / "config.json", _attn_implementation="somebody/kernel")
    with pytest.raises(PlanError, match="_attn_implementation: expected eager or sdpa"):
        plan(model)


def test_the_helper_is_restarted_after_it_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that replies its process takes the place of Python, which would import transformers twice."""
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\nwhile read request; do echo "{\\"process\\": $$}"; done\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    helper = inspector.Helper(())
    first = helper.ask({})["process"]
    assert helper.ask({})["process"] == first == helper._process.pid
    os.kill(first, signal.SIGKILL)
    helper._process.wait()
    assert helper.ask({})["process"] == helper._process.pid != first
    helper.close()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-signal.SIGXCPU, "the libraries exceeded the time limit"),
        (-signal.SIGVTALRM, "the libraries exceeded the time limit"),
        (-signal.SIGKILL, "signal 9 ended the libraries (possibly out of memory)"),
        (-signal.SIGABRT, "signal 6 ended the libraries"),
        (0, "the helper process ended with code 0"),
        (1, "the helper process ended with code 1"),
    ],
)
def test_the_end_of_a_helper_is_described(code: int, words: str) -> None:
    process: Any = SimpleNamespace(wait=lambda: code)
    assert inspector._end(process) == words


def test_a_closed_helper_leaves_no_process_and_no_open_pipe() -> None:
    helper = inspector.Helper(inspector.HIDDEN)
    process = helper._process
    helper.close()
    assert process.returncode == -signal.SIGKILL
    assert process.stdin is not None
    assert process.stdout is not None
    assert (process.stdin.closed, process.stdout.closed) == (True, True)


def test_one_helper_answers_all_threads() -> None:
    inspector.start_helper()
    first = inspector.helper()
    inspect(MODELS["demo-llava"], fields=["image_token"])
    assert inspector.helper(inspector.HIDDEN) is first
    assert list(inspector._helpers).count(inspector.HIDDEN) == 1


def test_a_changed_folder_is_inspected_again(model: Path) -> None:
    assert inspect(model, fields=["patch_size"]).fields == {"patch_size": 8}
    change(model / "processor_config.json", patch_size=16)
    assert inspect(model, fields=["patch_size"]).fields == {"patch_size": 16}


def test_a_config_that_transformers_rejects_is_a_checkpoint_error() -> None:
    import torch

    config = header_config("llava-hf--llava-1.5-7b-hf")
    config["text_config"]["rope_parameters"] = "evil"
    with pytest.raises(CheckpointError, match="transformers cannot build a model"):
        build_skeleton(FAMILIES["llava"], config, torch.device("meta"))


def test_an_answer_beyond_the_model_s_positions_is_refused_by_the_plan(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    positions = config["text_config"]["max_position_embeddings"]
    recipe = load_recipe("llava-w4-vit8").adjusted(model={"repo": str(model)})
    longer = recipe.model_copy(update={"max_new_tokens": {"vqa": positions}})
    expected = rf"a prompt has \d+ tokens and the longest answer {positions} .*, but the model has only {positions}"
    with pytest.raises(PlanError, match=expected):
        prepare(longer, choose("cpu"), headers_only=True)
