"""Reads recipe files: parses YAML into a `Recipe`; RecipeError lists every problem with the nearest known name."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from exporter.data.tasks import TASKS
from exporter.errors import RecipeError, did_you_mean, validation_message
from exporter.files.strict_yaml import parse_yaml
from exporter.model.families import FAMILIES
from exporter.planning.recipe import (
    Calibration,
    Evaluation,
    Evidence,
    Gate,
    Model,
    Publish,
    Recipe,
    Rule,
    Strict,
    component_kind,
    component_names,
    require_known,
)


def recipe_folder() -> Path:
    """Folder of the built-in recipes: inside the installed package, or next to it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def built_in() -> dict[str, Path]:
    """Name -> file of every built-in recipe."""
    return {path.stem: path for path in sorted(recipe_folder().glob("*.yaml"))}


def load_recipe(name_or_path: str, offered: Callable[[], Collection[str]] = built_in) -> Recipe:
    """A built-in recipe by name, or a recipe from a YAML file. RecipeError lists all problems.

    offered: the names that the error for an unknown name lists.
    """
    names = built_in()
    path = names.get(name_or_path, Path(name_or_path))
    if not path.is_file() and (path.suffix in (".yaml", ".yml") or path.parent != Path()):
        what = "is a folder" if path.is_dir() else "does not exist"
        raise RecipeError(f"recipe file {path} {what}", "pass a YAML file or a built-in name; `mmq recipes` lists them")
    if not path.is_file():
        listed = offered()
        raise RecipeError(
            f"unknown recipe '{name_or_path}'.{did_you_mean(name_or_path, listed)}",
            f"built-in recipes: {', '.join(listed)}; or pass the path of a YAML file. `mmq recipes` describes them",
        )
    try:
        return parse_recipe(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise RecipeError(
            f"{path} is not UTF-8 text", f"a recipe is a YAML file; `mmq recipes {next(iter(names))}` shows one"
        ) from None


def parse_recipe(text: str, where: str) -> Recipe:
    """A recipe from YAML text; `where` is the file's name in errors."""
    data = parse_yaml(text, where)
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: expected a mapping with keys {', '.join(Recipe.model_fields)}")
    data.setdefault("name", Path(where).stem)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = list(dict.fromkeys([*_problems(error), *_unknown_names(data)]))
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        lines = "\n".join(f"  {problem}" for problem in problems)
        hint = "`mmq recipes llava-w4-vit8` prints a working recipe"
        raise RecipeError(f"{where} has {count}\n{lines}", hint) from None


def _problems(error: ValidationError) -> list[str]:
    """Every problem as `path: what is wrong`, with the nearest known key for unknown keys."""
    lines = []
    for problem in error.errors():
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).lstrip(".")
        message = validation_message(problem, _keys_at(problem["loc"][:-1]))
        if problem["type"] == "missing":
            message = "this key is required"
        lines += [f"{path}: {line}" if path else line for line in message.splitlines()]
    return lines


def _unknown_names(data: dict[str, Any]) -> list[str]:
    """Problems about unknown components and unknown metrics of tasks.

    Pydantic checks these names only after everything else is valid.
    """
    lines = []
    model = data.get("model")
    named = model.get("family") if isinstance(model, dict) else None
    family = named if isinstance(named, str) and named in FAMILIES else None
    for i, rule in enumerate(_dicts(data.get("quantize"))):
        if isinstance(rule.get("component"), str):
            names = component_names(family)
            lines += _unknown(f"quantize[{i}].component", rule["component"], names, component_kind(family))
    for i, gate in enumerate(_dicts(data.get("gates"))):
        if isinstance(gate.get("task"), str) and gate["task"] in TASKS:
            metrics = TASKS[gate["task"]].METRICS
            lines += _unknown(f"gates[{i}]", str(gate.get("metric")), metrics, f"metric of task {gate['task']}")
    return lines


def _unknown(where: str, name: str, names: Collection[str], what: str) -> list[str]:
    try:
        require_known(name, names, what)
    except ValueError as error:
        return [f"{where}: {error}"]
    return []


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """The keys of the recipe section at `location`."""
    sections: dict[str, type[Strict]] = {
        "model": Model,
        "quantize": Rule,
        "calibration": Calibration,
        "evaluation": Evaluation,
        "gates": Gate,
        "evidence": Evidence,
        "publish": Publish,
    }
    section = sections.get(str(location[0]), Recipe) if location else Recipe
    return [field.alias or key for key, field in section.model_fields.items()]
