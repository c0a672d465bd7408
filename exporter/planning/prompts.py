"""Prompts and answer lengths: those of a recipe replace the family's, for every step that reads a family.

The family's prompts are those of its published evaluation. A recipe's prompt is a user's text; the chat template of the
model's processor is put around it.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from exporter.model.families import Family
from exporter.planning.recipe import Recipe

FIELDS = {"vqa": "question_prompt", "captioning": "caption_prompt"}  # task -> field of the family with its prompt


def prompted(family: Family, prompts: Mapping[str, str], max_new_tokens: Mapping[str, int]) -> Family:
    """The family with other prompts and answer lengths. Tasks that it does not answer in text are left out."""
    fields = {FIELDS[task]: prompt for task, prompt in prompts.items() if task in family.max_new_tokens}
    lengths = {task: length for task, length in max_new_tokens.items() if task in family.max_new_tokens}
    return replace(family, **fields, max_new_tokens={**family.max_new_tokens, **lengths})  # type: ignore[arg-type]


def by_recipe(family: Family, recipe: Recipe) -> Family:
    """The family with the prompts and answer lengths of a recipe."""
    return prompted(family, recipe.prompts, recipe.max_new_tokens)


def prompts_by_task(family: Family) -> dict[str, dict[str, Any]]:
    """Task -> its `prompt` and `max_new_tokens`, for every task that the family answers in text."""
    return {
        task: {"prompt": prompt_of(family, task), "max_new_tokens": length}
        for task, length in family.max_new_tokens.items()
    }


def prompts_line(prompts: Mapping[str, Mapping[str, Any]]) -> str:
    """Prompts by task in one line: `vqa "{question}", up to 10 new tokens`."""
    texts = {task: json.dumps(record["prompt"], ensure_ascii=False) for task, record in prompts.items()}
    return "; ".join(f"{task} {texts[task]}, up to {prompts[task]['max_new_tokens']} new tokens" for task in prompts)


def prompt_of(family: Family, task: str) -> str:
    """The prompt of a task; that of questions contains `{question}`."""
    prompt: str = getattr(family, FIELDS[task])
    return prompt


def prompt_problems(recipe: Recipe, family: Family) -> list[str]:
    """A problem for every prompt or answer length of a task that the family does not answer, and for placeholders."""
    answered = ", ".join(family.max_new_tokens) or "no task in text"
    named = {f"prompts.{task}": task for task in recipe.prompts}
    named |= {f"max_new_tokens.{task}": task for task in recipe.max_new_tokens}
    problems = [
        f"{where}: family {family.name} answers {answered}, not {task}"
        for where, task in named.items()
        if task not in family.max_new_tokens
    ]
    marker = family.image_marker
    return problems + [
        f"prompts.{task}: remove {marker}: mmq puts the picture before the prompt"
        for task, prompt in recipe.prompts.items()
        if marker in prompt
    ]
