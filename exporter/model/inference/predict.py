"""Answers, log-likelihoods and calibration batches of a transformers model in this process."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from exporter.data.tasks.sample import Sample, task_of
from exporter.events import Event, Listener, ignore, notice
from exporter.model.families import Family
from exporter.model.inference.batch_size import BatchSize
from exporter.model.inference.encoding import Batch, encode, render, reply_end
from exporter.model.inference.retrieval import rank
from exporter.model.inference.text_stream import TextStream


def prompt_text(family: Family, sample: Sample) -> str:
    """The user's text next to the picture, without a chat template."""
    return family.text(sample.question)


def prompt_inputs(processor: Any, family: Family, sample: Sample) -> Batch:
    """Model inputs of one sample's picture and prompt, a batch of one on the CPU."""
    return encode(processor, family, [sample], [None], "right")


def batches(processor: Any, family: Family, samples: Sequence[Sample], batch_size: int) -> list[Batch]:
    """Calibration inputs of the samples, in order, on the CPU: prompt, first reference, end of sequence.

    Each batch has `input_ids` and `attention_mask`, int64 `[batch, tokens]`, `pixel_values` f32 `[batch, 3, height,
    width]`, and other tensors that the processor makes. Texts are padded on the right, so that no row of a causal mask
    is empty.
    """
    groups = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
    return [encode(processor, family, group, [_reply(s) for s in group], "right") for group in groups]


def calibration_text(processor: Any, family: Family, sample: Sample) -> str:
    """The text of one sample in `batches`: its prompt, its first reference, and the end of the reply."""
    return render(processor, family, sample, _reply(sample))


@dataclass(frozen=True)
class Conversations:
    """Model inputs of some samples with their replies, padded on the right, and the positions of the replies.

    starts: for each row the position of the reply's first token. replies: for each row its token ids, including the
    end.
    """

    inputs: Batch
    starts: tuple[int, ...]
    replies: tuple[Tensor, ...]


def conversations(processor: Any, family: Family, samples: Sequence[Sample], batch_size: int) -> list[Conversations]:
    """Samples with their first reference as the reply, in order, on the CPU (ValueError without a reference)."""
    _require_references(samples)
    groups = []
    for start in range(0, len(samples), batch_size):
        group = samples[start : start + batch_size]
        prompts = encode(processor, family, group, [None] * len(group), "right")
        whole = encode(processor, family, group, [_reply(s) for s in group], "right")
        ids = [(_tokens(prompts, row), _tokens(whole, row)) for row in range(len(group))]
        starts = tuple(_reply_start(prompt, full) for prompt, full in ids)
        replies = tuple(full[at:] for (_, full), at in zip(ids, starts, strict=True))
        groups.append(Conversations(whole, starts, replies))
    return groups


def _require_references(samples: Sequence[Sample]) -> None:
    missing = [sample.identity for sample in samples if not sample.references]
    if missing:
        raise ValueError(f"{missing[0]} has no reference")


def _reply(sample: Sample) -> str | None:
    return sample.references[0] if sample.references else None


