"""Recipes as validated data: which component gets which method and bits, the calibration, the format and the gates.

The first rule that matches a linear applies. `recipe_file.py` reads recipes from YAML.
"""

import hashlib
import json
from collections.abc import Collection
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from exporter.data import place
from exporter.errors import DataError, did_you_mean, validation_message
from exporter.formats import FORMATS
from exporter.methods import METHODS, MethodOptions
from exporter.model.families import FAMILIES
from exporter.numerics.quantized import Activations, GroupSize, Scheme
from exporter.tasks import TASKS

Third = Literal["front", "middle", "end"]


class Strict(BaseModel):
    """Base of all recipe sections: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def require_known(value: str, registry: Any, what: str) -> str:
    """The value itself; ValueError with the allowed names when the registry does not have it."""
    if value not in registry:
        raise ValueError(f"unknown {what} '{value}'.{did_you_mean(value, registry)} ({', '.join(sorted(registry))})")
    return value


class Model(Strict):
    """The checkpoint: a hub id, a local folder or the name of an embedded model.

    dtype: the dtype in which float32 tensors are read, and stored when they are kept; None keeps float32.
    adapter: folder of a LoRA adapter that is merged into the checkpoint.
    """

    repo: str
    revision: str | None = None
    family: str
    dtype: Literal["float16", "bfloat16"] | None = None
    adapter: str | None = None

    @field_validator("family")
    @classmethod
    def _family(cls, value: str) -> str:
        return require_known(value, FAMILIES, "family")


class Rule(Strict):
    """How the linears of a component, or some of its blocks or one role, are quantized. bits 16 keeps them.

    store: "dequantized" stores quantized values in 16 bits; "plugin" packs what vLLM loads only with mmq's plugin.
    """

    component: str
    bits: int
    method: str = "rtn"
    group_size: GroupSize = "row"
    symmetric: bool = True
    number: Literal["int", "fp8"] = "int"
    activations: Activations | None = None
    blocks: str | None = None
    role: Literal["attention", "mlp"] | None = None
    store: Literal["packed", "dequantized", "plugin"] = "packed"
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
            raise ValueError(f"group_size must be a multiple of 8 (usually 128), 'row' or 'tensor', not {value}")
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
        if self.number == "fp8" and (self.bits != 8 or not self.symmetric or self.group_size not in ("row", "tensor")):
            raise ValueError("number: fp8 needs bits: 8, symmetric: true and group_size: row or tensor")
        scheme = Scheme(self.bits, self.group_size, self.symmetric, self.number, self.activations)
        if self.activations and not scheme.mixed:
            if self.bits != 8 or not self.symmetric or self.group_size not in ("row", "tensor"):
                raise ValueError(
                    "activations need bits: 8, symmetric: true and group_size: row or tensor; "
                    "activations: fp8 is also possible with bits: 4, symmetric: true and group_size: 128"
                )
            if (self.activations == "fp8") != (self.number == "fp8"):
                raise ValueError("activations: fp8 needs number: fp8 or bits: 4; int8 needs number: int")
        if self.parsed_options().scales_in_loop and scheme.mixed:
            raise ValueError(
                "scales: in_loop is not possible with bits: 4 and activations: fp8: vLLM rounds these scales relative "
                "to the row's largest scale, which is known only after the last group"
            )
        return self

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


def parse_sources(value: Any) -> Any:
    """The data sources of a recipe (`demo`, `NAME:PATH` or a folder); a single string becomes a list."""
    listed = (value,) if isinstance(value, str) else value
    for text in listed if isinstance(listed, list | tuple) else ():
        try:
            place(str(text))
        except DataError as error:
            raise ValueError(f"{error.message} ({error.hint})") from None
    return listed


class Calibration(Strict):
    """The data on which statistics are measured.

    data: "demo" (the built-in drawings), or sources like `coco:/data/coco`. A source without a path (`folder`, `coco`)
    gets its path from --data. vision_weight: the weight of a picture token relative to a text token in components that
    process both (the language model); 0 excludes picture tokens (docs/explanation/methods.md).
    """

    data: tuple[str, ...] = ("demo",)
    tasks: tuple[str, ...] = ("captioning", "vqa")
    samples: int = Field(128, ge=1)
    batch: int = Field(8, ge=1)
    seed: int = 0
    vision_weight: float = Field(1.0, ge=0, le=100)

    @field_validator("tasks")
    @classmethod
    def _tasks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("at least one task is required")
        return tuple(require_known(task, TASKS, "task") for task in value)

    _data = field_validator("data", mode="before")(parse_sources)


class Evaluation(Strict):
    """The test data. samples: per task; more samples give narrower intervals. data: None uses calibration's."""

    data: tuple[str, ...] | None = None
    samples: int = Field(500, ge=2)
    batch: int = Field(32, ge=1)
    seed: int = 0

    _data = field_validator("data", mode="before")(parse_sources)


