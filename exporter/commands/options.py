"""Options that commands share, error messages with exit codes, and printing of results."""

import json
import os
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from exporter.commands.next_steps import named, program
from exporter.errors import GateFailed, GateNotResolved, Interrupted, MemoryShortage, MmqError
from exporter.model.embedded import MODELS

if TYPE_CHECKING:
    from exporter.events import Listener


class RecipeName(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """A built-in recipe or a file. Where it is missing, the message lists the recipes that fit --model."""

    name = "recipe"

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """The recipes that fit; click passes the context in newer versions only."""
        from exporter.planning.fitting_recipes import recipes_for

        model = (ctx or click.get_current_context()).params.get("model")
        return f"Recipes{f' for {model}' if model else ''}: {', '.join(recipes_for(model))}; " + (
            f"`{program()} recipes` describes them"
        )


recipe_option = click.option(
    "--recipe", required=True, type=RecipeName(), metavar="RECIPE", help="Built-in name or a YAML file."
)
model_option = click.option(
    "--model", metavar="MODEL", help=f"Hub id, local folder, {', '.join(MODELS)} [the recipe's model]."
)
revision_option = click.option("--revision", metavar="REV", help="Commit, tag or branch on the hub.")
adapter_option = click.option(
    "--adapter", metavar="DIR", help="LoRA adapter in peft's format, merged into the full-precision model."
)
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
calibration_device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="auto, cpu, cuda, cuda:N, or GPUs that share calibration: cuda:0,cuda:1.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="JSON on stdout, events as JSON lines on stderr.")
samples_option = click.option("--samples", type=click.IntRange(min=1), help="Calibration samples [the recipe's].")
eval_samples_option = click.option(
    "--eval-samples", type=click.IntRange(min=2), help="Test samples per task [the recipe's]."
)
eval_batch_option = click.option(
    "--eval-batch",
    type=click.IntRange(min=1),
    help="Largest batch of test samples; smaller if memory is short [the recipe's].",
)
skip_evaluation_option = click.option(
    "--skip-evaluation", is_flag=True, help="Do not measure tasks; the artifact is then unproven."
)
data_option = click.option(
    "--data",
    metavar="SOURCE",
    multiple=True,
    help="Folder with metadata.jsonl, or NAME:PATH (coco, flickr30k, vqav2, gqa, chartqa, docvqa, hub, llava); "
    "repeatable [the recipe's].",
)


class LazyChoice(click.Choice):  # type: ignore[type-arg]  # generic in newer versions only
    """A choice whose names are read on first use, because the module that defines them loads heavy libraries."""

    def __init__(self, names: Callable[[], Iterable[str]]) -> None:
        self.case_sensitive = True
        self._names = names

    @property
    def choices(self) -> tuple[str, ...]:  # type: ignore[override]
        """The allowed values."""
        return tuple(self._names())


artifact_argument = click.argument("artifact", type=click.Path(path_type=Path, exists=True, file_okay=False))


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator: print an MmqError as a message and exit with its code; MMQ_DEBUG=1 shows the traceback instead."""

    @wraps(command)
    def loading_torch(*args: Any, **kwargs: Any) -> None:
        _import_torch(bool(kwargs.get("as_json")))
        command(*args, **kwargs)

    return reports_errors_without_torch(loading_torch)


def reports_errors_without_torch(command: Callable[..., None]) -> Callable[..., None]:
    """`reports_errors` for a command that computes no tensor and imports torch only where it must."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            _require_sources(kwargs.get("data") or ())
            command(*args, **kwargs)
        except KeyboardInterrupt:  # click itself would exit with code 1
            fail(Interrupted("stopped"), bool(kwargs.get("as_json")))
        except Exception as error:
            problem = _message(error, str(kwargs.get("device", "cpu")))
            if problem is None or os.environ.get("MMQ_DEBUG"):
                raise
            fail(problem, bool(kwargs.get("as_json")))

    return run


def _require_sources(written: Iterable[str]) -> None:
    """SourceError, before any work, for a value of --data that names nothing."""
    for source in written:
        from exporter.data import existing_place

        existing_place(source)


def _import_torch(as_json: bool) -> None:
    """Import torch, which takes seconds, below a progress line."""
    if "torch" in sys.modules:
        return
    from exporter.commands.progress import ProgressDisplay

    with ProgressDisplay(as_json) as listen:
        load_torch(listen)


def load_torch(on_event: "Listener") -> None:
    """Import torch and report it as an event, unless it is imported already."""
    if "torch" in sys.modules:
        return
    from exporter.events import preparing

    with preparing(on_event, "loading torch"):
        import torch  # noqa: F401


def _message(error: Exception, device: str) -> MmqError | None:
    """The error to print: a MemoryShortage when memory ran out, an MmqError as it is; None for any other error."""
    if isinstance(error, MemoryShortage) or "torch" not in sys.modules:  # without torch only Python ran out of memory
        return error if isinstance(error, MmqError) else _bare_shortage(error)
    from exporter.device import choose
    from exporter.out_of_memory import shortage, shortage_behind

    cause = shortage_behind(error)
    if cause is None:
        return error if isinstance(error, MmqError) else None
    command = click.get_current_context().command_path
    return shortage(cause, command, choose(device), advice="use a smaller batch, fewer samples, or --device cpu")


def _bare_shortage(error: Exception) -> MmqError | None:
    return MemoryShortage("out of memory on the host") if isinstance(error, MemoryError) else None


def fail(error: MmqError, as_json: bool) -> NoReturn:
    """Print the error's message and hint, and exit with the error's code."""
    if as_json and not isinstance(error, GateFailed | GateNotResolved):  # the printed result holds the gates
        report = {"error": error.message, "hint": error.hint, "kind": type(error).__name__, "exit": error.exit_code}
        click.echo(json.dumps(report))
    else:
        click.echo(f"{error.label}: {named(error.message)}", err=True)
        if error.hint:
            click.echo(f"Hint: {named(error.hint)}", err=True)
    sys.exit(error.exit_code)


WIDEST = 1000  # characters of a line where there is no terminal
LOCAL = "local"
ray_option = click.option(
    "--ray", metavar="ADDRESS", help="Run on the Ray cluster at this address; `local` starts one on this machine."
)


def print_result(result: Any) -> None:
    """Print a result: a dict or list as one JSON line, any other value as rich renders it, with tables that fit.

    Output that is no terminal has no width, so its tables are not narrowed, unless the variable COLUMNS gives one.
    """
    if isinstance(result, dict | list):
        click.echo(json.dumps(result))
    else:
        from rich.console import Console

        from exporter.commands.fitted_table import fitted_parts

        console = Console(highlight=False, markup=False, soft_wrap=True)
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console.width = WIDEST
        for part in fitted_parts(result, console.width):
            console.print(part)
