"""Speed and memory of one model in vLLM: time until it answers, first token, tokens per second, peak memory."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.data.tasks.sample import Sample
from exporter.evaluation.speed_record import WARM_UP, SpeedFigures
from exporter.events import Event, Listener
from exporter.model.families import Family
from exporter.model.inference.openai_client import message, png
from exporter.model.inference.predict import prompt_text
from exporter.serving.launch import START_SECONDS, Launch
from exporter.serving.memory_watch import MemoryWatch
from exporter.serving.request_load import run_load
from exporter.serving.vllm_engine import Engine

LOADED = re.compile(r"Model loading took ([\d.]+) GiB")  # in vLLM's log


@dataclass(frozen=True)
class SpeedSettings:
    """clients: numbers of clients to measure. tokens: of each answer. requests: of each client. wait: start limit."""

    clients: tuple[int, ...] = (1, 8)
    tokens: int = 64
    requests: int = 4
    wait: float = START_SECONDS


def request_bodies(model: str, family: Family, samples: Sequence[Sample], tokens: int) -> list[dict[str, Any]]:
    """One chat request per sample for exactly `tokens` greedy tokens."""
    fixed = {"model": model, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return [fixed | {"messages": [message(prompt_text(family, s), png(s.image()))]} for s in samples]


def serve_and_measure(
    command: Launch,
    family: Family,
    samples: Sequence[Sample],
    settings: SpeedSettings,
    gpu: bool,
    log: Path,
    on_event: Listener,
) -> SpeedFigures:
    """Start the server, measure it and stop it; ServeError when it does not start or answer."""
    bodies = request_bodies(command.model, family, samples, settings.tokens)
    url = f"{command.url}/v1/chat/completions"
    with Engine(command, log) as engine, MemoryWatch(engine.pid, gpu) as memory:
        load_seconds = engine.wait_healthy(settings.wait)
        rates: dict[str, float] = {}
        first_token = 0.0
        steps = sorted({1, *settings.clients})
        for done, clients in enumerate(steps):
            on_event(Event("ask", done, len(steps), f"{command.model}: {clients} client{'s' * (clients > 1)}"))
            run_load(url, bodies[::-1], clients, WARM_UP)  # other pictures than the first that are timed
            result = run_load(url, bodies, clients, settings.requests)
            first_token = result.first_token if clients == 1 else first_token
            rates[str(clients)] = round(result.rate, 2)
        on_event(Event("ask", len(steps), len(steps), command.model))
    return SpeedFigures(
        load_seconds=round(load_seconds, 2),
        first_token_seconds=round(first_token, 4),
        tokens_per_second=rates,
        peak_bytes=memory.host,
        gpu_bytes=memory.gpu,
        weight_bytes=loaded_bytes(log.read_text(encoding="utf-8", errors="replace")),
    )


def loaded_bytes(log: str) -> int | None:
    """Bytes of the weights on the device, from vLLM's log; None if the log lacks them or rounds them to zero."""
    sizes = [float(match) for match in LOADED.findall(log)]
    return int(sum(sizes) * 2**30) or None
