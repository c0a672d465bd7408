"""How retrieval is trained: what it takes over, what its lessons ask, and that a step teaches."""

import argparse
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from exporter.demo import MODELS
from exporter.demo.scenes import draw, scenes
from tools.demo_training.blip2_folder import build, config
from tools.demo_training.blip2_packing import former, queries_of, see
from tools.demo_training.blip2_retrieval import matching, picture_features, telling, text_features
from tools.demo_training.folder import EOS, PAD
from tools.demo_training.packing import normalize
from tools.demo_training.texts import NAMED, STYLES, lexicon_tokens, spoil, texts
from tools.demo_training.train_loop import Work, run
from tools.demo_training.train_retrieval import Lessons, _next, batches, present, start_from, terms_of

CPU = torch.device("cpu")


@cache
def answering() -> Any:
    """The shipped model that captions and answers."""
    from transformers import Blip2ForConditionalGeneration

    return Blip2ForConditionalGeneration.from_pretrained(MODELS["demo-blip2"], dtype=torch.float32).eval()


@cache
def fresh() -> Any:
    """A retrieval model before its first step."""
    made = build(config("retrieval"), 0)
    start_from(made, answering())
    return made


def pictures(count: int) -> Tensor:
    """Training pictures, normalized."""
    return normalize(draw(scenes("train", torch.arange(count))))


def test_retrieval_starts_seeing_what_the_answering_model_sees() -> None:
    pixels = pictures(3)
    with torch.no_grad():
        seen = [former(m, queries_of(m, 3), see(m, pixels)) for m in (fresh(), answering())]
        untaught = former(build(config("retrieval"), 0), queries_of(answering(), 3), see(answering(), pixels))
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-4)
    assert float((untaught - seen[1]).abs().mean()) > 0.1


def test_own_passes_are_those_of_transformers() -> None:
    """Contrast, matching, and telling whose queries see no text."""
    batch, pixels, itself = scenes("train", torch.arange(3)), pictures(3), fresh()
    tokens = texts(batch, torch.tensor([0, 5, 3]), lexicon_tokens(CPU)).tokens
    inputs = {"pixel_values": pixels, "input_ids": tokens, "attention_mask": (tokens != PAD).long()}
    with torch.no_grad():
        image = see(itself, pixels)
        alone = former(itself, queries_of(itself, 3), image)
        found, said = picture_features(itself, alone), text_features(itself, tokens)
        contrast = torch.einsum("iqd,jd->iqj", found, said).amax(dim=1)
        torch.testing.assert_close(contrast, itself(**inputs).logits_per_image, rtol=1e-4, atol=1e-5)
        theirs = itself(**inputs, use_image_text_matching_head=True).logits_per_image
        torch.testing.assert_close(matching(itself, image, tokens), theirs, rtol=1e-4, atol=1e-5)
        queries, scores = telling(itself, image, tokens)
        torch.testing.assert_close(queries, alone, rtol=1e-4, atol=1e-5)
        later = tokens.clone()
        later[:, 6:] = PAD
        torch.testing.assert_close(telling(itself, image, later)[1][:, :6], scores[:, :6], rtol=1e-4, atol=1e-4)


def test_what_follows_is_the_next_token_and_then_the_end() -> None:
    rows = torch.tensor([[1, 7, 8, PAD], [1, 5, 6, 9]])
    assert _next(rows).tolist() == [[7, 8, EOS, -100], [5, 6, 9, EOS]]


def test_presence_is_what_a_reader_would_say() -> None:
    batch = scenes("train", torch.arange(300))
    style, known = torch.arange(300) % STYLES, lexicon_tokens(CPU)
    right = texts(batch, style, known)
    for said in (right, texts(spoil(batch, style, torch.Generator().manual_seed(2)), style, known)):
        found = present(right.things, said.things, style < NAMED)
        for i in range(300):
            told = 5 if style[i] < NAMED else 4
            shown = {tuple(thing[:told]) for thing in right.things[i].tolist() if thing[0] >= 0}
            wanted = [-100 if t[0] < 0 else int(tuple(t[:told]) in shown) for t in said.things[i].tolist()]
            assert found[i].tolist() == wanted


def test_every_stored_tensor_learns_and_a_few_steps_teach() -> None:
    torch.manual_seed(0)
    model, lessons = build(config("retrieval"), 1), Lessons()
    whole = scenes("train", torch.arange(8))
    one = next(batches(draw(whole), whole, 8, 0))
    terms = terms_of(model, lessons)

    def same() -> Iterator[tuple[Tensor, ...]]:
        while True:
            yield one

    def loss(*batch: Tensor) -> Tensor:
        return torch.stack(terms(*batch)).sum()

    parameters = [*model.parameters(), *lessons.parameters()]
    options = argparse.Namespace(rate=1e-3, decay=0.0, compile=False, steps=12, minutes=0, report=0.0, keep=0.5)
    saved: list[int] = []
    lines: list[str] = []
    before = loss(*one)
    before.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())] == []
    figures = run(Work(parameters, loss, same(), dict, lambda: saved.append(1)), options, lines.append)
    assert figures["steps"] == 12
    assert saved == [1]
    assert len(lines) == 12
    assert loss(*one).item() < 0.8 * before.item()
