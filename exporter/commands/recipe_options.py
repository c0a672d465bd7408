"""Options that change a recipe without a copy of it: bits, group sizes, prompts, answer lengths."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from exporter.data import SourceSpec
    from exporter.planning.overrides import Groups
    from exporter.planning.recipe import Recipe

EXAMPLES = {"bits": "language=3", "max_new_tokens": "vqa=20"}


def parse_pairs(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Parse `language=3` of a repeatable option as name -> text; a value without a name has the key ""."""
    pairs = [text.partition("=") if "=" in text else ("", "", text) for text in values]
    repeated = [name for name, count in Counter(name for name, _, _ in pairs).items() if count > 1]
    if repeated:
        raise click.BadParameter(f"given twice for {repeated[0] or 'the whole recipe'}")
    return {name.strip(): value for name, _, value in pairs}


def parse_numbers_by_name(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, int]:
    """Parse `language=3` as name -> number."""
    texts = parse_pairs(context, option, values)
    for written, (name, text) in zip(values, texts.items(), strict=True):
        if not name or not text.isdecimal():
            raise click.BadParameter(f"expected {option.metavar} like {EXAMPLES[str(option.name)]}, not '{written}'")
    return {name: int(text) for name, text in texts.items()}


def parse_group_sizes(
    context: click.Context, option: click.Parameter, values: tuple[str, ...]
) -> "Groups | dict[str, Groups] | None":
    """Parse `64` or `128,row` as a group size, and `language=64` as component -> group size."""
    sizes = {name: _group_size(text) for name, text in parse_pairs(context, option, values).items()}
    if "" not in sizes:
        return sizes or None
    if len(sizes) > 1:
        raise click.BadParameter("give one size for the whole recipe, or COMPONENT=SIZE for each component")
    return sizes[""]


def _group_size(text: str) -> "Groups":
    size, comma, fallback = text.partition(",")
    if comma and size.isdecimal() and fallback in ("row", "keep"):
        return int(size), "row" if fallback == "row" else "keep"
    if text == "row":
        return "row"
    if text == "tensor":
        return "tensor"
    if not text.isdecimal():
        raise click.BadParameter(f"expected a number, row, tensor, or a number with ,row or ,keep, not '{text}'")
    return int(text)


bits_option = click.option(
    "--bits",
    metavar="COMPONENT=BITS",
    multiple=True,
    callback=parse_numbers_by_name,
    help="Bits of a component's rules, 2 to 8, or 16 to keep it; repeatable: --bits language=3 --bits vision=8. "
    "[the recipe's]",
)
group_size_option = click.option(
    "--group-size",
    metavar="[COMPONENT=]SIZE[,ELSE]",
    multiple=True,
    callback=parse_group_sizes,
    help="Columns per scale, or row: in every rule with groups (--group-size 64), or in a component's rules "
    "(--group-size language=row; repeatable). `128,row` uses one scale per row where 128 does not divide the inputs, "
    "`128,keep` 16 bits. [the recipe's]",
)


task_option = click.option(
    "--task",
    "tasks",
    metavar="TASK",
    multiple=True,
    help="Calibrate and test on this task only (captioning, vqa, retrieval), for data without samples of the others, "
    "whose gates are dropped; repeatable. [all]",
)


def parse_prompts(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Parse `captioning=Describe the image.` as task -> prompt."""
    prompts = parse_pairs(context, option, values)
    if "" in prompts:
        example = "captioning='Describe the image.'"
        raise click.BadParameter(f"expected {option.metavar} like {example}, not '{prompts['']}'")
    return prompts


prompt_option = click.option(
    "--prompt",
    "prompts",
    metavar="TASK=TEXT",
    multiple=True,
    callback=parse_prompts,
    help="Prompt of captioning or vqa, beside the picture and inside the chat template; repeatable: --prompt "
    "captioning='Describe the image.' --prompt vqa='{question} Be brief.' [the recipe's, else the family's]",
)
max_new_tokens_option = click.option(
    "--max-new-tokens",
    metavar="TASK=NUMBER",
    multiple=True,
    callback=parse_numbers_by_name,
    help="Longest answer in tokens of captioning or vqa; repeatable: --max-new-tokens vqa=20. [the recipe's, else the "
    "family's]",
)


def recipe_of(name_or_path: str, model: str | None, overrides: Mapping[str, Any]) -> "Recipe":
    """The recipe with the options of the command line. RecipeError when they do not fit it."""
    from exporter.planning.fitting_recipes import recipes_for
    from exporter.planning.overrides import adjusted
    from exporter.planning.recipe_file import load_recipe

    return adjusted(load_recipe(name_or_path, lambda: recipes_for(model)), model, **overrides)


def study_recipe(options: Mapping[str, Any], sources: "Sequence[SourceSpec]") -> "Recipe":
    """The base recipe of a study: model, data, tasks and prompts of the options."""
    from exporter.planning.overrides import with_prompts
    from exporter.study.prepare import base_recipe

    about = (options["model"], options["revision"], sources, options["calibration"], options["seed"])
    return with_prompts(base_recipe(*about, options["tasks"]), options["prompts"], options["max_new_tokens"])
