"""The trained BLIP-2 demo models: folders that transformers loads, tokens, and bounds on the scores."""

import json
from functools import cache
from typing import Any

import pytest
import torch
from safetensors import safe_open

from exporter.data.demo.language import caption, captions, plain_captions, question
from exporter.data.demo.samples import picture
from exporter.data.demo.scenes import draw, scene_objects, scenes
from exporter.data.tasks.retrieval import prepare
from exporter.model.embedded import MODELS
from exporter.model.families import FAMILIES
from tests.demo_figures import figures, search
from tests.headers.read import header
from tools.demo_training.blip2_folder import MORE_WORDS, QUERIES, config
from tools.demo_training.blip2_packing import BLIP2, QUESTION_PROMPT
from tools.demo_training.folder import BOS, EOS, IMAGE, PAD, tokenizer
from tools.demo_training.packing import mask_and_positions, normalize, pack, slot_lengths
from tools.demo_training.score import by_kind, grade, scene_exam, summary
from tools.demo_training.texts import LENGTH, NAMED, STYLES, hard_negatives, lexicon_tokens, texts

CPU = torch.device("cpu")
HUBS = {"demo-blip2": "Salesforce--blip2-opt-2.7b", "demo-blip2-itm": "Salesforce--blip2-itm-vit-g-coco"}
KINDS: dict[str, Any] = {"demo-blip2": "captioning", "demo-blip2-itm": "retrieval"}
FAMILY_OF = {"demo-blip2": FAMILIES["blip2"], "demo-blip2-itm": FAMILIES["blip2-itm"]}
either = pytest.mark.parametrize("name", [name for name in HUBS if name in MODELS])


@cache
def model(name: str) -> Any:
    """A shipped model in float32."""
    import transformers

    settings = json.loads((MODELS[name] / "config.json").read_text())
    result = getattr(transformers, settings["architectures"][0]).from_pretrained(MODELS[name], dtype=torch.float32)
    return result.eval()


@cache
def processor(name: str) -> Any:
    """Its processor."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(MODELS[name])


def shapes(name: str) -> dict[str, tuple[str, list[int]]]:
    """dtype and shape of every shipped tensor."""
    with safe_open(MODELS[name] / "model.safetensors", framework="pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {key: (part.get_dtype(), part.get_shape()) for key, part in slices.items()}


# The folders


@either
def test_the_weights_are_small_and_bfloat16(name: str) -> None:
    assert (MODELS[name] / "model.safetensors").stat().st_size <= 3_000_000
    assert {dtype for dtype, _ in shapes(name).values()} == {"BF16"}


@either
def test_names_are_the_hubs(name: str) -> None:
    def squash(key: str) -> str:
        return ".".join("{i}" if part.isdigit() else part for part in key.split("."))

    assert {squash(key) for key in shapes(name)} == {squash(key) for key in header(HUBS[name])}


@either
def test_the_config_is_the_one_the_code_makes(name: str) -> None:
    assert json.loads((MODELS[name] / "config.json").read_text()) == config(KINDS[name])


@either
def test_the_tokenizer_is_the_one_the_code_makes(name: str) -> None:
    assert json.loads((MODELS[name] / "tokenizer.json").read_text()) == json.loads(tokenizer(MORE_WORDS).to_str())


@either
def test_features_are_multiples_of_128(name: str) -> None:
    settings, stored = json.loads((MODELS[name] / "config.json").read_text()), shapes(name)
    components = FAMILY_OF[name].components
    names = [f"{c.block(i)}.{x}.weight" for c in components for i in range(c.used(settings)) for x in c.linears]
    stored_names = [key.replace("language_projection.language_projection", "language_projection") for key in names]
    sides = [side for key in stored_names if key in stored for side in stored[key][1]]
    assert len(sides) > 60
    assert all(side % 128 == 0 for side in sides)


@either
def test_blocks_differ_as_in_the_hubs_models(name: str) -> None:
    """Cross-attention in every second block."""
    crossing = {int(key.split(".")[3]) for key in shapes(name) if "crossattention" in key}
    assert crossing == {0, 2}


@either
def test_transformers_finds_every_tensor(name: str) -> None:
    import transformers

    kind = type(model(name)).__name__
    _, report = getattr(transformers, kind).from_pretrained(MODELS[name], output_loading_info=True)
    assert not any(report.values())


# Answers


def test_prompts_are_the_familys() -> None:
    assert FAMILIES["blip2"].question_prompt == QUESTION_PROMPT
    assert FAMILIES["blip2"].caption_prompt == BLIP2.caption == ""


def test_every_token_of_a_prompt_is_known() -> None:
    coder = processor("demo-blip2").tokenizer
    ids = coder(QUESTION_PROMPT.format(question="what color is the dot on the large red bar?")).input_ids
    assert coder.unk_token_id not in ids
    assert ids[0] == BOS


def test_packed_slots_are_the_sequences_a_user_sends() -> None:
    """Logits of a packed row against transformers' own forward pass, one conversation at a time."""
    batch = scenes("test", torch.tensor([3]))
    objects = scene_objects(batch)[0]
    color = question("color", objects, 1)
    assert color is not None
    entries = [(None, caption(objects)), (color.text, color.answer)]
    lengths = slot_lengths(1, 1, BLIP2)
    rows, (sees, positions) = pack([entries], lengths, BLIP2), mask_and_positions(lengths, CPU, BLIP2.prefix)
    network, preprocess = model("demo-blip2"), processor("demo-blip2")
    with torch.no_grad():
        packed = BLIP2.forward(CPU)(network, normalize(draw(batch)), rows.tokens.long(), sees, positions)[0]
    for (text, answer), start in zip(entries, (0, lengths[0]), strict=True):
        text_prompt = FAMILIES["blip2"].text(text)
        inputs = preprocess(images=picture("test", 3), text=f"{text_prompt} {answer}</s>", return_tensors="pt")
        assert inputs.input_ids[0, :QUERIES].tolist() == [IMAGE] * QUERIES
        assert inputs.input_ids[0, -1] == EOS
        with torch.no_grad():
            alone = network(**inputs).logits[0, QUERIES:]
        torch.testing.assert_close(packed[start : start + len(alone)], alone, rtol=1e-3, atol=1e-3)


