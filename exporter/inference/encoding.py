"""Samples as model inputs: prompts with replies, pictures, and what no model can take, named by sample."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from exporter.errors import DataError
from exporter.model.families import Family
from exporter.model.processor import Processor
from exporter.out_of_memory import is_shortage
from exporter.tasks.retrieval import prepare
from exporter.tasks.sample import Sample, task_of

Batch = dict[str, Tensor]
SHOWN = 5  # samples that a message names


def render(processor: Any, family: Family, sample: Sample, reply: str | None) -> str:
    """The text that the processor turns into tokens: the prompt, and with `reply` the whole conversation to its end.

    The processor's own chat template is used when it has one. A reply follows the prompt after one space, as in
    LLaVA's conversations, and ends as the family's replies do; for retrieval it is the text that is searched for.
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
    """What ends a reply, as text, and the tokens at which an answer is over.

    The family's own end counts where it is a token of this tokenizer, else the end-of-sequence token.
    """
    ends = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if family.reply_end:
        own = tokenizer(family.reply_end, add_special_tokens=False)["input_ids"]
        if len(own) == 1 and own[0] != tokenizer.unk_token_id:
            return family.reply_end, [*ends, int(own[0])]
    return "" if family.reply_end == "" else tokenizer.eos_token or "", ends


def encode(
    processor: Processor, family: Family, samples: Sequence[Sample], replies: Sequence[str | None], side: str
) -> Batch:
    """Model inputs of one batch on the CPU: texts padded on `side`, and pictures.

    DataError when the processor cannot make them, or makes another number of image tokens for some sample.
    """
    texts = [render(processor, family, s, reply) for s, reply in zip(samples, replies, strict=True)]
    images = [sample.image() for sample in samples]
    options = {"padding": True, "padding_side": side, "return_tensors": "pt"}
    options["add_special_tokens"] = _adds_start(processor, texts[0])
    try:
        encoded = processor(images=images, text=texts, **options)
    except Exception as error:  # whatever the libraries find wrong with a picture or a text
        if is_shortage(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(f"the processor cannot encode {_named(samples)}: {reason}") from error
    inputs = {name: value for name, value in encoded.items() if isinstance(value, Tensor)}
    length = inputs["input_ids"].shape[1]
    if processor.positions is not None and length > processor.positions:
        message = f"{_named(samples)}: {length:,} tokens, and the model has {processor.positions:,} positions"
        raise DataError(message, "shorten their texts, or leave them out")
    _check_pictures(processor, inputs, samples)
    return inputs


def _adds_start(processor: Processor, text: str) -> bool:
    """Whether the tokenizer is to add special tokens: a chat template may write the start token itself."""
    start = processor.tokenizer.bos_token
    return not (start and text.startswith(start))


def _check_pictures(processor: Processor, inputs: Batch, samples: Sequence[Sample]) -> None:
    """Every prompt holds one picture, so all must hold the same number of image tokens."""
    marker = processor.image_token_id
    if marker is None:
        return
    counts = (inputs["input_ids"] == marker).sum(dim=1).tolist()
    odd = [sample for sample, count in zip(samples, counts, strict=True) if count != min(counts)]
    if odd:
        raise DataError(
            f"{_named(odd)}: the text holds {processor.image_token!r}, which stands for a picture",
            "take it out of the text",
        )


def refuse_too_long(
    processor: Processor, family: Family, calibration: Sequence[Sample], tested: Mapping[str, Sequence[Sample]]
) -> None:
    """DataError naming the samples whose tokens, and those of an answer, are more than the model has positions for."""
    if processor.positions is None:
        return
    measured = [(sample, _length(processor, family, sample, _reply(sample))) for sample in calibration]
    for sample in (sample for samples in tested.values() for sample in samples):
        room = family.max_new_tokens.get(task_of(sample), 0)
        measured.append((sample, _length(processor, family, sample, None) + room))
    lengths: dict[str, int] = {}
    for sample, length in measured:
        lengths[sample.identity] = max(length, lengths.get(sample.identity, 0))
    long = {name: length for name, length in lengths.items() if length > processor.positions}
    if long:
        listed = ", ".join(f"{name} ({length:,} tokens)" for name, length in list(long.items())[:SHOWN])
        rest = f" and {len(long) - SHOWN} more" if len(long) > SHOWN else ""
        message = f"{len(long)} samples are longer than the model's {processor.positions:,} positions: {listed}{rest}"
        raise DataError(message, "shorten their texts, or leave them out")


def _length(processor: Processor, family: Family, sample: Sample, reply: str | None) -> int:
    """Tokens of a sample's text, the picture's among them."""
    text = render(processor, family, sample, reply)
    tokens: list[int] = processor.tokenizer(text, add_special_tokens=_adds_start(processor, text))["input_ids"]
    return len(tokens) - sum(token == processor.image_token_id for token in tokens) + processor.image_tokens


def _reply(sample: Sample) -> str | None:
    return sample.references[0] if sample.references else None


def _named(samples: Sequence[Sample]) -> str:
    names = ", ".join(sample.identity for sample in samples[:SHOWN])
    return f"{names} and {len(samples) - SHOWN} more" if len(samples) > SHOWN else names
