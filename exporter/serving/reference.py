"""The artifact's dequantized weights in transformers: the reference for an engine's answers.

It gives the log-probabilities of all tokens that the engine listed, likely or not, after the same prompt. The effect of
16-bit sums alone is measured: the floor is the reference in the engine's dtype beside itself in float32, several times,
each time with the picture moved by less than 16 bits can represent, because one pass alone says little. An engine that
computes the same in 16 bits has the floor's mean (`docs/measurements/serving-accuracy.md`). Means instead of root mean
squares: a single question that amplifies every rounding error would decide those.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exporter.artifact.artifact import Artifact
from exporter.device import Device, choose
from exporter.errors import ServeError
from exporter.inference.predict import prompt_inputs
from exporter.model.stream import load_whole
from exporter.numerics.activation_rounding import round_as_served
from exporter.planning.whole_model import ROOM_FOR_ACTIVATIONS
from exporter.serving.launch import dtype as engine_dtype
from exporter.serving.vllm_engine import Reply
from exporter.tasks.sample import Sample

BOUND = 0.015  # mean difference of natural log-probabilities that is always allowed
ROOM = 1.4  # times the floor's mean that is allowed: 16-bit passes beside each other had 0.7 to 1.4
LARGEST_SHARE = 4.0  # times the bound, always allowed for a single token
LARGEST_ROOM = 2.0  # times the floor's largest difference
PASSES = 8  # in 16 bits


@dataclass(frozen=True)
class Distance:
    """Differences of log-probabilities over every listed token of every answer."""

    largest: float
    mean: float
    tokens: int


@dataclass(frozen=True)
class Compared:
    """The engine beside the reference, and the floor: the reference in 16 bits beside itself."""

    distance: Distance
    floor: Distance

    def allowed(self, bound: float) -> tuple[float, float]:
        """Largest and mean difference that pass."""
        return max(LARGEST_SHARE * bound, LARGEST_ROOM * self.floor.largest), max(bound, ROOM * self.floor.mean)

    def close(self, bound: float) -> bool:
        """Whether the engine is as close to the reference as 16-bit sums are (never, when nothing was compared)."""
        largest, mean = self.allowed(bound)
        return self.distance.largest <= largest and self.distance.mean <= mean


def placed(artifact: Artifact, device: Device) -> tuple[Device, torch.dtype]:
    """Where the reference computes, and in which dtype its weights are held.

    float32 where it fits beside the activations, else the engine's 16 bits; the CPU where `device` holds neither.
    ServeError when the host's memory is too small as well.
    """
    parameters, config = artifact.parameters(), artifact.checkpoint.config
    places = [device] if not device.is_cuda else [device, choose("cpu")]
    for place in places:
        for dtype in (torch.float32, getattr(torch, engine_dtype(config, not place.is_cuda))):
            if dtype.itemsize * parameters * ROOM_FOR_ACTIVATIONS < place.free_bytes:
                return place, dtype
    free = " and ".join(f"{place.free_bytes / 2**30:.1f} GiB on {place.name}" for place in places)
    raise ServeError(
        f"the reference needs {2 * ROOM_FOR_ACTIVATIONS * parameters / 2**30:.1f} GiB, there are {free}",
        "free memory, name a larger --device, or check on a larger machine: the artifact itself is not affected",
    )


class Reference:
    """The artifact in transformers as an engine computes it, in float32 if it fits.

    Weights are dequantized, inputs rounded as the schemes say, keys and values as the cache holds them. gpu: whether
    the engine's is on one, which rounds a float8 cache otherwise than a CPU; None: where the reference computes.
    """

    def __init__(self, artifact: Artifact, processor: Any, device: Device, gpu: bool | None = None) -> None:
        self._family = artifact.family
        device, self._high = placed(artifact, device)
        self._device = device.torch_device
        self._processor = processor
        self._low = getattr(torch, engine_dtype(artifact.checkpoint.config, not device.is_cuda))
        config = artifact.source_config()
        self._model = load_whole(self._family, config, artifact.names(), artifact.read, self._device, self._high)
        round_as_served(self._model, artifact.rounded(), device.is_cuda if gpu is None else gpu)

    def prompt_problems(self, samples: Sequence[Sample], replies: Sequence[Reply]) -> list[str]:
        """Samples for which the engine saw another prompt: another chat template or another number of image tokens."""
        for sample, reply in zip(samples, replies, strict=True):
            ours = prompt_inputs(self._processor, self._family, sample)["input_ids"][0].tolist()
            if ours != list(reply.prompt):
                text = f"the engine saw {len(reply.prompt)} tokens, the reference {len(ours)}"
                return [f"{sample.identity}: the prompts differ: {text}; the first {reply.prompt[:3]} and {ours[:3]}"]
        return []

    def compare(self, samples: Sequence[Sample], replies: Sequence[Reply]) -> Compared:
        """The engine beside the reference, and the reference in 16 bits beside itself, on the same tokens."""
        pairs = list(zip(samples, replies, strict=True))
        high = [self.log_probabilities(sample, reply) for sample, reply in pairs]
        listed = [listed_tokens(reply) for reply in replies]
        engine = [abs(t[2] - float(high[i][t[:2]])) for i, tokens in enumerate(listed) for t in tokens]
        self._model.to(self._low)
        rounded = []
        for turn in range(PASSES):
            low = [self.log_probabilities(sample, reply, noise=turn) for sample, reply in pairs]
            rounded += [abs(float(low[i][t[:2]] - high[i][t[:2]])) for i, tokens in enumerate(listed) for t in tokens]
        self._model.to(self._high)  # what was float32 stays rounded to 16 bits, as engines hold it
        return Compared(distance_of(engine), distance_of(rounded))

    def distance(self, samples: Sequence[Sample], replies: Sequence[Reply]) -> Distance:
        """The engine beside the reference alone."""
        differences = []
        for sample, reply in zip(samples, replies, strict=True):
            ours = self.log_probabilities(sample, reply)
            differences += [abs(t[2] - float(ours[t[:2]])) for t in listed_tokens(reply)]
        return distance_of(differences)

    @torch.inference_mode()
    def log_probabilities(self, sample: Sample, reply: Reply, noise: int = 0) -> Tensor:
        """f32 `[tokens of the answer, vocabulary]`: natural log-probabilities at every token of the engine's answer.

        noise: 0 leaves the picture alone; others move it, each in its own way, by up to a quarter of a 16-bit step.
        """
        inputs = prompt_inputs(self._processor, self._family, sample)
        if noise:
            draw = torch.rand(inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(noise))
            step = torch.finfo(self._low).eps / 4
            inputs["pixel_values"] = inputs["pixel_values"] * (1 + step * (2 * draw - 1))
        start = inputs["input_ids"].shape[1]
        answer = torch.tensor([reply.tokens[:-1]], dtype=torch.long)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        dtype = next(self._model.parameters()).dtype
        moved = {k: v.to(self._device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}
        logits: Tensor = self._model(**moved, use_cache=False).logits[0, start - 1 :]
        return logits.float().log_softmax(-1).cpu()


def listed_tokens(reply: Reply) -> list[tuple[int, int, float]]:
    """Step, token and the engine's log-probability of every token it lists.

    Unlikely ones too: where an answer is sure the likely ones say nothing, and the floor has the same tokens.
    """
    steps = enumerate(zip(reply.tokens, reply.logprobs, reply.top, strict=True))
    return [(i, token, p) for i, (chosen, said, top) in steps for token, p in {**top, chosen: said}.items()]


def distance_of(differences: Sequence[float]) -> Distance:
    """Largest and mean; of nothing, not a number, which passes no bound."""
    count = len(differences)
    if not count:
        return Distance(math.nan, math.nan, 0)
    return Distance(max(differences), math.fsum(differences) / count, count)
