"""Texts of `mmq serve` and `mmq check`: example requests to copy, and the result of a check."""

import json
import shlex
import shutil
from pathlib import Path

from exporter.commands.next_steps import command
from exporter.evaluation.speed_record import SpeedRecord
from exporter.evaluation.speed_table import conditions, figures_rows
from exporter.model.embedded.example import PICTURE, QUESTION
from exporter.model.families import Family
from exporter.serving.check import CheckResult
from exporter.serving.launch import Launch

PLACE = "@PICTURE@"


def example_lines(launch: Launch, artifact: str, family: Family) -> dict[str, str]:
    """Shell commands that ask the server about the example picture: `mmq ask`, curl, and Python with openai."""
    return {
        "ask": command("ask", artifact, PICTURE, QUESTION, "--server", launch.url),
        "curl": shell_line(launch, family),
        "python": python_line(launch, family),
    }


def example(family: Family) -> tuple[str, int]:
    """Text and longest answer of the example requests: a question in the model's prompt, or its caption prompt."""
    task = "vqa" if "vqa" in family.max_new_tokens else "captioning"
    return family.text(QUESTION if task == "vqa" else None), family.max_new_tokens.get(task, 16)


def _messages(family: Family, url: str) -> list[dict[str, object]]:
    """A user message with a picture's URL, then the example's text."""
    picture = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": example(family)[0]}]}]


def shell_line(launch: Launch, family: Family) -> str:
    """A curl command that sends the example about the example picture, which the shell encodes."""
    messages, longest = _messages(family, f"data:image/png;base64,{PLACE}"), example(family)[1]
    body = json.dumps({"model": launch.model, "messages": messages, "max_tokens": longest, "temperature": 0})
    url = f"{launch.url}/v1/chat/completions"
    encoded = f"'\"$(base64 < {shlex.quote(str(PICTURE))} | tr -d '\\n')\"'"
    return f"curl -s {url} -H 'Content-Type: application/json' -d {shlex.quote(body).replace(PLACE, encoded)}"


def python_line(launch: Launch, family: Family) -> str:
    """The request of `shell_line` with the openai package, as one shell command."""
    messages = repr(_messages(family, PLACE)).replace(repr(PLACE), "url")
    code = (
        "import base64; from openai import OpenAI; "
        f"url = 'data:image/png;base64,' + base64.b64encode(open({str(PICTURE)!r}, 'rb').read()).decode(); "
        f"client = OpenAI(base_url={launch.url + '/v1'!r}, api_key='none'); "
        f"answer = client.chat.completions.create(model={launch.model!r}, max_tokens={example(family)[1]}, "
        f"temperature=0, messages={messages}); "
        "print(answer.choices[0].message.content)"
    )
    return f"{_interpreter(launch)} -c {shlex.quote(code)}"


def _interpreter(launch: Launch) -> str:
    """Shell text of a Python that has the package openai, which vLLM needs: the one beside the program `vllm`."""
    program = Path(shutil.which(next(iter(launch.command), "")) or "nowhere")
    beside = program.with_name("python")
    return shlex.quote(str(beside)) if program.name == "vllm" and beside.is_file() else "python"


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


def speed_page(record: SpeedRecord) -> str:
    """The result of `mmq bench` as a table."""
    rows = [("", "artifact", "source", ""), *figures_rows(record.artifact, record.source)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"{row[0]:<{widths[0]}}  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return "\n".join([conditions(record), *(line.rstrip() for line in lines)])
