"""The demo model and its data: disjoint splits, captions and tokens that agree, a folder that transformers loads."""

import hashlib
import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from exporter.data.demo import easy_vqa
from exporter.data.demo.language import QUESTIONS, caption, captions, question, vocabulary
from exporter.data.demo.samples import SIZES, drawings, picture, samples
from exporter.data.demo.scenes import COLORS, DOTS, NOISE, SHAPES, SIDE, TINT, draw, lexicon, scene_objects, scenes
from exporter.data.demo.scenes import SIZES as RADII
from exporter.errors import DataError
from exporter.model.embedded import MODELS
from exporter.model.families.llava import FAMILY
from tests.demo_figures import figures
from tools.demo_training.folder import BOS, EOS, IMAGE, VOCABULARY, config, tokenizer
from tools.demo_training.packing import PREFIX, logits, mask_and_positions, normalize, pack, slot_lengths, user_ids
from tools.demo_training.score import by_kind, grade, scene_exam, summary

FOLDER = MODELS["demo-llava"]
CPU = torch.device("cpu")


@cache
def model() -> Any:
    """The shipped model in float32."""
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()


@cache
def processor() -> Any:
    """The shipped processor."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(FOLDER)


def prompt(text: str) -> str:
    """The prompt of one picture and one text, by the shipped chat template."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return processor().apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


# Scenes and splits


@pytest.mark.parametrize(("split", "allowed"), [("test", {0}), ("validation", {1}), ("train", {2, 3, 4, 5, 6, 7})])
def test_a_split_keeps_to_its_residues(split: Any, allowed: set[int]) -> None:
    batch = scenes(split, torch.arange(5000))
    words = {
        (sum(CELL_INDEX[t.cell] + 5 * SHAPES.index(t.shape) + 7 * DOTS.index(t.dot) for t in row)
         + sum(list(COLORS).index(t.color) + 3 * list(RADII).index(t.size) for t in row)) % 8
        for row in scene_objects(batch)
    }  # fmt: skip
    assert words == allowed  # the same sum, taken from the words


CELL_INDEX = {cell: i for i, cell in enumerate(("top left", "top", "top right", "left", "center", "right"))} | {
    "bottom left": 6,
    "bottom": 7,
    "bottom right": 8,
}


def hashes(split: Any, count: int) -> list[str]:
    """Digest of the pixels of the first scenes of a split."""
    pixels = [draw(scenes(split, torch.arange(start, start + 250))) for start in range(0, count, 250)]
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in torch.cat(pixels)]


def test_no_picture_is_in_two_splits() -> None:
    digests = [digest for split in ("train", "validation", "test") for digest in hashes(split, 1000)]
    assert len(set(digests)) == 3000


def test_a_scene_depends_on_nothing_but_its_number() -> None:
    together = draw(scenes("test", torch.arange(8)))
    alone = draw(scenes("test", torch.tensor([5])))
    assert torch.equal(together[5], alone[0])
    assert torch.equal(torch.from_numpy(np.array(picture("test", 5))).permute(2, 0, 1), alone[0])
    picture("test", 5).paste((0, 0, 0), (0, 0, 64, 64))  # a copy: the next one is whole
    assert torch.equal(torch.from_numpy(np.array(picture("test", 5))).permute(2, 0, 1), alone[0])


def test_scenes_never_change() -> None:
    objects = scene_objects(scenes("test", torch.tensor([0])))[0]
    assert caption(objects) == GOLDEN_CAPTION
    assert hashes("test", 1)[0][:16] == GOLDEN_PIXELS
    for split, golden in GOLDEN_SPLITS.items():
        assert hashlib.sha256("".join(hashes(split, 250)).encode()).hexdigest()[:16] == golden


GOLDEN_CAPTION = "a kabo pleld at the top and a feki steld at the bottom."
GOLDEN_PIXELS = "b7eb7150af9e5f7f"
GOLDEN_SPLITS = {  # all pixels of the first 250 scenes
    "test": "cc7ce1a5a038600c",
    "validation": "72a44cca7c1f3ce6",
    "train": "084892b0c416f6f3",
}


def test_samples_are_those_of_seed_0_unless_another_is_given() -> None:
    for draws in (samples, drawings):
        default, first, second = draws("captioning", "test", 3), *(draws("captioning", "test", 3, i) for i in (0, 1))
        assert [sample.identity for sample in default] == [sample.identity for sample in first]
        assert [sample.identity for sample in first] != [sample.identity for sample in second]


