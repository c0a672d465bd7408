"""Overrides: values of a command or an API call that replace those of the recipe."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from exporter.data import places
from exporter.errors import RecipeError, validation_message
from exporter.planning.recipe import Recipe


def adjusted(
    recipe: Recipe,
    model: str | Path | None = None,
    revision: str | None = None,
    seed: int | None = None,
    samples: int | None = None,
    eval_samples: int | None = None,
    data: str | Path | Sequence[str | Path] = (),
    eval_batch: int | None = None,
    adapter: str | Path | None = None,
) -> Recipe:
    """A copy of the recipe with the values that are set; another model drops the recipe's revision.

    RecipeError when a value is not allowed or no model is named, DataError for an unknown data source.
    """
    if not (model or recipe.model.repo):
        hint = "pass --model MODEL, or write `model: {repo: MODEL}` in the recipe"
        raise RecipeError(f"recipe '{recipe.name}' names no model", hint)
    if model:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": None})})
    repo, folder = (None if path is None else str(path) for path in (model, adapter))
    names = [source.name for source in places(data)] or None
    try:
        return recipe.adjusted(
            model={"repo": repo, "revision": revision, "adapter": folder},
            calibration={"seed": seed, "samples": samples, "data": names},
            evaluation={"samples": eval_samples, "data": names, "batch": eval_batch},
        )
    except ValidationError as error:
        problems = [f"  {'.'.join(map(str, row['loc']))}: {validation_message(row, ())}" for row in error.errors()]
        raise RecipeError("\n".join([f"recipe '{recipe.name}' does not allow these values:", *problems])) from None
