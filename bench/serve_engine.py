"""The engines of `bench/serve.py`, in a process and an environment of their own: needs vLLM and nothing of mmq.

python bench/serve_engine.py SPEC.json      prints "ready" once vLLM is imported, and starts when a line comes in
"""

import asyncio
import json
import os
import statistics
import sys
import time
import traceback
from itertools import count
from pathlib import Path
from typing import Any

FILLER = 10  # a token id that every vocabulary here has


class Load:
    """Requests with one image each, closed loop: every client asks again as soon as it has its answer."""

    def __init__(self, engine: Any, spec: dict[str, Any]) -> None:
        import numpy as np

        draw, side = np.random.default_rng(0), spec["side"]
        shapes = range(spec["images"])
        self._images = [draw.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in shapes]
        self._engine, self._spec, self._next = engine, spec, count()

    async def ask(self, tokens: int) -> tuple[float, float, float]:
        """Times of sending, of the first token and of the last."""
        from PIL import Image
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        number = next(self._next)
        ids = [1, self._spec["image_token"]] + [FILLER + number % 50] * self._spec["text_tokens"]
        image = Image.fromarray(self._images[number % len(self._images)])
        settings = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        settings.output_kind = RequestOutputKind.DELTA
        sent, first = time.perf_counter(), 0.0
        prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": image}}
        async for _ in self._engine.generate(prompt, settings, str(number)):
            first = first or time.perf_counter()
        return sent, first, time.perf_counter()

    async def clients(self, number: int, rounds: int, tokens: int) -> dict[str, float]:
        """Rates of `number` clients that ask `rounds` times each."""

        async def client() -> list[tuple[float, float, float]]:
            return [await self.ask(tokens) for _ in range(rounds)]

        begun = time.perf_counter()
        times = [t for found in await asyncio.gather(*(client() for _ in range(number))) for t in found]
        seconds = time.perf_counter() - begun
        waits = sorted(first - sent for sent, first, _ in times)
        return {
            "tokens_per_s": len(times) * tokens / seconds,
            "images_per_s": len(times) / seconds,
            "first_token_ms": 1000 * statistics.median(waits),
        }


async def measure(load: Load, spec: dict[str, Any]) -> dict[str, Any]:
    """Everything that is reported of one engine."""
    tokens, rounds = spec["tokens"], spec["rounds"]
    for number in spec["clients"]:
        await load.clients(number, 1, 8)  # warm: kernels are compiled or chosen at their first use
    first = [await load.ask(1) for _ in range(3 * rounds)]
    alone = [await load.ask(tokens + 1) for _ in range(rounds)]
    found: dict[str, Any] = {
        "first_token_ms": 1000 * statistics.median(end - sent for sent, _, end in first),
        "decode_ms": 1000 * statistics.median((end - one) / tokens for _, one, end in alone),
    }
    for number in spec["clients"]:
        found[f"clients_{number}"] = await load.clients(number, rounds, tokens)
        found[f"prefill_{number}"] = await load.clients(number, rounds, 1)
    return found


def bandwidth(gigabytes: int = 4) -> float | None:
    """Bytes a second that a copy on the card reads and writes, None without a card."""
    import torch

    if not torch.cuda.is_available():
        return None
    source = torch.empty(gigabytes * 2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        best = max(best, 2 * source.numel() / begin.elapsed_time(end) * 1000)
    return best


async def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Start the engine, measure, stop it."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    begun = time.perf_counter()
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**spec["engine"]))
    started = time.perf_counter() - begun
    try:
        found = await measure(Load(engine, spec), spec)
    finally:
        engine.shutdown()
    return found | {"startup_s": started, "measured_s": time.perf_counter() - begun - started}


def one(path: Path) -> None:
    """One variant; its result or its error becomes a file."""
    spec = json.loads(path.read_text())
    out, environment = Path(spec["out"]), dict(os.environ)
    os.environ.update(spec["environment"])  # the engine's process gets them
    print(f"=== {path.parent.name}", flush=True)
    try:
        result: dict[str, Any] = asyncio.run(run(spec))
    except Exception as error:  # noqa: BLE001 - the next variant goes on; this one is told
        result = {"error": " ".join(f"{type(error).__name__}: {error}".split())[-300:]}
        traceback.print_exc()
    for name in spec["environment"]:
        os.environ.pop(name, None)
    os.environ.update(environment)
    half = out.with_suffix(".half")
    half.write_text(json.dumps(result, indent=1))
    half.rename(out)


def main() -> None:
    """Command line."""
    if sys.argv[1] == "--bandwidth":
        Path(sys.argv[2]).write_text(json.dumps({"bandwidth": bandwidth()}))
        return
    begun = time.perf_counter()
    # A fork of a process whose libraries have started threads hung on a GPU machine; a new process imports again.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    import vllm.v1.engine.async_llm  # noqa: F401

    print(f"=== imported in {time.perf_counter() - begun:.0f} s", flush=True)
    for path in sys.argv[1:]:
        one(Path(path))


if __name__ == "__main__":
    main()
