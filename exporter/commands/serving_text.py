"""Texts of `mmq serve` and `mmq check`: example requests to copy, and the result of a check."""

import json
import shlex

from exporter.inference.openai_client import message, png
from exporter.serving.check import CheckResult
from exporter.serving.launch import Launch

QUESTION = "What color is the picture?"


def red_square() -> bytes:
    """A red picture of 64 x 64 pixels, encoded as PNG."""
    from PIL import Image

    return png(Image.new("RGB", (64, 64), (255, 0, 0)))


def shell_line(launch: Launch) -> str:
    """A curl command that sends the server a question about a picture."""
    body = json.dumps(
        {"model": launch.model, "messages": [message(QUESTION, red_square())], "max_tokens": 16, "temperature": 0}
    )
    url = f"{launch.url}/v1/chat/completions"
    return f"curl -s {url} -H 'Content-Type: application/json' -d {shlex.quote(body)}"


def python_line(launch: Launch) -> str:
    """The request of `shell_line` with the openai package, as one shell command."""
    code = (
        "from openai import OpenAI; "
        f"client = OpenAI(base_url={launch.url + '/v1'!r}, api_key='none'); "
        f"answer = client.chat.completions.create(model={launch.model!r}, max_tokens=16, temperature=0, "
        f"messages={[message(QUESTION, red_square())]!r}); "
        "print(answer.choices[0].message.content)"
    )
    return f"python -c {shlex.quote(code)}"


def checked_page(result: CheckResult) -> str:
    """The result of a check as text."""
    lines = [f"vllm {result.engine}, ready after {result.startup_seconds:.0f} s, answered {result.questions} questions"]
    if result.compared:
        distance, floor = result.compared.distance, result.compared.floor
        allowed_largest, allowed_mean = result.compared.allowed(result.bound)
        lines += [
            f"log-probabilities against the dequantized reference, {distance.tokens} tokens: "
            f"mean difference {distance.mean:.4f} (allowed {allowed_mean:.4f}), "
            f"largest {distance.largest:.4f} (allowed {allowed_largest:.4f})",
            f"16-bit rounding of the reference alone: mean {floor.mean:.4f}, largest {floor.largest:.4f}",
        ]
    if result.control:
        control, restored = result.control, result.control.restored
        lines.append(
            f"control, scales of {control.component} doubled: mean {control.moved.mean:.4f}, "
            f"largest {control.moved.largest:.4f}; against a reference with the same scales: "
            f"mean {restored.distance.mean:.4f} (16-bit rounding alone {restored.floor.mean:.4f})"
        )
    lines += [
        f"{count} linears run as {name} according to vLLM's log" for name, count in sorted(result.schemes.items())
    ]
    lines += [f"kernel {kernel}" for kernel in result.kernels]
    return "\n".join([*lines, "passed" if result.passed else "FAILED"])