class Gate(Strict):
    """A bound: the score may drop by at most the share `max_drop` of the full-precision score (0.02 is 2 %).

    A gate is unresolved while the 95 % interval of the change contains the bound. decide: "upper" passes a gate only
    when the whole interval is within the bound; "point" decides an unresolved gate by the measured change.
    """

    task: str
    metric: str
    max_drop: float = Field(ge=0, lt=1, allow_inf_nan=False)
    decide: Literal["point", "upper"] = "upper"

    @model_validator(mode="after")
    def _metric(self) -> Self:
        require_known(self.task, TASKS, "task")
        require_known(self.metric, TASKS[self.task].METRICS, f"metric of task {self.task}")
        return self


class Evidence(Strict):
    """Evidence for the recipe: a finding, its figures, and their source."""

    finding: str
    figures: str
    source: str


class Publish(Strict):
    """The repository to which `mmq publish` uploads the artifact."""

    repo: str | None = None
    private: bool = True


class Recipe(Strict):
    """A complete recipe; `recipes/*.yaml` are documented examples.

    kv_cache: the number type of the language model's key-value cache: None for 16 bits, "fp8" for float8 e4m3.
    """

    name: str
    summary: str
    model: Model
    quantize: tuple[Rule, ...]
    calibration: Calibration = Calibration()
    format: str = "compressed_tensors"
    kv_cache: Literal["fp8"] | None = None
    evaluation: Evaluation = Evaluation()
    gates: tuple[Gate, ...]
    evidence: tuple[Evidence, ...]
    publish: Publish = Publish()

    @field_validator("format")
    @classmethod
    def _format(cls, value: str) -> str:
        return require_known(value, FORMATS, "format")

    @field_validator("quantize", "evidence")
    @classmethod
    def _some(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value:
            raise ValueError("at least one entry is required")
        return value

    @model_validator(mode="after")
    def _components(self) -> Self:
        names = [component.name for component in FAMILIES[self.model.family].components]
        problems = []
        for i, rule in enumerate(self.quantize):
            try:
                require_known(rule.component, names, f"component of family {self.model.family}")
            except ValueError as error:
                problems.append(f"quantize[{i}].component: {error}")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def digest(self) -> str:
        """sha256 of the recipe's content, independent of comments and key order."""
        content = self.model_dump(mode="json")
        if self.kv_cache is None:  # so that older recipes, which lack the key, keep their digest
            del content["kv_cache"]
        if self.model.adapter is None:
            del content["model"]["adapter"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def foreign_tasks(self, able: Collection[str]) -> list[str]:
        """A problem for every task that this recipe names and that is not in `able`, the family's tasks."""
        named = {f"gates[{i}].task": gate.task for i, gate in enumerate(self.gates)}
        if "retrieval" in self.calibration.tasks:  # every family can be calibrated on captions and questions
            named["calibration.tasks"] = "retrieval"
        supported = f"family {self.model.family} supports {', '.join(able)}"
        return [f"{where}: {supported}, not {task}" for where, task in named.items() if task not in able]

    def adjusted(self, **sections: dict[str, Any]) -> "Recipe":
        """The recipe with some values of its sections replaced; None keeps a value."""
        changed = {}
        for name, values in sections.items():
            overrides = {key: value for key, value in values.items() if value is not None}
            section = getattr(self, name)
            changed[name] = type(section).model_validate(section.model_dump() | overrides)
        return self.model_copy(update=changed)