def test_every_kind_of_object_has_its_own_name() -> None:
    assert len(lexicon()) == len(COLORS) * len(RADII) * len(SHAPES) * len(DOTS) == len(set(lexicon().values()))


def test_colors_are_drawn_where_the_words_say() -> None:
    """The cell of every large object holds pixels of its color and of its dot, and another cell does not."""
    batch = scenes("test", torch.arange(200))
    checked = 0
    for image, row, objects in zip(draw(batch).int(), batch.cell, scene_objects(batch), strict=True):
        for cell, item in zip(row.tolist(), objects, strict=False):
            if item.size == "large":
                area = cell_of(image, cell)
                assert near(area, item.color) >= 25
                assert near(area, item.dot) >= 12
                empty = cell_of(image, next(c for c in range(9) if c not in row.tolist()))
                assert near(empty, item.color) == near(empty, item.dot) == 0
                checked += 1
    assert checked > 100


def cell_of(image: torch.Tensor, cell: int) -> torch.Tensor:
    """The pixels of one of the nine cells."""
    left, top = round(cell % 3 * 64 / 3), round(cell // 3 * 64 / 3)
    return image[:, top : top + 21, left : left + 21]


def near(area: torch.Tensor, color: str) -> int:
    """How many pixels are that color, within what tint and noise may change."""
    return int(((area - torch.tensor(COLORS[color]).view(3, 1, 1)).abs().amax(0) <= TINT + NOISE).sum())


# Language


def test_questions_have_one_answer() -> None:
    batch = scene_objects(scenes("test", torch.arange(400)))
    counts = dict.fromkeys(QUESTIONS, 0)
    for i, objects in enumerate(batch):
        for kind in QUESTIONS:
            item = question(kind, objects, i)
            if item is None:
                continue
            counts[kind] += 1
            assert item == question(kind, objects, i)
            words = item.text.removesuffix("?").split()
            named = [t for t in objects if _matches(t, item.text)]
            if kind == "exists":
                is_present = any(t.color in words and t.shape in words for t in objects)
                assert item.answer == ("yes" if is_present else "no")
            elif kind == "count":
                assert item.answer == ("one", "two", "three", "four")[len(objects) - 1]
            else:
                field = {"place": "cell", "find": "cell"}.get(kind, kind)
                assert [getattr(t, field) for t in named] == [item.answer]
    assert min(counts.values()) > 200


def _matches(item: Any, text: str) -> bool:
    """Whether everything that a question says of its object is true of `thing` (a naive reader)."""
    text = text.removesuffix("?").removesuffix(" called")
    if " at the " in text:
        return text.split(" at the ")[1] == item.cell
    if " ".join(text.split()[-2:]) in lexicon().values():
        return text.endswith(f"the {item.name}")
    words = set(text.split(" the ")[-1].split())
    own = {item.color, item.size, item.shape}
    return (words & (set(COLORS) | set(RADII) | set(SHAPES))) <= own


def test_questions_exist_yes_and_no_alike() -> None:
    batch = scene_objects(scenes("test", torch.arange(1000)))
    answers = [q.answer for i, objects in enumerate(batch) if (q := question("exists", objects, i))]
    assert 0.4 < answers.count("yes") / len(answers) < 0.6


def test_captions_say_the_same_in_other_words() -> None:
    objects = scene_objects(scenes("test", torch.tensor([1])))[0]
    texts = captions(objects)
    assert texts[0] == caption(objects)
    assert len(set(texts)) == 4
    assert all(item.name in text and item.cell in text for text in texts for item in objects)


# Tokens


def test_the_shipped_tokenizer_is_the_one_the_code_makes() -> None:
    assert json.loads((FOLDER / "tokenizer.json").read_text()) == json.loads(tokenizer().to_str())


def test_words_come_back_from_their_tokens() -> None:
    coder = processor().tokenizer
    for objects in scene_objects(scenes("test", torch.arange(50))):
        for text in (*captions(objects), *(q.text for k in QUESTIONS if (q := question(k, objects, 3)))):
            ids = coder(text, add_special_tokens=False).input_ids
            assert coder.unk_token_id not in ids
            assert coder.decode(ids, skip_special_tokens=True) == text


def test_every_embedded_question_has_only_known_words() -> None:
    coder = processor().tokenizer
    texts = [text for _, pairs in easy_vqa.test_questions() for pair in pairs for text in pair]
    texts += [FAMILY.caption_prompt, FAMILY.question_prompt.format(question="")]
    assert len(texts) > 3000
    assert all(coder.unk_token_id not in ids for ids in coder(texts).input_ids)


@pytest.mark.parametrize("text", ["", "Über 漢字 🙂", "\x00\n\t", "a" * 3000, "<s></s>", "What COLOR is the Shape?"])
def test_any_text_encodes(text: str) -> None:
    ids = processor().tokenizer(text).input_ids
    assert ids[0] == BOS
    assert max(ids) < VOCABULARY


def test_the_template_is_the_conversation_of_llava() -> None:
    talk = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    assert processor().apply_chat_template(talk) == "USER: <image>\nwhat is it? ASSISTANT: red</s>"
    assert prompt("what is it?") == "USER: <image>\nwhat is it? ASSISTANT:"


def test_the_vocabulary_leaves_room() -> None:
    assert tokenizer().get_vocab_size() <= VOCABULARY
    assert len(set(vocabulary())) == len(vocabulary())


# The folder


def shapes() -> dict[str, tuple[str, list[int]]]:
    """dtype and shape of every shipped tensor."""
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}


