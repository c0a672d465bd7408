"""One engine of `bench/serve.py`, in its own process and environment; needs vLLM but not mmq.

    python bench/serve_engine.py SPEC.json
    python bench/serve_engine.py --bandwidth OUT.json

vLLM's engine process imports for half a minute before it uses the GPU. It then waits for a file lock that
`bench/serve.py` holds, so that variants import in parallel and are measured one at a time. With `--together`, it waits
after the engine has started, compiled and captured its graphs.
"""

import asyncio
import fcntl
import gzip
import json
import os
import statistics
import sys
import time
import traceback
from collections import Counter
from itertools import count
from multiprocessing import current_process
from pathlib import Path
from typing import Any, NamedTuple

FILLER = 10  # a token id in every vocabulary
TURN = "MMQ_BENCH_TURN"  # environment variable with the path of the lock file
READY = "=== ready, waiting"


class Answer(NamedTuple):
    """When a request was sent, and when how many tokens arrived."""

    sent: float
    arrived: list[tuple[float, int]]

    @property
    def first(self) -> float:
        """When the first token arrived."""
        return self.arrived[0][0]

    @property
    def last(self) -> float:
        """When the last token arrived."""
        return self.arrived[-1][0]


class Load:
    """Requests with one image each, in a closed loop: a client sends its next request after its answer."""

    def __init__(self, engine: Any, spec: dict[str, Any]) -> None:
        import numpy as np

        draw, side = np.random.default_rng(0), spec["side"]
        shapes = range(spec["images"])
        self._images = [draw.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in shapes]
        self._engine, self._spec, self._next = engine, spec, count()

    async def request(self, tokens: int) -> Answer:
        """Send one request for `tokens` tokens."""
        from PIL import Image
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        number = next(self._next)
        ids = [1, self._spec["image_token"]] + [FILLER + number % 50] * self._spec["text_tokens"]
        image = Image.fromarray(self._images[number % len(self._images)])
        settings = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        settings.output_kind = RequestOutputKind.DELTA
        answer = Answer(time.perf_counter(), [])
        prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": image}}
        async for output in self._engine.generate(prompt, settings, str(number)):
            answer.arrived.append((time.perf_counter(), len(output.outputs[0].token_ids)))
        return answer

    async def clients(self, number: int, rounds: int, tokens: int) -> dict[str, float]:
        """Rates of `number` clients that send `rounds` requests each."""

        async def client() -> list[Answer]:
            return [await self.request(tokens) for _ in range(rounds)]

        start = time.perf_counter()
        answers = [a for replies in await asyncio.gather(*(client() for _ in range(number))) for a in replies]
        seconds = time.perf_counter() - start
        return {
            "tokens_per_s": len(answers) * tokens / seconds,
            "images_per_s": len(answers) / seconds,
            "first_token_ms": 1000 * statistics.median(a.first - a.sent for a in answers),
        }

    async def decoding(self, number: int, tokens: int) -> float | None:
        """Tokens per second while all `number` clients decode and no prompt is processed; None if they never do."""
        answers = await asyncio.gather(*(self.request(tokens) for _ in range(number)))
        begin, end = max(a.first for a in answers), min(a.last for a in answers)
        came = sum(few for a in answers for when, few in a.arrived if begin < when <= end)
        return came / (end - begin) if end > begin else None


async def measure(load: Load, spec: dict[str, Any]) -> dict[str, Any]:
    """All figures of one engine."""
    tokens, rounds = spec["tokens"], spec["rounds"]
    for number in spec["clients"]:
        await load.clients(number, 1, 8)  # warm-up: kernels are compiled or selected at their first use
    first = [await load.request(1) for _ in range(3 * rounds)]
    alone = [await load.request(tokens + 1) for _ in range(rounds)]
    figures: dict[str, Any] = {
        "first_token_ms": 1000 * statistics.median(a.last - a.sent for a in first),
        "decode_ms": 1000 * statistics.median((a.last - a.first) / tokens for a in alone),
    }
    for number in spec["clients"]:
        figures[f"clients_{number}"] = await load.clients(number, rounds, tokens)
        figures[f"prefill_{number}"] = await load.clients(number, rounds, 1)
        figures[f"decoding_{number}"] = await load.decoding(number, tokens)
    return figures


