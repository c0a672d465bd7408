"""`mmq ask`: one question about one picture, answered by an artifact, a model or a server; and by both to compare."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.commands.next_steps import print_steps
from exporter.commands.options import device_option, json_option, load_torch, print_result, reports_errors_without_torch
from exporter.commands.steps_after import after_ask

if TYPE_CHECKING:
    from exporter.events import Listener
    from exporter.pipeline.picture_question import OnText, PictureQuestion

SOURCE, ARTIFACT = "full precision", "artifact"


@click.command()
@click.argument("model")
@click.argument("picture", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("question", required=False)
@click.option("--compare", is_flag=True, help="Ask the artifact's source model too, and mark where the answers differ.")
@click.option("--baseline", metavar="MODEL", help="With --compare: where the source model is [as in the recipe].")
@click.option("--server", metavar="URL", help="OpenAI-compatible server of MODEL, such as `mmq serve`.")
@click.option("--served-model", metavar="NAME", help="Name of MODEL on --server [the only one].")
@click.option("--baseline-server", metavar="URL", help="With --compare and --server: server of the source model.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Longest answer.")
@click.option("--as-is", is_flag=True, help="Send the question alone, without the wording with which mmq measures.")
@device_option
@json_option
@reports_errors_without_torch
def ask(model: str, picture: Path, question: str | None, device: str, as_json: bool, **options: Any) -> None:
    """Ask an artifact or a model about a picture.

    MODEL is an artifact, a model folder, a hub id or a demo model. Without QUESTION, mmq asks for a caption. The answer
    is computed in this process with transformers and greedy decoding, or by a server; it is printed as it grows.

    \b
    Examples:
      mmq ask artifacts/demo-llava-w4-vit8 photo.jpg "what shape is the large object?"
      mmq ask artifacts/demo-llava-w4-vit8 photo.jpg "how many objects are there?" --compare
      mmq ask artifacts/demo-llava-w4-vit8 photo.jpg --server http://127.0.0.1:8000
    """
    from exporter.commands.progress import ProgressDisplay
    from exporter.evaluation.word_differences import marked, spans
    from exporter.pipeline.picture_question import question as read_question

    _refuse_unused(options)
    request = read_question(picture, question, options["max_tokens"], options["as_is"], model)
    answers: dict[str, str] = {}
    with ProgressDisplay(as_json) as listen:
        for label, answer in _askers(model, request, device, listen, options).items():
            start = f"{label}: " if options["compare"] else ""
            answers[label] = answer(_printer(as_json, start, listen.hide))
            if not as_json:
                click.echo("" if answers[label] else f"{start}(no text)")
    differences = spans(answers[SOURCE], answers[ARTIFACT]) if options["compare"] else []
    different = [{SOURCE: part.first, ARTIFACT: part.second} for part in differences if part.differs]
    if as_json:
        return print_result({"answers": answers, "differences": different if options["compare"] else None})
    if different:
        click.echo(f"\nThe answers differ at {len(different)} place{'s' * (len(different) > 1)}:")
        click.echo(f"{SOURCE}: {marked(differences, False)}\n{ARTIFACT}: {marked(differences, True)}")
    elif options["compare"]:
        click.echo("\nThe answers are equal.")
    steps = after_ask(click.get_current_context(), model, options["compare"], options["server"])
    print_steps(as_json, steps, err=True)


def _refuse_unused(options: dict[str, Any]) -> None:
    """UsageError for options that need others."""
    for name, needed in (("baseline", "compare"), ("baseline_server", "compare"), ("served_model", "server")):
        if options[name] and not options[needed]:
            raise click.UsageError(f"--{name.replace('_', '-')} needs --{needed}")
    if options["compare"] and bool(options["server"]) != bool(options["baseline_server"]):
        raise click.UsageError("--compare with a server needs both --server and --baseline-server")


def _askers(
    model: str, request: "PictureQuestion", device: str, listen: "Listener", options: dict[str, Any]
) -> dict[str, Callable[["OnText"], str]]:
    """Label -> function that asks one model; the source first, whose hashes are compared with the artifact's."""

    def asker(place: str, url: str | None, name: str | None) -> Callable[["OnText"], str]:
        if url:
            from exporter.model.inference.predict_server import Server
            from exporter.pipeline.picture_question import ask_server

            return lambda on_text: ask_server(place, request, Server(url, name, tries=1, serves=place), on_text)
        load_torch(listen)
        from exporter.device import choose
        from exporter.pipeline.ask import ask as ask_here

        selected_device = choose(device)
        return lambda on_text: ask_here(place, request, selected_device, listen, on_text)

    models = {ARTIFACT: asker(model, options["server"], options["served_model"])}
    if not options["compare"]:
        return models
    load_torch(listen)
    from exporter.pipeline.ask import source_of

    source = source_of(model, options["baseline"], listen)
    return {SOURCE: asker(source, options["baseline_server"], None)} | models


def _printer(as_json: bool, start: str, before: Callable[[], object]) -> "OnText":
    """Prints pieces of an answer to stdout, `start` before the first; nothing with --json. before: called first."""
    pieces = 0

    def show(piece: str) -> None:
        nonlocal pieces
        if not pieces:
            before()
        click.echo(f"{'' if pieces else start}{piece}", nl=False)
        pieces += 1

    return (lambda piece: None) if as_json else show
