"""Built-in recipes that fit a model: those whose components and tasks its family has."""

import difflib
import shlex
from collections.abc import Sequence
from contextlib import suppress

from exporter.errors import MmqError
from exporter.model.families import Family
from exporter.model.source import is_on_hub, open_source
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import built_in, load_recipe


def fitting_recipes(family: Family) -> list[Recipe]:
    """The built-in recipes whose rules and gates name only components and tasks of the family."""
    recipes = (load_recipe(name) for name in built_in())
    return [recipe for recipe in recipes if fits(recipe, family)]


def fits(recipe: Recipe, family: Family) -> bool:
    """Whether the family has all components and tasks that the recipe names."""
    return not (recipe.foreign_components(family) or recipe.foreign_tasks(family))


def recipes_for(model: str | None) -> list[str]:
    """Names of the built-in recipes that fit a model of this machine; all names for any other model."""
    if model and not is_on_hub(model):
        with suppress(MmqError):
            return [recipe.name for recipe in fitting_recipes(open_source(model)[1])]
    return list(built_in())


def fitting_hint(recipe: Recipe, family: Family) -> str:
    """The built-in recipes that fit the family, and the plan with the one whose name is closest to `recipe`'s."""
    names = [other.name for other in fitting_recipes(family)]
    if not names:
        return f"no built-in recipe fits family {family.name}: `mmq recipes llava-w4-vit8` prints one to edit"
    words = ["mmq", "plan", "--recipe", closest(recipe.name, names), "--model", recipe.model.repo or "demo-llava"]
    return f"built-in recipes for family {family.name}: {', '.join(names)}; `{shlex.join(words)}`"


def closest(name: str, names: Sequence[str]) -> str:
    """The one of `names` that is most similar to `name`; empty if there is none."""
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0)), "")
