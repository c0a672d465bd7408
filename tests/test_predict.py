"""Prompts, batches and answers of a tiny LLaVA with random weights: batching must not change an answer."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from PIL import Image

from exporter.data.tasks.sample import Sample
from exporter.events import Event
from exporter.model.families import FAMILIES
from exporter.model.inference.encoding import render
from exporter.model.inference.predict import Predictor, batches
from exporter.model.processors.chat_template import PROBES, conversation, parse_template
from exporter.model.processors.processor import Processor
from tests.oracles import naive_log_likelihood

FAMILY = replace(
    FAMILIES["llava"],
    question_prompt="{question} short",
    caption_prompt="what is it",
    max_new_tokens={"vqa": 4, "captioning": 9},
)
WORDS = [*(f"w{i}" for i in range(80)), "what", "is", "it", "short", "USER:", "ASSISTANT:", "{", "}"]
TEMPLATE = (
    "{% for m in messages %}USER:{% for c in m['content'] %} "
    "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %} ASSISTANT:"
)
SIDE, PATCH = 32, 8


def processor(template: str | None = TEMPLATE) -> Any:
    """A word-level tokenizer and CLIP's picture processor for 32 px, 16 image tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", "<pad>", "<image>", *WORDS]
    tokenizer_model = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer_model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer_model.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_model,
        extra_special_tokens={"image_token": "<image>"},
        padding_side="right",
        **special,
    )
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    settings = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    result = LlavaProcessor(images, tokenizer, chat_template=template, image_token="<image>", **settings)
    if template is None:
        return Processor(result, None)
    rendered = [result.apply_chat_template(conversation(text), add_generation_prompt=True) for text in PROBES]
    return Processor(result, parse_template(rendered, "test"))


@pytest.fixture(scope="module")
def model() -> Any:
    """Hidden 64, two blocks each, weights large enough that words differ."""
    text = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 96, "max_position_embeddings": 128}
    vision = {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": SIDE, "patch_size": PATCH, "projection_dim": 64}
    config = {"text_config": text, "vision_config": vision, "image_token_index": 4, "vision_feature_layer": -1}
    torch.manual_seed(0)
    result = FAMILY.skeleton(config | {"tie_word_embeddings": False}).eval()
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.25)
    return result


