"""The next steps of every command but an export: shell text to paste, most useful first."""

import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.commands.next_steps import command, has_vllm, short_path
from exporter.model.embedded.example import PICTURE, QUESTION

if TYPE_CHECKING:
    from exporter.model.families import Family
    from exporter.study.run import Outcome

HUB = "hub:"


def given(context: click.Context, without: Collection[str] = ()) -> list[str]:
    """Words of this command as the user gave it, without some of its parameters."""
    words: list[str] = []
    for param in sorted(context.command.params, key=lambda param: isinstance(param, click.Option)):
        source = context.get_parameter_source(str(param.name))
        value = context.params.get(str(param.name))
        if param.name in without or value is None or source is not click.core.ParameterSource.COMMANDLINE:
            continue
        values = _written(value)
        if isinstance(param, click.Option) and param.is_flag:
            words.append(param.opts[0])
        elif isinstance(param, click.Option):
            words += [word for text in values for word in (param.opts[0], text)]
        else:
            words += values
    return [str(context.info_name), *words]


def _written(value: Any) -> list[str]:
    """Texts that an option or argument takes for a parsed value: `language=3` of pairs, `128,row` of a group size."""
    if isinstance(value, Mapping):
        return [f"{name}={text}" for name, part in value.items() for text in _written(part)]
    if not isinstance(value, tuple):
        return [str(value)]
    texts = [str(part) for part in value]
    return [",".join(texts)] if any(isinstance(part, int) for part in value) else texts


def after_plan(context: click.Context) -> list[str]:
    """The export of what `mmq plan` or `mmq export --dry-run` showed."""
    return [command("export", *given(context, without=("every_tensor", "serve_on", "dry_run"))[1:])]


def with_data(data: Sequence[str]) -> list[str]:
    """`--data` for each source."""
    return [word for source in data for word in ("--data", source)]


def after_verify(artifact: Path) -> list[str]:
    """Measure the artifact; or, if it is measured, use it."""
    measured, family = _state(artifact)
    return _uses(artifact, family) if measured else [command("evaluate", artifact)]


def after_evaluate(artifact: Path, data: Sequence[str]) -> list[str]:
    """Look at the report, then compare the answers in vLLM, or ask where there is no vLLM."""
    _, family = _state(artifact)
    check = [command("check", artifact)] if has_vllm() and not family.unserved else []
    return [command("report", artifact, *with_data(data)), *(check or _uses(artifact, family))]


def after_baseline(artifact: Path, data: Sequence[str]) -> list[str]:
    """Serve the artifact, then compare it with the stored answers of the full-precision model."""
    served = command("serve", artifact)
    return [served, command("evaluate", artifact, "--server", "http://127.0.0.1:8000", *with_data(data))]


def after_check(artifact: Path, vllm: str | None) -> list[str]:
    """Measure the speed, then look at the report."""
    return [command("bench", artifact, *(("--vllm", vllm) if vllm else ())), command("report", artifact)]


def after_diff(places: Sequence[str]) -> list[str]:
    """For each artifact: measure it, look at its report, or verify it on the hub."""

    def step(place: str) -> str:
        if place.startswith(HUB):
            return command("verify", place)
        return command("report" if _state(Path(place))[0] else "evaluate", place)

    return list(dict.fromkeys(map(step, places)))


def after_ask(context: click.Context, model: str, compare: bool, server: str | None) -> list[str]:
    """Compare with the source, then measure; for a model that is no artifact, plan its export."""
    from exporter.artifact.manifest import MANIFEST

    artifact = Path(model)
    if not (artifact / MANIFEST).is_file():
        from exporter.pipeline.data_coverage import first_recipe

        recipe = first_recipe(model)
        return [command("plan", "--recipe", recipe, "--model", model)] if recipe else []
    again = [] if compare or server else [command(*given(context), "--compare")]
    return [*again, command("report" if _state(artifact)[0] else "evaluate", artifact)]


def after_study(outcome: "Outcome", options: dict[str, Any]) -> list[str]:
    """Look at the plots, then choose bits within half of the range of sizes that the study measured."""
    from exporter.study.prepare import default_folder

    folder = options["out"] or default_folder(options["model"])
    plots, sizes = command("study", "plots", folder), [setting.bytes for setting in outcome.settings]
    if len(set(sizes)) < 2:
        return [plots]
    middle = (min(sizes) + max(sizes)) // 2
    size = f"{middle // 10**3}kB" if middle < 10**7 else f"{middle // 10**6}MB"
    words = ["--model", options["model"], "--max-size", size, *with_data(options["data"])]
    words += [word for task in options["tasks"] for word in ("--task", task)]
    words += ["--revision", options["revision"]] if options["revision"] else []
    words += ["--folder", str(folder)] if options["out"] else []
    return [plots, command("allocate", *words)]


def open_page(page: Path) -> str:
    """Shell text that opens an HTML page in the user's browser."""
    python = shlex.quote(short_path(Path(sys.executable)))
    return f"{python} -m webbrowser -t {shlex.quote(page.resolve().as_uri())}"


def _state(artifact: Path) -> "tuple[bool, Family]":
    """Whether the artifact has a report of its scores, and its family."""
    from exporter.artifact.manifest import read_manifest
    from exporter.evaluation.report_file import read_report
    from exporter.model.families import FAMILIES

    return read_report(artifact)[0] is not None, FAMILIES[read_manifest(artifact).family]


def _uses(artifact: Path, family: "Family") -> list[str]:
    """A question, if the model answers some, and the server, if vLLM is installed and serves the family."""
    question = [command("ask", artifact, PICTURE, QUESTION)] if "vqa" in family.tasks else []
    return question + ([command("serve", artifact)] if has_vllm() and not family.unserved else [])
