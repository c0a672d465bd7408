"""Overrides: values of a command or an API call that replace those of the recipe."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from exporter.data import places
from exporter.errors import RecipeError, did_you_mean, validation_message
from exporter.numerics.quantized import GroupSize
from exporter.planning.recipe import Recipe
from exporter.planning.rule import Rule

Groups = GroupSize | tuple[int, Literal["row", "keep"]]  # a group size alone, or with the rule's `else`


def adjusted(
    recipe: Recipe,
    model: str | Path | None = None,
    *,
    revision: str | None = None,
    adapter: str | Path | None = None,
    seed: int | None = None,
    samples: int | None = None,
    eval_samples: int | None = None,
    eval_batch: int | None = None,
    data: str | Path | Sequence[str | Path] = (),
    tasks: Sequence[str] = (),
    bits: Mapping[str, int] | None = None,
    group_size: Groups | Mapping[str, Groups] | None = None,
    prompts: Mapping[str, str] | None = None,
    max_new_tokens: Mapping[str, int] | None = None,
) -> Recipe:
    """A copy of the recipe with the values that are set; another model drops the recipe's revision.

    tasks: calibrate on these tasks only, and keep only their gates. bits, group_size: by component; one group size
    alone is that of every rule with groups. prompts, max_new_tokens: by task. `Recipe.overrides` lists these five.
    RecipeError when a value is not allowed or no model is named, DataError for an unknown data source.
    """
    if not (model or recipe.model.repo):
        hint = "pass `--model llava-hf/llava-1.5-7b-hf` or another, or write `model: {repo: demo-llava}` in the recipe"
        raise RecipeError(f"recipe '{recipe.name}' names no model", hint)
    if model:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": None})})
    repo, folder = (None if path is None else str(path) for path in (model, adapter))
    names = [source.name for source in places(data)] or None
    try:
        recipe = recipe.adjusted(
            model={"repo": repo, "revision": revision, "adapter": folder},
            calibration={"seed": seed, "samples": samples, "data": names},
            evaluation={"samples": eval_samples, "data": names, "batch": eval_batch},
        )
    except ValidationError as error:
        problems = [f"  {'.'.join(map(str, row['loc']))}: {validation_message(row, ())}" for row in error.errors()]
        raise RecipeError("\n".join([f"recipe '{recipe.name}' does not allow these values:", *problems])) from None
    recipe = with_prompts(_with_tasks(recipe, tasks), prompts or {}, max_new_tokens or {})
    return _with_group_sizes(_with_bits(recipe, bits or {}), group_size)


def _with_tasks(recipe: Recipe, tasks: Sequence[str]) -> Recipe:
    """The recipe with the gates of these tasks only, and calibrated on those of them that it calibrates on, if any.

    RecipeError for a task without a gate.
    """
    if not tasks:
        return recipe
    gated = list(dict.fromkeys(gate.task for gate in recipe.gates))
    if missing := [task for task in tasks if task not in gated]:
        raise RecipeError(
            f"task {missing[0]}: recipe '{recipe.name}' has no gate of this task.{did_you_mean(missing[0], gated)}",
            f"it has gates of {', '.join(gated) or 'no task'}; add a gate in a copy of the recipe",
        )
    calibrated = [task for task in recipe.calibration.tasks if task in tasks] or None
    kept = tuple(gate for gate in recipe.gates if gate.task in tasks)
    overrides = recipe.overrides | {"tasks": ", ".join(dict.fromkeys(tasks))}
    return recipe.adjusted(calibration={"tasks": calibrated}).model_copy(update={"gates": kept, "overrides": overrides})


def with_prompts(recipe: Recipe, prompts: Mapping[str, str], max_new_tokens: Mapping[str, int]) -> Recipe:
    """The recipe with other prompts and answer lengths, by task. RecipeError lists all that are not allowed."""
    if not (prompts or max_new_tokens):
        return recipe
    texts = {f"prompt {task}": prompt for task, prompt in prompts.items()}
    texts |= {f"max_new_tokens {task}": str(length) for task, length in max_new_tokens.items()}
    content = recipe.model_dump()
    content["prompts"] |= dict(prompts)
    content["max_new_tokens"] |= dict(max_new_tokens)
    try:
        return Recipe.model_validate(content | {"overrides": recipe.overrides | texts})
    except ValidationError as error:
        problems = [
            f"  {'.'.join(map(str, row['loc']))}: {line}"
            for row in error.errors()
            for line in validation_message(row, ()).splitlines()
        ]
        raise RecipeError("\n".join([f"recipe '{recipe.name}' does not allow these values:", *problems])) from None


def _with_bits(recipe: Recipe, bits: Mapping[str, int]) -> Recipe:
    """The recipe with these bits in every rule of a component."""
    _require_rules(recipe, "bits", bits)
    texts = {f"bits {component}": str(number) for component, number in bits.items()}
    return _changed(recipe, texts, lambda rule: {"bits": bits[rule.component]} if rule.component in bits else {})


def _with_group_sizes(recipe: Recipe, group_size: Groups | Mapping[str, Groups] | None) -> Recipe:
    """The recipe with another group size in every rule that has groups, or in every rule of a component."""
    if group_size is None:
        return recipe
    if isinstance(group_size, Mapping):
        sizes = group_size
        _require_rules(recipe, "group_size", sizes)
        texts = {f"group_size {component}": _text(size) for component, size in sizes.items()}
        return _changed(recipe, texts, lambda rule: _keys(sizes[rule.component]) if rule.component in sizes else {})
    if not any(_has_groups(rule) for rule in recipe.quantize):
        named = ", ".join(dict.fromkeys(rule.component for rule in recipe.quantize if rule.bits != 16))
        raise RecipeError(
            f"group_size {_text(group_size)}: no rule of recipe '{recipe.name}' has groups",
            f"name a component: --group-size COMPONENT={_text(group_size)}, with one of {named}",
        )
    return _changed(
        recipe, {"group_size": _text(group_size)}, lambda rule: _keys(group_size) if _has_groups(rule) else {}
    )


def _keys(groups: Groups) -> dict[str, Any]:
    """The keys of a rule that a group size sets; a size that is no number removes `else`."""
    if isinstance(groups, tuple):
        return {"group_size": groups[0], "else": groups[1]}
    return {"group_size": groups} | ({} if isinstance(groups, int) else {"else": None})


def _text(groups: Groups) -> str:
    """`64`, `row` or `128,row`."""
    return ",".join(map(str, groups)) if isinstance(groups, tuple) else str(groups)


def _has_groups(rule: Rule) -> bool:
    return rule.bits != 16 and isinstance(rule.group_size, int)


def _require_rules(recipe: Recipe, key: str, values: Mapping[str, Any]) -> None:
    """RecipeError for every component that no rule of the recipe names."""
    able = dict.fromkeys(rule.component for rule in recipe.quantize)
    problems = [
        f"{key} {name}={value}: recipe '{recipe.name}' has no rule for component '{name}'.{did_you_mean(name, able)}"
        for name, value in values.items()
        if name not in able
    ]
    if problems:
        hint = f"it has rules for {', '.join(able)}; add a rule in a copy of the recipe"
        raise RecipeError("\n".join(problems), hint)


def _changed(recipe: Recipe, texts: Mapping[str, str], change: Callable[[Rule], dict[str, Any]]) -> Recipe:
    """The recipe with changed rules, and the change among its `overrides`. RecipeError lists rules that forbid it."""
    rules, problems = [], []
    for i, rule in enumerate(recipe.quantize):
        try:
            rules.append(Rule.model_validate(rule.model_dump() | values) if (values := change(rule)) else rule)
        except ValidationError as error:
            named = ", ".join(f"{key}: {value}" for key, value in values.items())
            lines = [line for row in error.errors() for line in validation_message(row, ()).splitlines()]
            problems += [f"  quantize[{i}] ({rule.component}), {named}: {line}" for line in lines]
    if problems:
        raise RecipeError("\n".join([f"recipe '{recipe.name}' does not allow these values:", *problems]))
    return recipe.model_copy(update={"quantize": tuple(rules), "overrides": recipe.overrides | dict(texts)})
