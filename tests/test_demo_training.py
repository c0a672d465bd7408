"""Training of the retrieval model and of SmolVLM: initialization, labels, forward passes, and that steps help."""

import argparse
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exporter.data.demo import samples as demo
from exporter.data.demo.scenes import draw, scenes
from exporter.model.embedded import MODELS
from exporter.model.families import FAMILIES
from exporter.model.inference.predict import conversations
from exporter.model.processors.processor import load_processor
from tests.tiny_models import random_weights
from tools.demo_training import smolvlm_packing
from tools.demo_training.blip2_folder import build, config
from tools.demo_training.blip2_packing import encode_image, qformer, queries_of
from tools.demo_training.blip2_retrieval import captioning, matching, picture_features, text_features
from tools.demo_training.folder import EOS, PAD
from tools.demo_training.lineages import LINEAGES, start, write_folder
from tools.demo_training.packing import mask_and_positions, normalize, pack, slot_lengths
from tools.demo_training.texts import NAMED, STYLES, hard_negatives, lexicon_tokens, texts
from tools.demo_training.train_loop import Training, run
from tools.demo_training.train_retrieval import (
    AuxiliaryHeads,
    _next_tokens,
    batches,
    losses_of,
    presence_labels,
    start_from,
)

CPU = torch.device("cpu")


@cache
def answering() -> Any:
    """The shipped model that captions and answers."""
    from transformers import Blip2ForConditionalGeneration

    return Blip2ForConditionalGeneration.from_pretrained(MODELS["demo-blip2"], dtype=torch.float32).eval()


@cache
def fresh() -> Any:
    """A retrieval model before its first step."""
    result = build(config("retrieval"), 0)
    start_from(result, answering())
    return result


def pictures(count: int) -> Tensor:
    """Training pictures, normalized."""
    return normalize(draw(scenes("train", torch.arange(count))))


def test_retrieval_starts_seeing_what_the_answering_model_sees() -> None:
    pixels = pictures(3)
    with torch.no_grad():
        outputs = [qformer(m, queries_of(m, 3), encode_image(m, pixels)) for m in (fresh(), answering())]
        random_weights = qformer(
            build(config("retrieval"), 0), queries_of(answering(), 3), encode_image(answering(), pixels)
        )
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    assert float((random_weights - outputs[1]).abs().mean()) > 0.1


def test_own_passes_are_those_of_transformers() -> None:
    """Contrast, matching, and captioning whose queries encode_image no text."""
    batch, pixels, network = scenes("train", torch.arange(3)), pictures(3), fresh()
    tokens = texts(batch, torch.tensor([0, 5, 3]), lexicon_tokens(CPU)).tokens
    inputs = {"pixel_values": pixels, "input_ids": tokens, "attention_mask": (tokens != PAD).long()}
    with torch.no_grad():
        image = encode_image(network, pixels)
        alone = qformer(network, queries_of(network, 3), image)
        image_vectors, text_vectors = picture_features(network, alone), text_features(network, tokens)
        contrast = torch.einsum("iqd,jd->iqj", image_vectors, text_vectors).amax(dim=1)
        torch.testing.assert_close(contrast, network(**inputs).logits_per_image, rtol=1e-4, atol=1e-5)
        expected = network(**inputs, use_image_text_matching_head=True).logits_per_image
        torch.testing.assert_close(matching(network, image, tokens), expected, rtol=1e-4, atol=1e-5)
        queries, scores = captioning(network, image, tokens)
        torch.testing.assert_close(queries, alone, rtol=1e-4, atol=1e-5)
        later = tokens.clone()
        later[:, 6:] = PAD
        torch.testing.assert_close(captioning(network, image, later)[1][:, :6], scores[:, :6], rtol=1e-4, atol=1e-4)


def test_what_follows_is_the_next_token_and_then_the_end() -> None:
    rows = torch.tensor([[1, 7, 8, PAD], [1, 5, 6, 9]])
    assert _next_tokens(rows).tolist() == [[7, 8, EOS, -100], [5, 6, 9, EOS]]


def test_presence_is_what_a_reader_would_say() -> None:
    batch = scenes("train", torch.arange(300))
    style, lex = torch.arange(300) % STYLES, lexicon_tokens(CPU)
    right = texts(batch, style, lex)
    for caption in (right, texts(hard_negatives(batch, style, torch.Generator().manual_seed(2)), style, lex)):
        labels = presence_labels(right.objects, caption.objects, style < NAMED)
        for i in range(300):
            compared = 5 if style[i] < NAMED else 4
            shown = {tuple(values[:compared]) for values in right.objects[i].tolist() if values[0] >= 0}
            expected = [-100 if t[0] < 0 else int(tuple(t[:compared]) in shown) for t in caption.objects[i].tolist()]
            assert labels[i].tolist() == expected


def test_every_stored_tensor_learns_and_a_few_steps_teach() -> None:
    torch.manual_seed(0)
    model, heads = build(config("retrieval"), 1), AuxiliaryHeads()
    train_scenes = scenes("train", torch.arange(8))
    batch = next(batches(draw(train_scenes), train_scenes, 8, 0))
    losses = losses_of(model, heads)

    def same() -> Iterator[tuple[Tensor, ...]]:
        while True:
            yield batch

    def loss(*tensors: Tensor) -> Tensor:
        return torch.stack(losses(*tensors)).sum()

    parameters = [*model.parameters(), *heads.parameters()]
    options = argparse.Namespace(rate=1e-3, decay=0.0, compile=False, steps=12, minutes=0, report=0.0, keep=0.5)
    saved: list[int] = []
    lines: list[str] = []
    before = loss(*batch)
    before.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())] == []
    figures = run(Training(parameters, loss, same(), dict, lambda: saved.append(1)), options, lines.append)
    assert figures["steps"] == 12
    assert saved == [1]
    assert len(lines) == 12
    assert loss(*batch).item() < 0.8 * before.item()


def test_packed_slots_of_smolvlm_are_the_sequences_that_mmq_makes(tmp_path: Path) -> None:
    """Logits of the training's forward pass against transformers' own, with the inputs of mmq's processor."""
    config = write_folder(tmp_path / "m", LINEAGES["smolvlm"])
    family = FAMILIES["smolvlm"].of(config)
    model, _ = start(family, config)
    random_weights(model.eval())
    samples = [demo.samples("captioning", "test", 1)[0], demo.samples("vqa", "test", 2)[1]]
    layout, lengths = smolvlm_packing.LAYOUT, slot_lengths(1, 1, smolvlm_packing.LAYOUT)
    mask, positions = mask_and_positions(lengths, CPU, layout.prefix)
    for sample in samples:
        rows: list[tuple[str | None, str] | None] = [None, None]
        rows[sample.question is not None] = (sample.question, sample.references[0])
        packed = pack([rows], lengths, layout)
        pixels = torch.from_numpy(np.array(sample.image())).permute(2, 0, 1)[None]
        (talk,) = conversations(load_processor(tmp_path / "m"), family, [sample], 1)
        (begin,), (reply,) = talk.starts, talk.replies
        with torch.no_grad():
            expected = model(**talk.inputs).logits[0, begin - 1 : begin - 1 + len(reply)]
            scores = layout.forward(CPU)(model, normalize(pixels), packed.tokens.long(), mask, positions)[0]
        answer = packed.labels[0] >= 0
        assert packed.labels[0, answer].tolist() == reply.tolist()
        torch.testing.assert_close(scores[answer], expected, rtol=1e-3, atol=1e-3)
