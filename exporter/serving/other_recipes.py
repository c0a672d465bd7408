"""Built-in recipes that vLLM serves on a hardware: the hint of a refusal, with a command to paste."""

import shlex
from collections.abc import Sequence

from exporter.model.families import Family
from exporter.numerics.quantized import Scheme
from exporter.planning.fitting_recipes import closest, fitting_recipes
from exporter.planning.recipe import Recipe
from exporter.planning.vllm_kernels import Hardware, capability_label, serving_kernels
from exporter.planning.vllm_rules import cpu_cache_problems
from exporter.serving.cpu_instructions import missing_instructions


def recipe_hint(recipe: Recipe, family: Family, on: Hardware, head: int | None) -> str:
    """The built-in recipes that vLLM serves there, and the export with the one whose name is closest to `recipe`'s.

    head: width of an attention head of the language model, if it is known.
    """
    served = served_recipes(family, on, head)
    where = (
        "this hardware" if on is None else "this CPU" if on == "cpu" else f"compute capability {capability_label(on)}"
    )
    if not served:
        return f"no built-in recipe for {family.name} has kernels on {where}"
    return f"vLLM serves {', '.join(served)} on {where}: `{shlex.join(['mmq', *_export(recipe, served)])}`"


def other_export(recipe: Recipe, family: Family, on: Hardware, head: int | None) -> list[str]:
    """Words after `mmq` that export the model with the served recipe of the closest name; empty if there is none."""
    return _export(recipe, served_recipes(family, on, head))


def _export(recipe: Recipe, served: Sequence[str]) -> list[str]:
    name = closest(recipe.name, served)
    return ["export", "--recipe", name, "--model", recipe.model.repo or "demo-llava"] if name else []


def served_recipes(family: Family, on: Hardware, head: int | None) -> list[str]:
    """Names of the built-in recipes that fit the family and that vLLM serves there; `cpu`: on this machine's CPU.

    head: width of an attention head; recipes with a KV cache are left out on a CPU where it is unknown.
    """
    return [recipe.name for recipe in fitting_recipes(family) if _is_served(recipe, on, head)]


def _is_served(recipe: Recipe, on: Hardware, head: int | None) -> bool:
    schemes = [scheme for rule in recipe.quantize if (scheme := rule.scheme())]
    if not all(_has_kernel(scheme, recipe, on) for scheme in schemes):
        return False
    if on != "cpu":
        return True
    cached = not recipe.kv_cache or (head is not None and not cpu_cache_problems(recipe.kv_cache, head))
    return cached and not missing_instructions(schemes, recipe.kv_cache)


def _has_kernel(scheme: Scheme, recipe: Recipe, on: Hardware) -> bool:
    kernels = serving_kernels(scheme, recipe.format)
    if on == "cpu":
        return kernels.cpu is not None
    return bool(kernels.cuda) if on is None else kernels.on_gpu(on) is not None