def sample(i: int, question: str | None, *references: str) -> Sample:
    pixels = torch.randint(0, 256, (SIDE, SIDE, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
    return Sample(f"s{i}", partial(Image.fromarray, pixels.numpy()), question, references)


@pytest.fixture(scope="module")
def mixed() -> list[Sample]:
    """Both tasks, texts of very different lengths."""
    questions = ["w1", "w2 w3 w4 w5 w6 w7 w8 w9", None, "w10 w11", None, "w3 w1 w5 w12", "w20 " * 15 + "w7"]
    replies = ["w1", "w2 w3", "w4 w5 w6 w7", "w8", "w9", "w10 w11 w12", "w13 w14"]
    return [sample(i, q, r) for i, (q, r) in enumerate(zip(questions, replies, strict=True))]


def predictor(model: Any, batch_size: int, own_processor: Any = None) -> Predictor:
    return Predictor(model, own_processor or processor(), FAMILY, torch.device("cpu"), batch_size)


def test_a_batch_answers_what_each_sample_answers_alone(model: Any, mixed: list[Sample]) -> None:
    alone = [predictor(model, 1).answer([one_sample])[0] for one_sample in mixed]
    assert len(set(alone)) >= 5  # the model looks at what it is given
    assert predictor(model, 3).answer(mixed) == alone
    assert predictor(model, 64).answer(mixed) == alone
    lengths = [len(text.split()) for text in alone]
    limits = [FAMILY.max_new_tokens["vqa" if one_sample.question else "captioning"] for one_sample in mixed]
    assert all(length <= limit for length, limit in zip(lengths, limits, strict=True))
    assert max(lengths) > FAMILY.max_new_tokens["vqa"]


def test_answers_are_the_likeliest_words_one_by_one(model: Any, mixed: list[Sample]) -> None:
    """Greedy by hand, the whole text run again for every word."""
    own_processor = processor()
    one_sample = mixed[1]
    inputs = dict(
        own_processor(
            images=[one_sample.image()], text=[render(own_processor, FAMILY, one_sample, None)], return_tensors="pt"
        )
    )
    tokens, new = inputs["input_ids"], []
    while len(new) < FAMILY.max_new_tokens["vqa"] and 2 not in new:
        with torch.no_grad():
            best = model(input_ids=tokens, pixel_values=inputs["pixel_values"]).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, best], dim=1)
        new.append(int(best))
    assert predictor(model, 2, own_processor).answer([one_sample]) == [
        own_processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 9.0, "top_k": 5, "num_beams": 1},
        {"repetition_penalty": 9.0},
        {"suppress_tokens": list(range(5, 50))},
        {"no_repeat_ngram_size": 1},
        {"bos_token_id": [None]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_generation_settings_of_the_checkpoint_do_not_matter(
    model: Any, mixed: list[Sample], settings: dict[str, Any]
) -> None:
    before = predictor(model, 3).answer(mixed)
    original = model.generation_config
    try:
        model.generation_config = type(original)(**settings)
        assert predictor(model, 3).answer(mixed) == before
    finally:
        model.generation_config = original


def test_events_count_samples(model: Any, mixed: list[Sample]) -> None:
    events: list[Event] = []
    predictor(model, 2).answer(mixed, events.append)
    assert [(e.stage, e.done, e.total, e.message) for e in events] == [
        ("evaluate", 2, 7, "captioning"),
        ("evaluate", 4, 7, "vqa"),
        ("evaluate", 6, 7, "vqa"),
        ("evaluate", 7, 7, "vqa"),
    ]


def test_log_likelihood_is_that_of_the_naive_loop(model: Any, mixed: list[Sample]) -> None:
    own_processor = processor()
    expected = []
    for one_sample in mixed:
        text = render(own_processor, FAMILY, one_sample, one_sample.references[0])
        inputs = dict(own_processor(images=[one_sample.image()], text=[text], return_tensors="pt"))
        reply = len(one_sample.references[0].split()) + 1  # and the end token
        expected.append(naive_log_likelihood(model, inputs, inputs["input_ids"].shape[1] - reply))
    for batch_size in (1, 3):
        assert predictor(model, batch_size, own_processor).log_likelihood(mixed) == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.1


def test_running_out_of_memory_is_not_reported_as_a_bad_sample(
    mixed: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    own_processor = processor()

    def full(self: Any, **inputs: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(type(own_processor), "__call__", full)
    with pytest.raises(MemoryError):
        batches(own_processor, FAMILY, mixed, 4)


def test_log_likelihood_needs_references(model: Any) -> None:
    with pytest.raises(ValueError, match="s3 has no reference"):
        predictor(model, 2).log_likelihood([sample(3, "w1")])


def test_the_chat_template_writes_the_prompt() -> None:
    own_processor = processor()
    assert render(own_processor, FAMILY, sample(0, "w1 {w2}"), None) == "USER: <image> w1 {w2} short ASSISTANT:"
    assert render(own_processor, FAMILY, sample(0, None), "w3 w4") == "USER: <image> what is it ASSISTANT: w3 w4</s>"


def test_a_processor_without_template_gets_the_familys_prompt() -> None:
    own_processor = processor(template=None)
    assert render(own_processor, FAMILY, sample(0, "w1 {w2}"), None) == "USER: <image>\nw1 {w2} short ASSISTANT:"
    open_end = replace(FAMILY, fallback_prompt="{text}\n")
    assert render(own_processor, open_end, sample(0, "w1"), "w2") == "w1 short\nw2</s>"


def without_padding(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [tokens[mask.bool()].tolist() for tokens, mask in pairs]


@pytest.mark.parametrize("start", ["", "<s>"])
def test_calibration_batches(mixed: list[Sample], start: str) -> None:
    """Order, right padding, 16 image tokens, one start token whoever writes it, the reply and one end token."""
    own_processor = processor(start + TEMPLATE)
    bare = sample(99, None)
    actual = batches(own_processor, FAMILY, [*mixed, bare], 3)
    assert [len(batch["input_ids"]) for batch in actual] == [3, 3, 2]
    rows: Sequence[list[int]] = [row for batch in actual for row in without_padding(batch)]
    for row, one_sample in zip(rows, [*mixed, bare], strict=True):
        assert row[0] == 1
        assert row.count(1) == 1
        assert row.count(4) == (SIDE // PATCH) ** 2
        reply = own_processor.tokenizer.decode(row).rpartition("ASSISTANT:")[2].strip()
        assert reply == (f"{one_sample.references[0]} </s>" if one_sample.references else "")
    for batch in actual:
        assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}
        assert batch["pixel_values"].shape == (len(batch["input_ids"]), 3, SIDE, SIDE)
        mask = batch["attention_mask"]
        assert (mask[:, :-1] >= mask[:, 1:]).all()  # ones, then zeros
    assert any((batch["attention_mask"] == 0).any() for batch in actual)