def test_grading_agrees_with_generating() -> None:
    exam = scene_exam("test", 0, 12, CPU, BLIP2)
    right, _ = grade(model("demo-blip2"), exam)
    images = [picture("test", i) for i in range(12)]
    inputs = processor("demo-blip2")(images=images, text=[""] * 12, return_tensors="pt", padding=True)
    generated = model("demo-blip2").generate(**inputs, max_new_tokens=40)[:, inputs.input_ids.shape[1] :]
    answers = processor("demo-blip2").batch_decode(generated, skip_special_tokens=True)
    expected = [caption(objects) for objects in scene_objects(scenes("test", torch.arange(12)))]
    assert [a.strip() == w for a, w in zip(answers, expected, strict=True)] == right[:, 0].tolist()


def test_it_answers_far_above_chance() -> None:
    recorded = figures("demo-blip2")["answers"]
    assert recorded["captions"] > 0.9
    assert recorded["worst kind"] > 0.85
    assert recorded["easy-vqa"] > 0.95


def test_without_the_picture_scores_are_near_zero() -> None:
    kinds = figures("demo-blip2")["blind"]
    assert kinds["caption"] < 0.05
    assert max(kinds[kind] for kind in ("color", "shape", "name")) < 0.4


@pytest.mark.parametrize(("words", "first", "near"), [("named", 0.6, 0.55), ("plain", 0.93, 0.8)])
def test_each_head_finds_far_above_chance(words: str, first: float, near: float) -> None:
    """Chance is 0.005 for recall at 1 of 200, and a half for the matching head's verdict on a pair."""
    recorded = figures("demo-blip2-itm")[words]
    assert min(value for key, value in recorded.items() if key.startswith(("contrast", "matching"))) > first
    assert min(recorded["fits"], recorded["prefers"]) > 0.75
    assert recorded["near misses"] > near


def test_it_finds_nothing_on_blank_pictures() -> None:
    recorded = figures("demo-blip2-itm")["blank"]
    assert max(value for key, value in recorded.items() if key.startswith(("contrast", "matching"))) <= 0.05


def test_small_exams_score_as_the_recorded_ones() -> None:
    kinds = by_kind(model("demo-blip2"), [scene_exam("test", 150, 12, CPU, BLIP2)])
    assert kinds["caption"] > 0.8
    assert summary(kinds)["scenes"] > 0.9
    shown, blank = (search(model("demo-blip2-itm"), 24, plain=True, blank=blank) for blank in (False, True))
    for head in ("contrast text", "contrast image", "matching text", "matching image"):
        assert shown[head] > 0.9
        assert blank[head] <= 0.1


# Tokenized captions


@pytest.mark.parametrize("style", range(STYLES))
def test_texts_equal_the_tokenized_captions(style: int) -> None:
    batch, coder = scenes("test", torch.arange(120)), tokenizer()
    tokenized = texts(batch, torch.full((120,), style), lexicon_tokens(CPU))
    at = coder.token_to_id("\u2581at")
    for row, positions, properties, objects in zip(
        tokenized.tokens, tokenized.at_positions, tokenized.objects, scene_objects(batch), strict=True
    ):
        plain = plain_captions(objects)
        caption_text = (*captions(objects), plain[0], plain[1], f"an image with {plain[0]}", plain[2])[style]
        ids = coder.encode(prepare(caption_text)).ids
        assert row.tolist() == ids + [PAD] * (LENGTH - len(ids))
        assert all(
            row[position] == at for position, values in zip(positions, properties, strict=True) if values[0] >= 0
        )


def test_hard_negatives_differ_and_are_valid_scenes() -> None:
    batch = scenes("train", torch.arange(2000))
    style = torch.arange(2000) % STYLES
    wrong, lex = hard_negatives(batch, style, torch.Generator().manual_seed(0)), lexicon_tokens(CPU)
    same = (texts(batch, style, lex).tokens == texts(wrong, style, lex).tokens).all(dim=1)
    assert float(same.float().mean()) < 0.005  # two that look alike may have changed places
    present = wrong.cell >= 0
    assert torch.equal(present.sum(1), (batch.cell >= 0).sum(1))
    order = torch.where(present, wrong.cell, 9)
    assert bool((order.diff(dim=1) >= 0).all())
    assert not bool(((order.diff(dim=1) == 0) & present[:, 1:]).any())  # no two in one place
    moved = (wrong.cell != batch.cell).any(1)
    assert 0.15 < float(moved.float().mean()) < 0.35
    assert style[moved].unique().numel() == STYLES
    differing = [len(set(a) ^ set(b)) for a, b in zip(scene_objects(batch), scene_objects(wrong), strict=True)]
    assert set(differing) <= {0, 2, 4}
    assert NAMED * 2 == STYLES