def test_the_weights_are_small_and_bfloat16() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 3_000_000
    assert {dtype for dtype, _ in shapes().values()} == {"BF16"}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 3_100_000


def test_names_are_the_hubs() -> None:
    """The same patterns as `llava-hf/llava-1.5-7b-hf`, block numbers aside."""
    from tests.conftest import header

    hub = {squash(name) for name in header("llava-hf--llava-1.5-7b-hf")}
    assert {squash(name) for name in shapes()} == hub


def squash(name: str) -> str:
    """A tensor name without its numbers of blocks."""
    return ".".join("{i}" if part.isdigit() else part for part in name.split("."))


def test_features_are_multiples_of_128() -> None:
    settings = json.loads((FOLDER / "config.json").read_text())
    parts = [FAMILY.component(name) for name in ("vision", "projector", "language")]
    names = [f"{c.block(i)}.{linear}.weight" for c in parts for i in range(c.used(settings)) for linear in c.linears]
    names += ["language_model.lm_head.weight", "language_model.model.embed_tokens.weight"]
    stored = shapes()
    assert len(names) == len(set(names)) > 20
    assert all(side % 128 == 0 for name in names for side in stored[name][1])


def test_the_config_is_the_one_the_code_makes() -> None:
    settings = json.loads((FOLDER / "config.json").read_text())
    options = json.loads((FOLDER / "training.json").read_text())["options"]
    assert settings == config(options["vision_blocks"], options["text_blocks"], options["heads"])
    assert settings["vision_feature_layer"] == -1
    assert settings["image_token_index"] == IMAGE


def test_transformers_finds_every_tensor() -> None:
    from transformers import LlavaForConditionalGeneration

    _, report = LlavaForConditionalGeneration.from_pretrained(FOLDER, output_loading_info=True)
    assert not any(report.values())


# Answers


def test_packed_slots_are_the_sequences_a_user_sends() -> None:
    """Logits of a packed row against transformers' own forward pass, one conversation at a time."""
    batch = scenes("test", torch.tensor([3]))
    objects = scene_objects(batch)[0]
    color = question("color", objects, 1)
    assert color is not None
    entries = [(None, caption(objects)), (color.text, color.answer)]
    lengths = slot_lengths(1, 1)
    rows, (sees, positions) = pack([entries], lengths), mask_and_positions(lengths, CPU)
    pixels = draw(batch)
    with torch.no_grad():
        packed = logits(model(), normalize(pixels), rows.tokens.long(), sees, positions, user_ids())[0]
    for (text, answer), start in zip(entries, (0, lengths[0]), strict=True):
        text_prompt = prompt(FAMILY.caption_prompt if text is None else FAMILY.question_prompt.format(question=text))
        inputs = processor()(images=picture("test", 3), text=f"{text_prompt} {answer}</s>", return_tensors="pt")
        assert inputs.input_ids[0, -1] == EOS
        with torch.no_grad():
            alone = model()(**inputs).logits[0, PREFIX:]
        torch.testing.assert_close(packed[start : start + len(alone)], alone, rtol=1e-3, atol=1e-3)


