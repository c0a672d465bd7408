"""Strict YAML reader for untrusted files: returns plain data of bounded size and depth or raises RecipeError.

YAML can name a value and repeat it, so a short text can describe a value of any size. Recipes come from the hub too.
"""

import unicodedata
from collections.abc import Hashable
from typing import Any

import yaml

from exporter.errors import RecipeError

MOST_CHARACTERS = 10**6
MOST_VALUES = 5 * 10**4  # with repeated values counted as often as they occur
DEEPEST = 50  # lists and mappings inside each other


def parse_yaml(text: str, where: str) -> Any:
    """The value in a YAML text of plain data: mappings, lists, texts, numbers.

    where: its file, for messages. RecipeError for invalid YAML, a key that occurs twice, control characters, values
    that contain themselves, and texts that exceed the limits.
    """
    if len(text) > MOST_CHARACTERS:
        raise RecipeError(f"{where}: {len(text):,} characters; mmq reads at most {MOST_CHARACTERS:,}")
    try:
        _refuse_size(text, where)
        value = yaml.load(text, _PlainLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: dates and numbers that Python cannot represent
        raise RecipeError(f"{where} is not valid YAML: {error}") from None
    _check(value, where)
    return value


# libyaml's parser is ten times as fast; PyYAML's wheels have it.
_FastestLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _PlainLoader(_FastestLoader):  # type: ignore[misc]
    """Constructs plain data; a key that occurs twice in a mapping is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping of a node."""
        keys: list[Any] = []
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in keys:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{key.value}' occurs twice", key.start_mark
                    )
                keys.append(key.value)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


def _refuse_size(text: str, where: str) -> None:
    """RecipeError for too many or too deeply nested values; the parser's events need neither memory nor recursion."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, _FastestLoader)):
        if number > 2 * MOST_VALUES:  # a list has a first and a last event
            raise RecipeError(f"{where}: more than {MOST_VALUES:,} values")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEEPEST:
            raise RecipeError(f"{where}: its values are nested too deeply")


def _check(value: Any, where: str) -> None:
    sizes: dict[int, int] = {}  # of finished lists and mappings, by identity
    inside: set[int] = set()

    def size(item: Any) -> int:
        """Number of values in an item, counted as often as they occur."""
        if isinstance(item, str):
            _refuse_control_characters(item, where)
        if not isinstance(item, dict | list):
            return 1
        if id(item) in inside:
            raise RecipeError(f"{where}: a value contains itself")
        if id(item) not in sizes:
            inside.add(id(item))
            members = [*item, *item.values()] if isinstance(item, dict) else item
            sizes[id(item)] = 1 + sum(map(size, members))
            inside.remove(id(item))
        if sizes[id(item)] > MOST_VALUES:
            raise RecipeError(f"{where}: more than {MOST_VALUES:,} values")
        return sizes[id(item)]

    size(value)


def _refuse_control_characters(text: str, where: str) -> None:
    wrong = next((c for c in text if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cs")), None)
    if wrong is not None:
        raise RecipeError(f"{where}: the text {text[:40]!r} has the control character {wrong!r}")
