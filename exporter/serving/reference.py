"""Reference for vLLM's answers: log-probabilities of the artifact's dequantized weights in transformers.

The reference computes the log-probabilities of all tokens that the engine lists, after the same prompt. The floor
measures the effect of 16-bit arithmetic alone: it compares the reference in the engine's dtype with the reference in
float32, in several passes, each with the picture changed by less than a 16-bit step, because one pass is too noisy.
A correct 16-bit engine has the mean of the floor (`docs/measurements/serving-accuracy.md`). The comparison uses means
and not root mean squares, because one question that amplifies rounding errors would dominate root mean squares.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from exporter.artifact.artifact import Artifact
from exporter.data.tasks.sample import Sample
from exporter.device import Device, choose
from exporter.errors import ServeError
from exporter.model.inference.encoding import continued
from exporter.model.inference.predict import prompt_inputs
from exporter.model.stream import load_whole
from exporter.numerics.activation_rounding import round_as_served
from exporter.planning.tensor_parallel import input_parts
from exporter.planning.whole_model import ROOM_FOR_ACTIVATIONS
from exporter.serving.launch import dtype as engine_dtype
from exporter.serving.vllm_engine import Reply

BOUND = 0.015  # mean difference of natural log-probabilities that is always allowed
FLOOR_FACTOR = 1.4  # allowed multiple of the floor's mean: pairs of 16-bit passes measured 0.7 to 1.4
TOKEN_FACTOR = 4.0  # multiple of the bound that is always allowed for a single token
TOKEN_FLOOR_FACTOR = 2.0  # allowed multiple of the floor's largest difference for a single token
PASSES = 8  # passes in 16 bits


@dataclass(frozen=True)
class Distance:
    """Absolute differences of log-probabilities over all listed tokens of all answers."""

    largest: float
    mean: float
    tokens: int


@dataclass(frozen=True)
class EngineComparison:
    """distance: engine against the reference. floor: reference in 16 bits against the reference in float32."""

    distance: Distance
    floor: Distance

    def allowed(self, bound: float) -> tuple[float, float]:
        """Allowed largest difference and allowed mean difference."""
        return max(TOKEN_FACTOR * bound, TOKEN_FLOOR_FACTOR * self.floor.largest), max(
            bound, FLOOR_FACTOR * self.floor.mean
        )

    def close(self, bound: float) -> bool:
        """Whether the engine is within the allowed differences (False when no tokens were compared)."""
        largest, mean = self.allowed(bound)
        return self.distance.largest <= largest and self.distance.mean <= mean


def reference_placements(artifact: Artifact, device: Device) -> list[tuple[Device, torch.dtype]]:
    """Devices of the reference with dtypes of its weights that fit into free memory, the preferred one first.

    float32 where weights and activations fit, else the engine's 16-bit dtype; the CPU where neither fits on `device`.
    ServeError when host memory is too small as well.
    """
    parameters, config = artifact.parameters(), artifact.checkpoint.config
    places = [device] if not device.is_cuda else [device, choose("cpu")]
    fitting = [
        (place, dtype)
        for place in places
        for dtype in (torch.float32, getattr(torch, engine_dtype(config, not place.is_cuda)))
        if dtype.itemsize * parameters * ROOM_FOR_ACTIVATIONS < place.free_bytes
    ]
    if fitting:
        return fitting
    free = " and ".join(f"{place.free_bytes / 2**30:.1f} GiB on {place.name}" for place in places)
    raise ServeError(
        f"the reference needs {2 * ROOM_FOR_ACTIVATIONS * parameters / 2**30:.1f} GiB; free memory: {free}",
        "free memory, give a larger --device, or run the check on a larger machine; the artifact is not affected",
    )


class Reference:
    """The artifact in transformers with the rounding of an engine, in float32 if it fits.

    placement: its device and dtype; None takes the first of `reference_placements`.

    Weights are dequantized; activations are rounded as the schemes require, keys and values as the KV cache stores
    them. gpu: whether the engine runs on a GPU, whose rounding of a float8 cache differs from a CPU's; None: as the
    device of the reference. tensor_parallel: number of the engine's GPUs that share every linear.
    """

    def __init__(
        self,
        artifact: Artifact,
        processor: Any,
        device: Device,
        gpu: bool | None = None,
        placement: tuple[Device, torch.dtype] | None = None,
        tensor_parallel: int = 1,
    ) -> None:
        self._family = artifact.family
        self._placeholder = artifact.family.image_token(artifact.checkpoint.config)
        device, self._high = placement or reference_placements(artifact, device)[0]
        self._device = device.torch_device
        self._processor = processor
        self._low = getattr(torch, engine_dtype(artifact.checkpoint.config, not device.is_cuda))
        config = artifact.source_config()
        self._model = load_whole(self._family, config, artifact.names(), artifact.read, self._device, self._high)
        rounded = artifact.rounded()
        rounded = replace(rounded, parts=input_parts(rounded.linears, tensor_parallel))
        round_as_served(self._model, rounded, device.is_cuda if gpu is None else gpu)

    def prompt_problems(self, samples: Sequence[Sample], replies: Sequence[Reply]) -> list[str]:
        """First sample whose prompt tokens differ in the engine: another chat template or number of image tokens."""
        for sample, reply in zip(samples, replies, strict=True):
            expected = prompt_inputs(self._processor, self._family, sample)["input_ids"][0].tolist()
            if expected != list(reply.prompt):
                text = f"{len(reply.prompt)} tokens in the engine, {len(expected)} in the reference"
                start = f"they begin with {reply.prompt[:3]} and {expected[:3]}"
                return [f"{sample.identity}: the prompts differ: {text}; {start}"]
        return []

    def compare(self, samples: Sequence[Sample], replies: Sequence[Reply]) -> EngineComparison:
        """Compare the engine with the reference, and the reference in 16 bits with itself, on the same tokens."""
        replies = [before_placeholder(reply, self._placeholder) for reply in replies]
        pairs = list(zip(samples, replies, strict=True))
        high = [self.log_probabilities(sample, reply) for sample, reply in pairs]
        listed = [listed_tokens(reply) for reply in replies]
        engine = [abs(t[2] - float(high[i][t[:2]])) for i, tokens in enumerate(listed) for t in tokens]
        self._model.to(self._low)
        rounded = []
        for turn in range(PASSES):
            low = [self.log_probabilities(sample, reply, noise=turn) for sample, reply in pairs]
            rounded += [abs(float(low[i][t[:2]] - high[i][t[:2]])) for i, tokens in enumerate(listed) for t in tokens]
        self._model.to(self._high)  # float32 weights stay rounded to 16 bits, as in the engine
        return EngineComparison(distance_of(engine), distance_of(rounded))

    def distance(self, samples: Sequence[Sample], replies: Sequence[Reply]) -> Distance:
        """Compare the engine with the reference only, without the floor."""
        differences = []
        for sample, whole in zip(samples, replies, strict=True):
            reply = before_placeholder(whole, self._placeholder)
            expected = self.log_probabilities(sample, reply)
            differences += [abs(t[2] - float(expected[t[:2]])) for t in listed_tokens(reply)]
        return distance_of(differences)

    @torch.inference_mode()
    def log_probabilities(self, sample: Sample, reply: Reply, noise: int = 0) -> Tensor:
        """Natural log-probabilities at every token of the engine's answer, f32 `[tokens of the answer, vocabulary]`.

        noise: 0 leaves the picture unchanged; other values are seeds of noise of up to a quarter of a 16-bit step.
        """
        inputs = prompt_inputs(self._processor, self._family, sample)
        if noise:
            draw = torch.rand(inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(noise))
            step = torch.finfo(self._low).eps / 4
            inputs["pixel_values"] = inputs["pixel_values"] * (1 + step * (2 * draw - 1))
        start = inputs["input_ids"].shape[1]
        inputs = continued(inputs, reply.tokens[:-1])
        dtype = next(self._model.parameters()).dtype
        moved = {k: v.to(self._device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}
        logits: Tensor = self._model(**moved, use_cache=False).logits[0, start - 1 :]
        return logits.float().log_softmax(-1).cpu()


def before_placeholder(reply: Reply, placeholder: int | None) -> Reply:
    """The reply up to the first placeholder of a picture, after which transformers expects another picture."""
    if placeholder not in reply.tokens:
        return reply
    end = reply.tokens.index(placeholder) + 1
    return replace(reply, tokens=reply.tokens[:end], logprobs=reply.logprobs[:end], top=reply.top[:end])


def listed_tokens(reply: Reply) -> list[tuple[int, int, float]]:
    """(step, token, log-probability) of every token that the engine lists, including unlikely tokens.

    Where an answer is certain, its likely tokens carry no information; the floor uses the same tokens.
    """
    steps = enumerate(zip(reply.tokens, reply.logprobs, reply.top, strict=True))
    return [(i, token, p) for i, (answer, logprob, top) in steps for token, p in {**top, answer: logprob}.items()]


def distance_of(differences: Sequence[float]) -> Distance:
    """Largest and mean difference; NaN, which passes no bound, for an empty list."""
    count = len(differences)
    if not count:
        return Distance(math.nan, math.nan, 0)
    return Distance(max(differences), math.fsum(differences) / count, count)
