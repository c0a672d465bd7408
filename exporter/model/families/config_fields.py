"""Validated fields of config.json: type, bounds and transformers' default of each key that mmq reads.

A config.json is untrusted input. Its numbers become loop counts, divisors and sizes, so each is validated first.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from exporter.files.strict_json import kind

Values = Mapping[str, Any]  # validated fields of one object of config.json, with defaults
MAX_BLOCKS = 1024
MAX_WIDTH = 2**18
MAX_ROWS = 2**24  # rows of an embedding
MAX_NUMBER = 1e12  # largest base or factor of rotary frequencies


class Field(Protocol):
    """One key of a config.json."""

    @property
    def key(self) -> str:
        """The key."""
        ...

    def of(self, values: Mapping[str, Any]) -> Any:
        """The value, or its default when the key is absent.

        values: the validated fields before this one, and the unvalidated value of this one.
        """
        ...

    def problem(self, value: Any) -> str | None:
        """Why `value` is invalid, or None."""
        ...


@dataclass(frozen=True)
class Number:
    """An integer from `least` to `most`.

    default: the value when the key is absent. null: the value when the key is null (None: null is invalid). Both may be
    computed from the fields before this one.
    """

    key: str
    default: int | Callable[[Values], int]
    least: int = 1
    most: int = MAX_WIDTH
    null: Callable[[Values], int] | None = None

    def of(self, values: Mapping[str, Any]) -> Any:
        """The number in `values`, or its default."""
        if self.key not in values:
            return self.default(values) if callable(self.default) else self.default
        value = values[self.key]
        return self.null(values) if value is None and self.null else value

    def problem(self, value: Any) -> str | None:
        """Why `value` is not an integer within the bounds, or None."""
        if type(value) is int and self.least <= value <= self.most:
            return None
        return f"expected an integer from {self.least:,} to {self.most:,}, got {kind(value)}"


@dataclass(frozen=True)
class Flag:
    """A boolean."""

    key: str
    default: bool

    def of(self, values: Mapping[str, Any]) -> Any:
        """The flag in `values`, or the default."""
        return values.get(self.key, self.default)

    def problem(self, value: Any) -> str | None:
        """Why `value` is not a boolean, or None."""
        return None if isinstance(value, bool) else f"expected true or false, got {kind(value)}"


@dataclass(frozen=True)
class Choice:
    """One of several strings. null: whether null is valid too."""

    key: str
    default: str
    options: tuple[str, ...]
    null: bool = False

    def of(self, values: Mapping[str, Any]) -> Any:
        """The string in `values`, or the default."""
        return values.get(self.key, self.default)

    def problem(self, value: Any) -> str | None:
        """Why `value` is not one of the options, or None."""
        if (isinstance(value, str) and value in self.options) or (value is None and self.null):
            return None
        return f"expected {' or '.join(self.options)}, got {kind(value)}"


@dataclass(frozen=True)
class TokenIds:
    """The id of a token, or a list of ids; null or a negative id: the model has no such token."""

    key: str

    def of(self, values: Mapping[str, Any]) -> Any:
        """The id or ids in `values`, or None."""
        return values.get(self.key)

    def problem(self, value: Any) -> str | None:
        """Why `value` is not an id or a list of ids, or None."""
        listed = value if isinstance(value, list) else [value]
        if value is None or all(type(number) is int and -1 <= number <= MAX_ROWS for number in listed):
            return None
        return f"expected an integer from -1 to {MAX_ROWS:,} or a list of them, got {kind(value)}"


@dataclass(frozen=True)
class Fraction:
    """A number from 0 to 1, for example a dropout rate."""

    key: str
    default: float

    def of(self, values: Mapping[str, Any]) -> Any:
        """The number in `values`, or the default."""
        return values.get(self.key, self.default)

    def problem(self, value: Any) -> str | None:
        """Why `value` is not a number from 0 to 1, or None."""
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
            return None
        return f"expected a number from 0 to 1, got {kind(value)}"


@dataclass(frozen=True)
class PositiveNumber:
    """A positive number or null, for example the base of rotary frequencies."""

    key: str

    def of(self, values: Mapping[str, Any]) -> Any:
        """The number in `values`, or None."""
        return values.get(self.key)

    def problem(self, value: Any) -> str | None:
        """Why `value` is neither a positive number nor null, or None."""
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_NUMBER
        return None if value is None or number else f"expected a positive number, got {kind(value)}"


@dataclass(frozen=True)
class Section:
    """An object whose keys transformers validates. kinds: some of its keys -> their valid strings.

    numbers: keys whose values are positive numbers or null.
    """

    key: str
    null: bool = False
    kinds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    numbers: tuple[str, ...] = ()

    def of(self, values: Mapping[str, Any]) -> Any:
        """The object in `values`, or an empty object."""
        return values.get(self.key, {})

    def problem(self, value: Any) -> str | None:
        """Why `value` is not such an object, or None."""
        if not isinstance(value, dict):
            return None if value is None and self.null else f"expected an object, got {kind(value)}"
        for key, options in self.kinds.items():
            if key in value and value[key] not in options:
                return f"{key}: expected {' or '.join(options)}, got {kind(value[key])}"
        wrong = ((key, PositiveNumber(key).problem(value.get(key))) for key in self.numbers)
        return next((f"{key}: {problem}" for key, problem in wrong if problem), None)


def read_fields(config: Mapping[str, Any], fields: Iterable[Field], where: str) -> tuple[dict[str, Any], list[str]]:
    """Every field's value, and a problem for each invalid value (which is replaced by its default).

    where: the object's place in config.json, such as `text_config.` or "".
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for entry in fields:
        stored = {entry.key: config[entry.key]} if entry.key in config else {}
        value = entry.of({**values, **stored})
        reason = entry.problem(value)
        if reason:
            problems.append(f"{where}{entry.key}: {reason}")
            value = entry.of(values)
        values[entry.key] = value
    return values, problems
