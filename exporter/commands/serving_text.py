"""What `mmq serve` and `mmq check` show: lines to copy, and what a check found."""

import json
import shlex

from exporter.inference.openai_client import message, png
from exporter.serving.check import CheckResult
from exporter.serving.launch import Launch

QUESTION = "What color is the picture?"


def red_square() -> bytes:
    """A small red picture as a PNG file."""
    from PIL import Image

    return png(Image.new("RGB", (64, 64), (255, 0, 0)))


def shell_line(launch: Launch) -> str:
    """A curl command that asks the server about a picture."""
    body = json.dumps(
        {"model": launch.model, "messages": [message(QUESTION, red_square())], "max_tokens": 16, "temperature": 0}
    )
    url = f"{launch.url}/v1/chat/completions"
    return f"curl -s {url} -H 'Content-Type: application/json' -d {shlex.quote(body)}"


def python_line(launch: Launch) -> str:
    """The same with the openai package, as a shell takes it."""
    code = (
        "from openai import OpenAI; "
        f"client = OpenAI(base_url={launch.url + '/v1'!r}, api_key='none'); "
        f"answer = client.chat.completions.create(model={launch.model!r}, max_tokens=16, temperature=0, "
        f"messages={[message(QUESTION, red_square())]!r}); "
        "print(answer.choices[0].message.content)"
    )
    return f"python -c {shlex.quote(code)}"


def checked_page(found: CheckResult) -> str:
    """What a check found, in a few lines."""
    lines = [f"vllm {found.engine}, ready after {found.startup_seconds:.0f} s, answered {found.questions} questions"]
    if found.compared:
        d, floor, allowed = found.compared.distance, found.compared.floor, found.compared.allowed(found.bound)
        lines += [
            f"log-probabilities beside the dequantized reference, {d.tokens} tokens: mean difference {d.mean:.4f} "
            f"(allowed {allowed[1]:.4f}), largest {d.largest:.4f} ({allowed[0]:.4f})",
            f"16-bit sums alone, the reference beside itself: mean {floor.mean:.4f}, largest {floor.largest:.4f}",
        ]
    if found.control:
        c, again = found.control, found.control.restored
        lines.append(
            f"control, scales of {c.component} doubled: mean {c.moved.mean:.4f}, largest {c.moved.largest:.4f}; beside "
            f"a reference with the same scales {again.distance.mean:.4f} (16-bit sums alone {again.floor.mean:.4f})"
        )
    lines += [f"{count} linears run as {name}, says vllm's log" for name, count in sorted(found.schemes.items())]
    lines += [f"kernel {kernel}" for kernel in found.kernels]
    return "\n".join([*lines, "passed" if found.passed else "FAILED"])
