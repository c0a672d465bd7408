"""One rule of a recipe: how the linears of a component, or some of its blocks, are quantized."""

from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from exporter.errors import did_you_mean, validation_message
from exporter.methods import METHODS, SMOOTHERS, MethodOptions
from exporter.numerics.float_grids import WeightNumber
from exporter.numerics.quantized import Activations, GroupSize, Scheme

KEEP = "keep"
WORD_BITS = 32  # compressed-tensors packs codes into words of this size
TUNE_CHECKS = 20  # comparisons of learned rounding on the batches that are held out


class Strict(BaseModel):
    """Base of all recipe sections: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def require_known(value: str, registry: Any, what: str) -> str:
    """The value itself; ValueError with the allowed names when the registry does not have it."""
    if value not in registry:
        raise ValueError(f"unknown {what} '{value}'.{did_you_mean(value, registry)} ({', '.join(sorted(registry))})")
    return value


class Rule(Strict):
    """How the linears of a component, or some of its blocks or one role, are quantized. bits 16 keeps them.

    fallback: the key `else`: for linears whose inputs groups do not divide, "row" stores one scale per row (in 8 bits
    where a row of codes fills no whole number of 32-bit words, which vLLM needs) and "keep" leaves 16 bits; None
    refuses the recipe for such a model.
    fold: "awq" also moves scales out of the linears' inputs before they are quantized, as method awq does.
    store: "dequantized" stores quantized values in 16 bits; "plugin" packs what vLLM loads only with mmq's plugin.
    """

    component: str
    bits: int
    method: str = "rtn"
    group_size: GroupSize = "row"
    fallback: Literal["row", "keep"] | None = Field(None, alias="else")
    symmetric: bool = True
    number: WeightNumber = "int"
    activations: Activations | None = None
    blocks: str | None = None
    role: Literal["attention", "mlp"] | None = None
    store: Literal["packed", "dequantized", "plugin"] = "packed"
    fold: Literal["awq"] | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("method")
    @classmethod
    def _method(cls, value: str) -> str:
        return require_known(value, METHODS, "method")

    @field_validator("bits")
    @classmethod
    def _bits(cls, value: int) -> int:
        if value not in (2, 3, 4, 5, 6, 7, 8, 16):
            raise ValueError(f"bits must be 2 to 8, or 16 to keep the component, not {value}")
        return value

    @field_validator("group_size")
    @classmethod
    def _group(cls, value: GroupSize) -> GroupSize:
        if isinstance(value, int) and (value < 8 or value % 8):
            known = "a multiple of 8 (usually 128), 'row', 'tensor' or 'block'"
            raise ValueError(f"group_size must be {known}, not {value}")
        return value

    @field_validator("blocks")
    @classmethod
    def _blocks(cls, value: str | None) -> str | None:
        if value is not None and value not in ("front", "middle", "end"):
            low, colon, high = value.partition(":")
            if not (colon and (low + high).isdigit() and int(low or 0) < int(high or 10**6)):
                raise ValueError(f"blocks must be front, middle, end or a range like '0:8', not '{value}'")
        return value

    @model_validator(mode="after")
    def _together(self) -> Self:
        scheme = Scheme(self.bits, self.group_size, self.symmetric, self.number, self.activations)
        if self.bits != 16 and (problem := scheme.invalid()):
            raise ValueError(problem)
        if self.fallback and not isinstance(self.group_size, int):
            raise ValueError(f"else needs a group_size that is a number, not {self.group_size}")
        if self.fallback == "row" and (self.activations or scheme.grid):
            raise ValueError("else: row is possible only for integers without activations; use else: keep")
        if self.parsed_options().scales_in_loop and (scheme.mixed or self.number == "nvfp4"):
            raise ValueError(
                "scales: in_loop is not possible with bits: 4 and activations: fp8, or number: nvfp4: these scales are "
                "rounded relative to the largest, which is known only after the last group"
            )
        if problem := self._unlearnable() or self._unfoldable():
            raise ValueError(problem)
        return self

    def _unfoldable(self) -> str | None:
        """Why scales cannot be moved before the method quantizes, or None."""
        if self.fold is None:
            return None
        if METHODS[self.method].Statistics is None or self.method in SMOOTHERS:
            return f"fold: {self.fold} is not possible with method: {self.method}; use gptq or autoround"
        return "fold needs correct: false, because the other stream has unscaled inputs" if self.corrects else None

    def _unlearnable(self) -> str | None:
        """Why the method's negative scales or learned rounding do not fit the scheme; None when they do."""
        options, weights_alone = self.parsed_options(), self.number == "int" and not self.activations
        if options.learned_steps and not (weights_alone and self.group_size != "tensor"):
            return "learned rounding needs number: int, no activations, and group_size: a number or row"
        if options.signed_scales and not weights_alone:
            return "range: signed needs number: int and no activations"
        return None

    @model_serializer(mode="wrap")
    def _by_key(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plain data with `else` and `fold` only where they are set, so that older recipes keep their digest."""
        content: dict[str, Any] = dump(self)
        if self.fold is None:
            content.pop("fold", None)
        fallback = content.pop("fallback", content.pop("else", None))
        return content | ({"else": fallback} if fallback else {})

    @property
    def learned_steps(self) -> int:
        """Steps of learned rounding after the method; 0 is none."""
        return 0 if self.bits == 16 else self.parsed_options().learned_steps

    @property
    def smoother(self) -> str | None:
        """The key in `SMOOTHERS` of the method that moves scales; None when none are moved."""
        return self.fold or (self.method if self.method in SMOOTHERS else None)

    @property
    def corrects(self) -> bool:
        """Whether the method corrects weights for everything that was quantized before them."""
        return self.parsed_options().correction_damping is not None

    @property
    def follows_source(self) -> bool:
        """Whether it needs the activations of the full-precision model beside those of the quantized one."""
        return self.learned_steps > 0 or (self.bits != 16 and self.corrects)

    @property
    def needs_data(self) -> bool:
        """Whether it needs calibration data."""
        return self.bits != 16 and (METHODS[self.method].Statistics is not None or self.follows_source)

    def leaves_columns(self, columns: int) -> bool:
        """Whether the rule has groups that do not divide this number of inputs."""
        return self.bits != 16 and isinstance(self.group_size, int) and columns % self.group_size != 0

    def or_rows(self) -> "Rule":
        """The rule with `else: row` if it has groups and no `else`, and allows it."""
        integers = self.number == "int" and not self.activations
        able = self.bits != 16 and isinstance(self.group_size, int) and integers
        return self.model_copy(update={"fallback": "row"}) if able and self.fallback is None else self

    def fitted(self, columns: int) -> "Rule":
        """The rule of a linear with this number of inputs, after `else`."""
        if self.fallback is None:
            return self
        changes: dict[str, Any] = {"fallback": None}
        if self.leaves_columns(columns):
            changes |= {"group_size": "row"} if self.fallback == "row" else {"bits": 16}
            changes |= {"bits": 8, "symmetric": True} if self.widened(columns) else {}
        return self.model_copy(update=changes)

    def widened(self, columns: int) -> bool:
        """Whether `else: row` stores rows of this number of inputs in 8 bits, because their codes fill no words."""
        return self.fallback == "row" and self.leaves_columns(columns) and columns * self.bits % WORD_BITS != 0

    def parsed_options(self) -> MethodOptions:
        """The method's options, validated by the method (ValueError lists all problems)."""
        try:
            return METHODS[self.method].Options(**self.options)
        except ValidationError as error:
            fields = METHODS[self.method].Options.model_fields
            names = [field.alias or name for name, field in fields.items()]
            lines = [
                f"{'.'.join(['options', *map(str, problem['loc'])])}: {validation_message(problem, names, 'option')}"
                for problem in error.errors()
            ]
            raise ValueError("\n".join(lines)) from None

    def scheme(self) -> Scheme | None:
        """The quantization scheme of this rule; None for bits 16."""
        if self.bits == 16:
            return None
        return Scheme(self.bits, self.group_size, self.symmetric, self.number, self.activations)

    def matches_block(self, index: int, count: int) -> bool:
        """Whether block `index` of `count` is in this rule's range; thirds are split as evenly as possible."""
        if self.blocks is None:
            return True
        if self.blocks in ("front", "middle", "end"):
            return ("front", "middle", "end")[index * 3 // count] == self.blocks
        low, _, high = self.blocks.partition(":")
        return int(low or 0) <= index < int(high or count)
