"""Markdown of the Python API and of the exit codes, for `docs/generate.py`."""

import ast
import inspect
import re
from collections.abc import Callable

import exporter
from exporter import OpenedArtifact, api, api_artifacts, errors

ARGUMENTS = r"^([a-z_]+(?:, [a-z_]+)*): "  # a line of a docstring that describes arguments


def api_reference() -> str:
    """Markdown: every function of the Python API, its types with their attributes, and the errors with exit codes."""
    nodes = [node for module in (api, api_artifacts) for node in ast.parse(inspect.getsource(module)).body]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name in exporter.__all__]
    parts = []
    for node in functions:
        function = getattr(exporter, node.name)
        docstring = re.sub(ARGUMENTS, _as_item, inspect.getdoc(function) or "", flags=re.MULTILINE)
        parts += [f"### {node.name}", "", "```text", _signature(node, function), "```", "", docstring, ""]
    parts += ["## Types", "", "| type | meaning | attributes |", "|---|---|---|"]
    for name in exporter.__all__:
        if name not in {node.name for node in functions}:
            parts.append(
                f"| `{name}` | {_meaning(name)} | {' '.join(f'`{attribute}`' for attribute in _attributes(name))} |"
            )
    parts += ["", "## Errors", "", "| error | exit code | meaning |", "|---|---|---|"]
    for error in error_classes():
        first = (inspect.getdoc(error) or "").split("\n")[0]
        parts.append(f"| `{error.__name__}` | {error.exit_code} | {first} |")
    return "\n".join(parts)


def _as_item(match: re.Match[str]) -> str:
    """`a, b: ` of a docstring as the start of a list item."""
    return f"- {', '.join(f'`{name}`' for name in match[1].split(', '))}: "


def _signature(node: ast.FunctionDef, function: Callable[..., object]) -> str:
    """`name(...) -> type` with an argument a line: types as the code has them, defaults as values."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    lines = []
    for argument in [*node.args.args, None, *node.args.kwonlyargs] if node.args.kwonlyargs else node.args.args:
        if argument is None:
            lines.append("*")
            continue
        default = defaults[argument.arg]
        value = "" if default is inspect.Parameter.empty else f" = {getattr(default, '__name__', repr(default))}"
        assert argument.annotation
        lines.append(f"{argument.arg}: {ast.unparse(argument.annotation)}{value}")
    assert node.returns
    return f"{node.name}(\n" + "".join(f"    {line},\n" for line in lines) + f") -> {ast.unparse(node.returns)}"


def _meaning(name: str) -> str:
    """The first sentence of a type's docstring."""
    declared = getattr(exporter, name)
    if not isinstance(declared, type):
        return "What `on_event` takes: a function of one `Event`."
    return re.split(r"(?<=\.)\s", " ".join((inspect.getdoc(declared) or "").split("\n\n")[0].split()))[0]


def _attributes(name: str) -> list[str]:
    """Public fields and properties of a type, as its class declares them."""
    declared_type = getattr(exporter, name)
    if not isinstance(declared_type, type):
        return []
    if issubclass(declared_type, errors.MmqError):
        return ["message", "hint", "exit_code"]
    declared = inspect.get_annotations(declared_type) if declared_type is not OpenedArtifact else ["manifest", "report"]
    properties = [key for key, value in vars(declared_type).items() if isinstance(value, property)]
    return [key for key in dict.fromkeys([*declared, *properties]) if not key.startswith(("_", "model_config"))]


def error_classes() -> list[type[errors.MmqError]]:
    """`MmqError` and its subclasses, in the order of the source."""
    values = vars(errors).values()
    return [value for value in values if isinstance(value, type) and issubclass(value, errors.MmqError)]


def exit_code_page() -> str:
    """Markdown: every exit code, its meaning, its error classes and what to do."""
    lines = ["# Exit codes", "", "Generated from `exporter/errors.py` by `docs/generate.py`.", ""]
    lines += ["| code | meaning | what to do | errors of the [Python API](python-api.md#errors) |", "|---|---|---|---|"]
    for code, (_, meaning, remedy) in errors.EXIT_CODES.items():
        names = " ".join(f"`{error.__name__}`" for error in error_classes() if error.exit_code == code)
        lines.append(f"| {code} | {meaning} | {remedy} | {names} |")
    unknown = {error.exit_code for error in error_classes()} - errors.EXIT_CODES.keys()
    assert not unknown, f"no meaning of the exit codes {unknown}"
    text = [
        "[Gates](../explanation/gates.md#what-is-compared) explains *failed*, *not resolved* and *not measured*.",
        "`MMQ_DEBUG=1` shows the traceback of an error.",
    ]
    return "\n".join([*lines, "", *text, ""])