def test_grading_agrees_with_generating() -> None:
    exam = scene_exam("test", 0, 12, CPU)
    right, _ = grade(model(), exam)
    caption_prompt = FAMILY.caption_prompt
    images = [picture("test", i) for i in range(12)]
    inputs = processor()(images=images, text=[prompt(caption_prompt)] * 12, return_tensors="pt", padding=True)
    generated = model().generate(**inputs, max_new_tokens=64)[:, inputs.input_ids.shape[1] :]
    answers = processor().batch_decode(generated, skip_special_tokens=True)
    expected = [caption(objects) for objects in scene_objects(scenes("test", torch.arange(12)))]
    assert [a == w for a, w in zip(answers, expected, strict=True)] == right[:, 0].tolist()


def test_it_answers_far_above_chance() -> None:
    recorded = figures("demo-llava")["answers"]
    assert recorded["captions"] > 0.9
    assert recorded["worst kind"] > 0.9
    assert recorded["easy-vqa"] > 0.98


def test_a_small_exam_scores_as_the_recorded_one() -> None:
    kinds = by_kind(model(), [scene_exam("test", 150, 12, CPU)])
    assert kinds["caption"] > 0.8
    assert summary(kinds)["scenes"] > 0.9


# Samples


@pytest.mark.parametrize("task", ["vqa", "captioning"])
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_samples(task: Any, split: Any) -> None:
    selected = samples(task, split, 40, seed=1)
    assert len(selected) == len({sample.identity for sample in selected}) == 40
    assert [s.identity for s in selected] == [s.identity for s in samples(task, split, 40, seed=1)]
    assert [s.identity for s in selected] != [s.identity for s in samples(task, split, 40, seed=2)]
    assert all(split in sample.identity for sample in selected)
    assert {sample.image().size for sample in selected} == {(SIDE, SIDE)}
    assert all((sample.question is None) == (task == "captioning") for sample in selected)
    assert all(len(sample.references) == (4 if task == "captioning" else 1) for sample in selected)


def test_the_test_questions_mix_both_sources() -> None:
    kinds = [sample.kind for sample in samples("vqa", "test", 300)]
    assert sum(kind.startswith("easy-vqa") for kind in kinds) == 100
    assert {kind for kind in kinds if not kind.startswith("easy-vqa")} == set(QUESTIONS)
    assert len({kind for kind in kinds if kind.startswith("easy-vqa")}) == 3


def test_sample_answers_belong_to_their_pictures() -> None:
    """The question of a sample, asked again of the scene its identity names."""
    for sample in samples("vqa", "validation", 30, seed=3):
        _, split, number, kind = sample.identity.split("/")
        objects = scene_objects(scenes(split, torch.tensor([int(number)])))[0]
        repeated = question(kind, objects, int(number))
        assert repeated is not None
        assert (sample.question, sample.references) == (repeated.text, (repeated.answer,))


@pytest.mark.parametrize(
    "bad", [("ocr", "test", 1), ("vqa", "dev", 1), ("vqa", "train", 0), ("captioning", "test", SIZES["test"] + 1)]
)
def test_impossible_requests_are_refused(bad: Any) -> None:
    with pytest.raises(DataError):
        samples(*bad)


def test_embedded_pictures_are_easy_vqas_own() -> None:
    package = pytest.importorskip("easy_vqa")
    from PIL import Image

    questions, answers, images = package.get_test_questions()
    paths = package.get_test_image_paths()
    triples = list(zip(questions, answers, images, strict=True))
    for sheet, (number, pairs) in list(enumerate(easy_vqa.test_questions()))[::40]:
        assert pairs == [(q, a) for q, a, i in triples if i == number]
        with Image.open(paths[number]) as original:
            assert np.array_equal(np.asarray(original.convert("RGB")), np.asarray(easy_vqa.test_picture(sheet)))


def test_the_live_names_exist() -> None:
    live = dict(model().named_parameters())
    assert {FAMILY.live_name(name) for name in shapes()} == set(live)


def test_drawings_are_the_same_scenes_in_plain_words() -> None:
    named = samples("captioning", "train", 40)
    plain = drawings("captioning", "train", 40)
    assert [s.identity for s in plain] == [s.identity for s in named]
    names = {item.name for objects in scene_objects(scenes("train", torch.arange(40))) for item in objects}
    for sample in plain:
        assert len(sample.references) == 3
        assert not any(name in text for name in names for text in sample.references)
        assert all(any(f" {color} " in text for color in COLORS) for text in sample.references)
    questions = drawings("vqa", "test", 300)
    assert {"find", "name"}.isdisjoint({s.kind for s in questions})
    assert {"color", "shape", "easy-vqa shape"} <= {s.kind for s in questions}
