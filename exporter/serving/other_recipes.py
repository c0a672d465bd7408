"""Built-in recipes that vLLM serves on a hardware: the hint of a refusal, with a command to paste."""

import difflib
import shlex
from collections.abc import Callable, Sequence

from exporter.model.families import Family
from exporter.numerics.quantized import Scheme
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import built_in, load_recipe
from exporter.planning.vllm_kernels import Hardware, capability_label, serving_kernels


def recipe_hint(recipe: Recipe, family: Family, on: Hardware, runs: Callable[[Scheme], bool] = lambda _: True) -> str:
    """The built-in recipes that vLLM serves there, and the export with the one whose name is closest to `recipe`'s.

    runs: whether the hardware runs a scheme that has a kernel.
    """
    names = served_recipes(family, on, runs)
    words = _closest_export(recipe, names)
    where = "this hardware" if on is None else "a CPU" if on == "cpu" else f"compute capability {capability_label(on)}"
    if not words:
        return f"no built-in recipe for {family.name} has kernels on {where}"
    return f"vLLM serves {', '.join(names)} on {where}: `{shlex.join(['mmq', *words])}`"


def other_export(
    recipe: Recipe, family: Family, on: Hardware, runs: Callable[[Scheme], bool] = lambda _: True
) -> list[str]:
    """Words after `mmq` that export the model with the served recipe of the closest name; empty if there is none."""
    return _closest_export(recipe, served_recipes(family, on, runs))


def _closest_export(recipe: Recipe, served: Sequence[str]) -> list[str]:
    """Words after `mmq` that export the model with the one of `served` whose name is closest to the recipe's."""
    closest = difflib.get_close_matches(recipe.name, served, n=1, cutoff=0)
    return [*("export", "--recipe", closest[0], "--model", recipe.model.repo or "demo-llava")] if closest else []


def served_recipes(family: Family, on: Hardware, runs: Callable[[Scheme], bool] = lambda _: True) -> list[str]:
    """Names of the built-in recipes whose rules fit the family's components and whose schemes have kernels there."""
    able = {component.name for component in family.components}
    names = []
    for name in built_in():
        recipe = load_recipe(name)
        schemes = [rule.scheme() for rule in recipe.quantize]
        fits = {rule.component for rule in recipe.quantize} <= able and not (on == "cpu" and recipe.kv_cache)
        if fits and all(scheme is None or (_kernel(scheme, recipe, on) and runs(scheme)) for scheme in schemes):
            names.append(name)
    return names


def _kernel(scheme: Scheme, recipe: Recipe, on: Hardware) -> bool:
    kernels = serving_kernels(scheme, recipe.format)
    if on == "cpu":
        return kernels.cpu is not None
    return bool(kernels.cuda) if on is None else kernels.on_gpu(on) is not None
