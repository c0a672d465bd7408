"""Encodes samples as model inputs: prompts, replies and pictures. DataError names samples that cannot be encoded."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from exporter.data.tasks.retrieval import prepare
from exporter.data.tasks.sample import Sample, task_of
from exporter.errors import DataError
from exporter.model.families import Family
from exporter.model.processors.processor import Processor
from exporter.out_of_memory import is_shortage

Batch = dict[str, Tensor]
MAX_NAMED = 5  # samples that an error message names


def render(processor: Any, family: Family, sample: Sample, reply: str | None) -> str:
    """The text of a sample for the tokenizer: the prompt, or with `reply` the whole conversation including its end.

    Uses the processor's chat template when it has one. A reply follows the prompt after one space, as in LLaVA's
    conversations, and ends like the family's replies; for retrieval the reply is the text to search for.
    """
    if reply is not None and "retrieval" in family.tasks:
        reply = prepare(reply)
    text = family.text(sample.question)
    prompt = processor.template.prompt(text) if processor.template else family.fallback_prompt.format(text=text)
    if reply is None:
        return prompt
    gap = " " if prompt and not prompt[-1].isspace() else ""
    return f"{prompt}{gap}{reply}{reply_end(processor.tokenizer, family)[0]}"


def reply_end(tokenizer: Any, family: Family) -> tuple[str, list[int]]:
    """The text that ends a reply, and the ids of the tokens that end generation.

    The family's own end is used if it is one token of this tokenizer, otherwise the end-of-sequence token.
    """
    ends = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if family.reply_end:
        tokens = tokenizer(family.reply_end, add_special_tokens=False)["input_ids"]
        if len(tokens) == 1 and tokens[0] != tokenizer.unk_token_id:
            return family.reply_end, [*ends, int(tokens[0])]
    return "" if family.reply_end == "" else tokenizer.eos_token or "", ends


def encode(
    processor: Processor, family: Family, samples: Sequence[Sample], replies: Sequence[str | None], side: str
) -> Batch:
    """Model inputs of one batch on the CPU: texts padded on `side`, and pictures.

    DataError when the processor fails, when a text has more tokens than the model has positions, or when a sample's
    text contains the placeholder of a picture.
    """
    _refuse_placeholders(processor, samples, replies)
    texts = [render(processor, family, s, reply) for s, reply in zip(samples, replies, strict=True)]
    images = [[sample.image()] if family.nested else sample.image() for sample in samples]
    options = {"padding": True, "padding_side": side, "return_tensors": "pt"}
    options["add_special_tokens"] = _adds_start(processor, texts[0])
    try:
        encoded = processor(images=images, text=texts, **options)
    except Exception as error:  # the libraries raise many types for a bad picture or text
        if is_shortage(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(f"the processor cannot encode {_named(samples)}: {reason}") from error
    inputs = {name: value for name, value in encoded.items() if isinstance(value, Tensor)}
    length = inputs["input_ids"].shape[1]
    if processor.positions is not None and length > processor.positions:
        message = f"{_named(samples)}: {length:,} tokens exceed the model's {processor.positions:,} positions"
        raise DataError(message, "shorten the texts of these samples, or remove the samples")
    _check_pictures(processor, family, inputs, samples, texts)
    return inputs


def continued(inputs: Batch, tokens: Sequence[int]) -> Batch:
    """Inputs of one sample with text after its prompt. tokens: ids of that text.

    Every tensor `[1, tokens]` grows: the ids by `tokens`, the attention mask by ones, and kinds of tokens
    (`mm_token_type_ids` of Qwen-VL) by zeros, which mean text.
    """
    ids = torch.tensor([list(tokens)], dtype=torch.long)
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    shape = inputs["input_ids"].shape
    return {
        name: torch.cat([value, more.get(name, torch.zeros_like(ids)).to(value.dtype)], 1)
        if value.shape == shape
        else value
        for name, value in inputs.items()
    }


def _adds_start(processor: Processor, text: str) -> bool:
    """Whether the tokenizer must add special tokens: False when the chat template writes the start token itself."""
    start = processor.tokenizer.bos_token
    return not (start and text.startswith(start))


def _refuse_placeholders(processor: Processor, samples: Sequence[Sample], replies: Sequence[str | None]) -> None:
    """DataError when a text contains the placeholder of a picture; a prompt adds it itself."""
    placeholder = processor.image_token
    texts = [f"{sample.question or ''} {reply or ''}" for sample, reply in zip(samples, replies, strict=True)]
    wrong = [sample for sample, text in zip(samples, texts, strict=True) if placeholder and placeholder in text]
    if wrong:
        raise _placeholder_error(wrong, placeholder)


def _placeholder_error(samples: Sequence[Sample], placeholder: str | None) -> DataError:
    message = f"{_named(samples)}: the text contains {placeholder!r}, the placeholder of a picture"
    return DataError(message, "remove it from the text")


def _check_pictures(
    processor: Processor, family: Family, inputs: Batch, samples: Sequence[Sample], texts: Sequence[str]
) -> None:
    """DataError unless all prompts have one picture: the same number of image tokens, or of placeholders in the text.

    Placeholders are counted where the number of image tokens depends on the picture.
    """
    marker, placeholder = processor.image_token_id, processor.image_token
    if marker is None or placeholder is None:
        return
    if family.varies:
        counts = [text.count(placeholder) for text in texts]
    else:
        counts = ((inputs["input_ids"] == marker) & inputs["attention_mask"].bool()).sum(dim=1).tolist()
    expected = 1 if family.varies else min(counts)
    wrong = [sample for sample, count in zip(samples, counts, strict=True) if count != expected]
    if wrong:
        raise _placeholder_error(wrong, placeholder)


def refuse_too_long(
    processor: Processor, family: Family, calibration: Sequence[Sample], tested: Mapping[str, Sequence[Sample]]
) -> None:
    """DataError that names the samples with more tokens than the model has positions.

    calibration: counted with their replies. tested: samples by task, counted with the longest answer. Where the number
    of image tokens depends on the picture, all pictures count as the first one, and `encode` refuses larger ones.
    """
    if processor.positions is None:
        return
    tests = [sample for samples in tested.values() for sample in samples]
    picture = processor.image_tokens
    if family.varies and (first := [*calibration, *tests][:1]):
        inputs = encode(processor, family, first, [None], "right")
        picture = inputs["input_ids"].flatten().tolist().count(processor.image_token_id)
    sizes = [(sample, _length(processor, family, sample, _reply(sample), picture)) for sample in calibration]
    for sample in tests:
        room = family.max_new_tokens.get(task_of(sample), 0)
        sizes.append((sample, _length(processor, family, sample, None, picture) + room))
    lengths: dict[str, int] = {}
    for sample, length in sizes:
        lengths[sample.identity] = max(length, lengths.get(sample.identity, 0))
    long = {name: length for name, length in lengths.items() if length > processor.positions}
    if long:
        listed = ", ".join(f"{name} ({length:,} tokens)" for name, length in list(long.items())[:MAX_NAMED])
        more = f" and {len(long) - MAX_NAMED} more" if len(long) > MAX_NAMED else ""
        message = f"{len(long)} samples are longer than the model's {processor.positions:,} positions: {listed}{more}"
        raise DataError(message, "shorten the texts of these samples, or remove the samples")


def _length(processor: Processor, family: Family, sample: Sample, reply: str | None, picture: int) -> int:
    """The number of tokens of a sample's text and its picture, which takes `picture` tokens."""
    text = render(processor, family, sample, reply)
    tokens: list[int] = processor.tokenizer(text, add_special_tokens=_adds_start(processor, text))["input_ids"]
    return len(tokens) - sum(token == processor.image_token_id for token in tokens) + picture


def _reply(sample: Sample) -> str | None:
    return sample.references[0] if sample.references else None


def _named(samples: Sequence[Sample]) -> str:
    """Identities of the samples for an error message, at most `MAX_NAMED`."""
    names = ", ".join(sample.identity for sample in samples[:MAX_NAMED])
    return f"{names} and {len(samples) - MAX_NAMED} more" if len(samples) > MAX_NAMED else names