class Predictor:
    """Answers questions with a transformers model and its processor.

    model: on `device`, in evaluation mode. Decoding is greedy, so answers depend only on weights and inputs; the model
    loses the generation settings that transformers takes from its config.json.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        family: Family,
        device: torch.device,
        batch_size: int,
        on_event: Listener = ignore,
    ) -> None:
        self._model = _without_generation_settings(model)
        self._processor = processor
        self._family = family
        self._device = device
        self._batch_size = BatchSize(batch_size, lambda large, small: on_event(_smaller(large, small)))

    def close(self) -> None:
        """Drop the reference to the model, so that its memory is freed even while this object lives."""
        self._model = None

    def pieces(self, samples: Sequence[Sample]) -> Iterator[dict[int, str]]:
        """Yield sample number -> answer without surrounding spaces, batch by batch. Prompts are padded on the left.

        When a batch runs out of memory, this batch and all later ones are halved.
        """
        retrieval = [i for i, sample in enumerate(samples) if sample.among is not None]
        if retrieval:
            queries = [samples[i] for i in retrieval]
            for piece in rank(self._model, self._processor, queries, self._device, self._batch_size):
                yield {retrieval[number]: answer for number, answer in piece.items()}
        for task, numbers in self._by_task(samples):
            yield from self._batch_size.each(numbers, partial(self._batch, task, samples))

    @torch.inference_mode()
    def _batch(self, task: str, samples: Sequence[Sample], numbers: Sequence[int]) -> dict[int, str]:
        inputs = self._inputs([samples[i] for i in numbers], [None] * len(numbers), "left")
        tokens = self._model.generate(**inputs, generation_config=self._greedy(self._family.max_new_tokens[task]))
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return {i: text.strip() for i, text in zip(numbers, self._decode(new), strict=True)}

    @torch.inference_mode()
    def stream(self, sample: Sample, longest: int, on_text: Callable[[str], object]) -> str:
        """The answer to one sample, of at most `longest` tokens; `on_text` gets each new piece of it."""
        stream = TextStream(self._processor.tokenizer, on_text)
        inputs = self._inputs([sample], [None], "left")
        self._model.generate(**inputs, generation_config=self._greedy(longest), streamer=stream)
        return stream.text

    @torch.inference_mode()
    def generate_exactly(self, samples: Sequence[Sample], tokens: int) -> None:
        """Generate exactly `tokens` tokens for each sample, all in one batch, and drop them: to measure speed."""
        settings = self._greedy(tokens)
        settings.min_new_tokens = tokens
        self._model.generate(**self._inputs(samples, [None] * len(samples), "left"), generation_config=settings)

    def answer(self, samples: Sequence[Sample], on_event: Listener = ignore) -> list[str]:
        """One answer per sample; sends one event per batch."""
        answers: dict[int, str] = {}
        for piece in self.pieces(samples):
            answers |= piece
            on_event(Event("evaluate", len(answers), len(samples), task_of(samples[min(piece)])))
        return [answers[i] for i in range(len(samples))]

    @torch.inference_mode()
    def log_likelihood(self, samples: Sequence[Sample]) -> list[float]:
        """Mean natural log-probability per token of the first reference with its end token, given picture and prompt.

        ValueError when a sample has no reference.
        """
        _require_references(samples)
        likelihoods: dict[int, float] = {}
        for _, numbers in self._by_task(samples):
            for piece in self._batch_size.each(numbers, partial(self._likelihoods, samples)):
                likelihoods |= piece
        return [likelihoods[i] for i in range(len(samples))]

    def _likelihoods(self, samples: Sequence[Sample], numbers: Sequence[int]) -> dict[int, float]:
        group = [samples[i] for i in numbers]
        prompts = self._inputs(group, [None] * len(group), "right")
        whole = self._inputs(group, [s.references[0] for s in group], "right")
        logits = self._model(**whole, use_cache=False).logits  # [batch, tokens, vocabulary]
        rows = enumerate(numbers)
        return {i: _reply_likelihood(logits[row], _tokens(prompts, row), _tokens(whole, row)) for row, i in rows}

    def _by_task(self, samples: Sequence[Sample]) -> Iterator[tuple[str, list[int]]]:
        """Sample numbers by task, for the tasks that are answered with generated text."""
        for task in sorted({task_of(sample) for sample in samples} - {"retrieval"}):
            yield task, [i for i, sample in enumerate(samples) if task_of(sample) == task]

    def _inputs(self, samples: Sequence[Sample], replies: Sequence[str | None], side: str) -> Batch:
        encoded = encode(self._processor, self._family, samples, replies, side)
        dtype = next(self._model.parameters()).dtype
        return {k: v.to(self._device, dtype if v.is_floating_point() else None) for k, v in encoded.items()}

    def _decode(self, tokens: Tensor) -> list[str]:
        return [str(text) for text in self._processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def _greedy(self, longest: int) -> Any:
        """Greedy decoding settings, independent of the checkpoint's own generation settings."""
        from transformers import GenerationConfig

        tokenizer = self._processor.tokenizer
        _, ends = reply_end(tokenizer, self._family)
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return GenerationConfig(
            do_sample=False, num_beams=1, max_new_tokens=longest, eos_token_id=ends, pad_token_id=pad, use_cache=True
        )


def _without_generation_settings(model: Any) -> Any:
    """The model with default generation settings in all its parts.

    transformers uses a model's own settings (repetition penalties, suppressed tokens) where a call passes none.
    """
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if getattr(module, "generation_config", None) is not None:
            module.generation_config = type(module.generation_config)()
    return model


def _smaller(large: int, small: int) -> Event:
    return notice(f"out of memory with a batch of {large} samples: continuing with {small}")


def _tokens(inputs: Batch, row: int) -> Tensor:
    """Token ids `[tokens]` of one row, without padding."""
    return inputs["input_ids"][row][inputs["attention_mask"][row].bool()]


def _reply_likelihood(logits: Tensor, prompt: Tensor, whole: Tensor) -> float:
    """Mean log-probability of the reply's tokens, those of `whole` after `prompt`.

    logits: `[tokens, vocabulary]` of a row that is padded on the right.
    """
    start = _reply_start(prompt, whole)
    log_probabilities = logits[start - 1 : len(whole) - 1].float().log_softmax(-1)
    return float(log_probabilities.gather(1, whole[start:, None]).mean())


def _reply_start(prompt: Tensor, whole: Tensor) -> int:
    """Position of the reply's first token: the first position at which the ids of `whole` and `prompt` differ."""
    shared = min(len(prompt), len(whole))
    differs = (prompt[:shared] != whole[:shared]).nonzero()
    return int(differs[0]) if len(differs) else shared
