"""Load test of `mmq serve`: many clients with good, broken and huge pictures, and a restart of the server meanwhile.

    python -m bench.server_load ARTIFACT [--clients 64] [--requests 20] [--vllm PROGRAM] [--out FILE.json]

First one client asks every question about a good picture alone; its answers are the reference. Then each client sends
its requests: of ten, seven with a good picture, one that cannot be decoded, one of 8,000 x 8,000 pixels (`huge`) and
one of 20,000 x 20,000 (`bomb`, which Pillow refuses). When a third of all requests are done, the server is stopped
(SIGTERM) and started again on the same port; clients repeat a request without a response after a second. Prints the
figures and writes them as JSON.
"""

import argparse
import base64
import io
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from exporter.data import places, samples_from
from exporter.model.families import FAMILIES
from exporter.model.inference.openai_client import RequestFailed, png, request_json
from exporter.serving.memory_watch import MemoryWatch
from exporter.serving.vllm_engine import free_port

KINDS = ("good",) * 7 + ("broken", "huge", "bomb")
SIDES = {"huge": 8_000, "bomb": 20_000}  # pixels
QUESTIONS = 32
PATIENCE = 900.0  # seconds until a request that gets no response counts as lost


@dataclass
class Tally:
    """What clients saw. statuses: kind -> HTTP status, or `lost` -> count. seconds: kind -> of answered requests."""

    statuses: dict[str, Counter[str]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    right: int = 0
    repeated: int = 0
    done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, status: str, seconds: float, repeated: int, right: bool) -> None:
        """Count one finished request."""
        with self.lock:
            self.statuses.setdefault(kind, Counter())[status] += 1
            self.seconds.setdefault(kind, []).append(seconds)
            self.right += right
            self.repeated += repeated
            self.done += 1


class Served:
    """`mmq serve` as a child process with a process group of its own."""

    def __init__(self, artifact: Path, port: int, vllm: str | None, log: Path) -> None:
        command = [sys.executable, "-m", "exporter", "serve", str(artifact), "--port", str(port), "--json"]
        command += ["--vllm", vllm] if vllm else []
        started = time.monotonic()
        self._log = log.open("ab")
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._log, text=True, start_new_session=True
        )
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"mmq serve ended with {self.process.wait()}; its log is {log}")
        self.start_seconds = time.monotonic() - started
        state = json.loads(line)
        self.model, self.group = str(state["model"]), os.getpgid(int(state["pid"]))

    def stop(self) -> float:
        """Stop the server as an administrator does; returns the seconds that it takes."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(120)
        self._log.close()
        return time.monotonic() - started


def bodies(model: str) -> dict[str, list[dict[str, Any]]]:
    """Request bodies by kind."""
    samples = samples_from(places("demo"), "vqa", "test", QUESTIONS, 0)
    family = FAMILIES["llava"]

    def body(picture: bytes, text: str) -> dict[str, Any]:
        url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        return {"model": model, "messages": messages, "max_tokens": 10, "temperature": 0.0}

    texts = [family.text(sample.question) for sample in samples]
    good = [png(sample.image()) for sample in samples]
    broken = [good[0][:200], b"no picture", b"", good[1][:-100]]
    return {
        "good": [body(picture, text) for picture, text in zip(good, texts, strict=True)],
        "broken": [body(picture, texts[0]) for picture in broken],
        **{kind: [body(_gray(side), texts[0])] for kind, side in SIDES.items()},
    }


def _gray(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (side, side), 90).save(buffer, "PNG")
    return buffer.getvalue()


def answered(url: str, body: dict[str, Any]) -> tuple[str, str, int]:
    """Status, answer and number of repetitions of one request; without a response it is repeated after a second."""
    repeated, deadline = 0, time.monotonic() + PATIENCE
    while True:
        try:
            reply = request_json(url, body, PATIENCE)
            return "200", str(reply["choices"][0]["message"]["content"]), repeated
        except RequestFailed as failed:
            if failed.status is not None and failed.status != 503:
                return str(failed.status), failed.message, repeated
            if time.monotonic() > deadline:
                return "lost", failed.message, repeated
        repeated += 1
        time.sleep(1)


def run_clients(
    url: str, requests: dict[str, list[dict[str, Any]]], reference: list[str], clients: int, each: int, tally: Tally
) -> None:
    """All clients at once, each with `each` requests."""

    def client(number: int) -> None:
        for i in range(each):
            kind = KINDS[(number + i) % len(KINDS)]
            choice = (number * each + i) % len(requests[kind])
            started = time.monotonic()
            status, text, repeated = answered(url, requests[kind][choice])
            right = kind == "good" and status == "200" and text == reference[choice]
            tally.add(kind, status, time.monotonic() - started, repeated, right)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))


def when(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    while not condition():
        time.sleep(0.2)


def main() -> None:
    """Run the test and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=20, help="per client")
    parser.add_argument("--vllm")
    parser.add_argument("--out", type=Path, default=Path("build/server_load.json"))
    parser.add_argument("--gpu", action="store_true", help="also read the memory of the GPU")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    log, port = options.out.with_suffix(".log"), free_port()
    log.unlink(missing_ok=True)
    served = Served(options.artifact, port, options.vllm, log)
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    requests, tally, total = bodies(served.model), Tally(), options.clients * options.requests
    reference = [answered(url, body)[1] for body in requests["good"]]
    figures: dict[str, Any] = {"start_seconds": served.start_seconds}
    with MemoryWatch(served.group, options.gpu) as first:
        began = time.monotonic()
        load = threading.Thread(
            target=run_clients, args=(url, requests, reference, options.clients, options.requests, tally)
        )
        load.start()
        when(lambda: tally.done >= total // 3 or not load.is_alive())
        figures["stop_seconds"] = served.stop()
    before = tally.done
    served = Served(options.artifact, port, options.vllm, log)
    with MemoryWatch(served.group, options.gpu) as second:
        load.join()
        figures["seconds"] = time.monotonic() - began
    after = answered(url, requests["good"][0])
    figures |= {
        "clients": options.clients,
        "requests": tally.done,
        "statuses": {kind: dict(counts) for kind, counts in sorted(tally.statuses.items())},
        "answers_as_alone": tally.right,
        "repeated": tally.repeated,
        "before_restart": before,
        "restart_seconds": served.start_seconds,
        "latency": {kind: quantiles(seconds) for kind, seconds in sorted(tally.seconds.items())},
        "host_bytes": [first.host, second.host],
        "gpu_bytes": [first.gpu, second.gpu],
        "right_after": after[:2] == ("200", reference[0]),
        "log_tracebacks": log.read_text(errors="replace").count("Traceback"),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
    }
    served.stop()
    options.out.write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures, indent=1))


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median, 95th percentile and largest value, in seconds."""
    ordered = sorted(seconds)
    return {
        "median": round(statistics.median(ordered), 3),
        "p95": round(ordered[int(0.95 * (len(ordered) - 1))], 3),
        "max": round(ordered[-1], 3),
    }


if __name__ == "__main__":
    main()
