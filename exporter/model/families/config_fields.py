"""What mmq reads of a config.json: each value with its type, its bounds and the default that transformers takes.

Anybody may have written a config.json. Its numbers become loop counts, divisors and sizes, so each is checked first.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from exporter.files.strict_json import kind

Values = Mapping[str, Any]  # the fields of one object of a config.json, checked, defaults filled in
MOST_BLOCKS = 1024
MOST_WIDTH = 2**18
MOST_ROWS = 2**24  # of an embedding


class Field(Protocol):
    """One key of a config.json."""

    @property
    def key(self) -> str:
        """The key."""
        ...

    def of(self, values: Mapping[str, Any]) -> Any:
        """The value, or its default when the key is absent; `values` holds the fields before this one, checked."""
        ...

    def problem(self, value: Any) -> str | None:
        """Why `value` cannot be used, or None."""
        ...


@dataclass(frozen=True)
class Number:
    """A whole number from `least` to `most`.

    default: what counts when the key is absent. null: what counts when the value is null (None: null is an error). Both
    may be computed from the fields before this one.
    """

    key: str
    default: int | Callable[[Values], int]
    least: int = 1
    most: int = MOST_WIDTH
    null: Callable[[Values], int] | None = None

    def of(self, values: Mapping[str, Any]) -> Any:
        """The number in `values`, or what counts instead."""
        if self.key not in values:
            return self.default(values) if callable(self.default) else self.default
        value = values[self.key]
        return self.null(values) if value is None and self.null else value

    def problem(self, value: Any) -> str | None:
        """Why `value` is no number within the bounds, or None."""
        if type(value) is int and self.least <= value <= self.most:
            return None
        return f"expected a whole number from {self.least:,} to {self.most:,}, it is {kind(value)}"


@dataclass(frozen=True)
class Flag:
    """True or false."""

    key: str
    default: bool

    def of(self, values: Mapping[str, Any]) -> Any:
        """The flag in `values`, or the default."""
        return values.get(self.key, self.default)

    def problem(self, value: Any) -> str | None:
        """Why `value` is no flag, or None."""
        return None if isinstance(value, bool) else f"expected true or false, it is {kind(value)}"


@dataclass(frozen=True)
class Choice:
    """One of several texts. null: whether null is allowed too."""

    key: str
    default: str
    options: tuple[str, ...]
    null: bool = False

    def of(self, values: Mapping[str, Any]) -> Any:
        """The text in `values`, or the default."""
        return values.get(self.key, self.default)

    def problem(self, value: Any) -> str | None:
        """Why `value` is none of the options, or None."""
        if (isinstance(value, str) and value in self.options) or (value is None and self.null):
            return None
        return f"expected {' or '.join(self.options)}, it is {kind(value)}"


@dataclass(frozen=True)
class Fraction:
    """A number from 0 to 1, for instance a dropout."""

    key: str
    default: float

    def of(self, values: Mapping[str, Any]) -> Any:
        """The number in `values`, or the default."""
        return values.get(self.key, self.default)

    def problem(self, value: Any) -> str | None:
        """Why `value` is no number from 0 to 1, or None."""
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
            return None
        return f"expected a number from 0 to 1, it is {kind(value)}"


@dataclass(frozen=True)
class Section:
    """An object, whose own keys transformers checks. kinds: key of it -> the texts that it may be."""

    key: str
    null: bool = False
    kinds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def of(self, values: Mapping[str, Any]) -> Any:
        """The object in `values`, or an empty one."""
        return values.get(self.key, {})

    def problem(self, value: Any) -> str | None:
        """Why `value` is no such object, or None."""
        if not isinstance(value, dict):
            return None if value is None and self.null else f"expected an object, it is {kind(value)}"
        for key, options in self.kinds.items():
            if key in value and value[key] not in options:
                return f"{key}: expected {' or '.join(options)}, it is {kind(value[key])}"
        return None


def read_fields(config: Mapping[str, Any], fields: Iterable[Field], where: str) -> tuple[dict[str, Any], list[str]]:
    """Every field's value, and what is wrong with those that cannot be used (their defaults stand in for them).

    where: the object's place in config.json, `text_config.` or nothing.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for entry in fields:
        given = {entry.key: config[entry.key]} if entry.key in config else {}
        value = entry.of({**values, **given})
        reason = entry.problem(value)
        if reason:
            problems.append(f"{where}{entry.key}: {reason}")
            value = entry.of(values)
        values[entry.key] = value
    return values, problems