def bandwidth(gigabytes: int = 4) -> float | None:
    """Bytes per second that a copy on the GPU reads and writes, None without a GPU."""
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


async def trace(load: Load, engine: Any, spec: dict[str, Any], clients: int, decoding: bool) -> list[dict[str, Any]]:
    """Kernels on the GPU while `clients` clients decode after all prompts, or while their prompts are processed."""
    folder = Path(spec["engine"]["profiler_config"]["torch_profiler_dir"])
    before = set(folder.rglob("*.json.gz"))
    if decoding:
        requests = asyncio.gather(*(load.request(spec["tokens"]) for _ in range(clients)))
        await asyncio.sleep(spec["settle_s"][str(clients)])
        await engine.start_profile()
        await asyncio.sleep(0.25)
        await engine.stop_profile()
        await requests
    else:
        await engine.start_profile()
        await load.clients(clients, 1, 1)
        await engine.stop_profile()
    return [
        event
        for file in set(folder.rglob("*.json.gz")) - before
        for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]


def by_kernel(events: list[dict[str, Any]], blocks: int) -> dict[str, Any]:
    """Milliseconds by kernel and step; the number of steps is that of cache writes divided by blocks."""
    writes = Counter(e["name"] for e in events if "reshape_and_cache" in e["name"])
    steps = max(writes.values(), default=0) / blocks
    if not steps:
        return {}
    total: Counter[str] = Counter()
    for event in events:
        total[event["name"][:110]] += event["dur"] / 1000 / steps
    span = (max(e["ts"] + e["dur"] for e in events) - min(e["ts"] for e in events)) / 1000 / steps
    number = Counter(e["name"][:110] for e in events)
    rows = {name: [round(ms, 4), round(number[name] / steps, 1)] for name, ms in total.most_common(16)}
    return {
        "steps": steps,
        "step_ms": span,
        "busy_ms": sum(total.values()),
        "launches": len(events) / steps,
        "kernels": rows,
    }


async def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Start the engine, measure, stop it."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    start = time.perf_counter()
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**spec["engine"]))
    startup = time.perf_counter() - start
    if "turn" in spec:
        wait_for(spec["turn"])
    start = time.perf_counter()
    try:
        load = Load(engine, spec)
        figures = await measure(load, spec)
        if "profiler_config" in spec["engine"]:
            few, many = spec["clients"][0], spec["clients"][-1]
            for name, number, decoding in (("kernels", few, True), ("kernels", many, True), ("prompts", many, False)):
                events = await trace(load, engine, spec, number, decoding)
                figures[f"{name}_{number}"] = by_kernel(events, spec["blocks"])
    finally:
        engine.shutdown()
    return figures | {"startup_s": startup, "measured_s": time.perf_counter() - start}


def wait_for(path: str) -> None:
    """Print READY, then wait until the lock on a file is released."""
    turn = os.open(path, os.O_RDWR)
    print(READY, flush=True)
    fcntl.flock(turn, fcntl.LOCK_EX)
    os.close(turn)


def import_and_wait() -> None:
    """In the engine's process: do the long imports, then wait."""
    import vllm.v1.engine.core  # noqa: F401

    wait_for(os.environ.pop(TURN))  # so that workers of this process do not wait


def main() -> None:
    """Command line."""
    if sys.argv[1] == "--bandwidth":
        Path(sys.argv[2]).write_text(json.dumps({"bandwidth": bandwidth()}))
        return
    # A fork of a process whose libraries have started threads hung on a GPU machine; a new process imports again.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    spec = json.loads(Path(sys.argv[1]).read_text())
    out = Path(spec["out"])
    try:
        result: dict[str, Any] = asyncio.run(run(spec))
    except Exception as error:  # noqa: BLE001 - the table has the error, and the next variant runs
        result = {"error": " ".join(f"{type(error).__name__}: {error}".split())[-300:]}
        traceback.print_exc()
    half = out.with_suffix(".half")
    half.write_text(json.dumps(result, indent=1))
    half.rename(out)


if __name__ == "__mp_main__" and TURN in os.environ and "Coordinator" not in current_process().name:
    import_and_wait()
if __name__ == "__main__":
    main()
