"""Recipes as validated data: which component gets which method and bits, the calibration, the format and the gates.

The first rule that matches a linear applies. `recipe_file.py` reads recipes from YAML.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from exporter.data import place
from exporter.data.tasks import TASKS
from exporter.errors import DataError, did_you_mean
from exporter.formats import FORMATS
from exporter.model.families import FAMILIES, Family
from exporter.numerics.kv_caches import KVCache
from exporter.planning.rule import Rule, Strict, require_known

__all__ = [
    "Calibration",
    "Evaluation",
    "Evidence",
    "Gate",
    "Model",
    "Publish",
    "Recipe",
    "Rule",
    "Strict",
    "component_kind",
    "component_names",
    "parse_sources",
    "require_known",
    "widths",
]


PROMPTED = ("vqa", "captioning")  # tasks whose answers are texts
QUESTION = "{question}"
Text = Annotated[str, StringConstraints(max_length=10_000)]
AnswerLength = Annotated[int, Field(ge=1, le=4096)]
MOST_SAMPLES = 10**8
RULE_OVERRIDES = ("bits", "group_size")  # starts of the keys of `Recipe.overrides` that change rules


class Model(Strict):
    """The checkpoint: a hub id, a local folder or the name of an embedded model.

    repo: empty in recipes that name no model; `--model` then names it.
    family: the only family that the recipe is for; None: every family that has the recipe's components.
    dtype: the dtype in which float32 tensors are read, and stored when they are kept; None keeps float32.
    adapter: folder of a LoRA adapter that is merged into the checkpoint.
    """

    repo: str = ""
    revision: str | None = None
    family: str | None = None
    dtype: Literal["float16", "bfloat16"] | None = None
    adapter: str | None = None

    @field_validator("family")
    @classmethod
    def _family(cls, value: str | None) -> str | None:
        return value if value is None else require_known(value, FAMILIES, "family")


def component_kind(family: str | None) -> str:
    """What a component is called in errors: of this family, or of any."""
    return "component" if family is None else f"component of family {family}"


def component_names(family: str | None) -> list[str]:
    """Names of the components of a family, in data order; None: of all families."""
    families = FAMILIES.values() if family is None else [FAMILIES[family]]
    return list(dict.fromkeys(component.name for one in families for component in one.components))


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
    samples: int = Field(128, ge=1, le=MOST_SAMPLES)
    batch: int = Field(8, ge=1, le=MOST_SAMPLES)
    seed: int = Field(0, ge=0, lt=2**32)
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
    samples: int = Field(500, ge=2, le=MOST_SAMPLES)
    batch: int = Field(32, ge=1, le=MOST_SAMPLES)
    seed: int = Field(0, ge=0, lt=2**32)

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


def check_prompts(prompts: dict[str, str]) -> dict[str, str]:
    """The prompts; ValueError lists those of unknown tasks, and those that misuse `{question}`."""
    problems = []
    for task, prompt in prompts.items():
        if task not in PROMPTED:
            problems.append(f"{task}: only {' and '.join(PROMPTED)} have a prompt.{did_you_mean(task, PROMPTED)}")
        elif task == "vqa" and QUESTION not in prompt:
            problems.append(
                f"{task}: {QUESTION} is missing; mmq puts each question there, for example '{QUESTION} Be brief.'"
            )
        elif task == "captioning" and QUESTION in prompt:
            problems.append(f"{task}: captions have no {QUESTION}; set the prompt of vqa instead")
    if problems:
        raise ValueError("\n".join(problems))
    return prompts


class Publish(Strict):
    """The repository to which `mmq publish` uploads the artifact."""

    repo: str | None = None
    private: bool = True


def widths(rules: Sequence[Rule]) -> str:
    """Bits per component as text: `vision 4 to 8, language 3 bits`."""
    bits: dict[str, list[int]] = {}
    for rule in rules:
        bits.setdefault(rule.component, []).append(rule.bits)
    spans = [
        f"{name} {min(numbers)}" + (f" to {max(numbers)}" if min(numbers) < max(numbers) else "")
        for name, numbers in bits.items()
    ]
    return ", ".join(spans) + " bits"


class Recipe(Strict):
    """A complete recipe; `recipes/*.yaml` are documented examples. Only `quantize` is required.

    gates: without them, scores are measured and no loss fails. evidence: required of the recipes that mmq ships.
    overrides: the values that a command or an API call replaced (`bits language`: `3`); mmq writes them.
    prompts: task -> the user's text beside the picture, instead of the family's; that of vqa contains `{question}`.
    max_new_tokens: task -> the longest answer in tokens, instead of the family's.
    kv_cache: the number type of the language model's key-value cache: None for 16 bits, "fp8" for float8 e4m3 with
    scale 1. Those with a scale per token and head are served with vLLM's flag --kv-cache-dtype.
    """

    name: str
    summary: str = ""
    model: Model = Model()
    quantize: tuple[Rule, ...]
    calibration: Calibration = Calibration()
    format: str = "compressed_tensors"
    kv_cache: KVCache | None = None
    evaluation: Evaluation = Evaluation()
    prompts: dict[str, Text] = Field(default_factory=dict)
    max_new_tokens: dict[str, AnswerLength] = Field(default_factory=dict)
    gates: tuple[Gate, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    publish: Publish = Publish()
    overrides: dict[str, str] = Field(default_factory=dict)

    @field_validator("format")
    @classmethod
    def _format(cls, value: str) -> str:
        return require_known(value, FORMATS, "format")

    @field_validator("quantize")
    @classmethod
    def _some(cls, value: tuple[Rule, ...]) -> tuple[Rule, ...]:
        if not value:
            raise ValueError("at least one entry is required")
        return value

    _prompts = field_validator("prompts")(check_prompts)

    @field_validator("max_new_tokens")
    @classmethod
    def _lengths(cls, value: dict[str, int]) -> dict[str, int]:
        for task in value:
            require_known(task, PROMPTED, "task with answers in text")
        return value

    @model_validator(mode="after")
    def _components(self) -> Self:
        family, problems = self.model.family, []
        for i, rule in enumerate(self.quantize):
            try:
                require_known(rule.component, component_names(family), component_kind(family))
            except ValueError as error:
                problems.append(f"quantize[{i}].component: {error}")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def description(self) -> str:
        """The summary; without one, or with overridden rules, the bits of each component."""
        ruled = any(key.startswith(RULE_OVERRIDES) for key in self.overrides)
        return widths(self.quantize) if ruled or not self.summary else self.summary

    def changes(self) -> str:
        """The overrides as one line; empty without any."""
        texts = {
            key: json.dumps(v, ensure_ascii=False) if len(v.split()) > 1 else v for key, v in self.overrides.items()
        }
        return ", ".join(f"{key}={text}" for key, text in texts.items())

    def digest(self) -> str:
        """sha256 of the recipe's content, independent of comments, key order and who set a value."""
        content = self.model_dump(mode="json", exclude={"overrides"})
        if self.kv_cache is None:  # so that older recipes, which lack the key, keep their digest
            del content["kv_cache"]
        if self.model.adapter is None:
            del content["model"]["adapter"]
        for key in ("prompts", "max_new_tokens"):
            if not content[key]:
                del content[key]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def foreign_components(self, family: Family) -> list[str]:
        """A problem for every rule whose component the family does not have."""
        able = [component.name for component in family.components]
        return [
            f"quantize[{i}]: family {family.name} has no component '{rule.component}'; it has {', '.join(able)}"
            for i, rule in enumerate(self.quantize)
            if rule.component not in able
        ]

    def foreign_tasks(self, family: Family) -> list[str]:
        """A problem for every task that this recipe names and that the family does not have."""
        named = {f"gates[{i}].task": gate.task for i, gate in enumerate(self.gates)}
        if "retrieval" in self.calibration.tasks:  # every family can be calibrated on captions and questions
            named["calibration.tasks"] = "retrieval"
        supported = f"family {family.name} supports {', '.join(family.tasks)}"
        return [f"{where}: {supported}, not {task}" for where, task in named.items() if task not in family.tasks]

    def adjusted(self, **sections: dict[str, Any]) -> "Recipe":
        """The recipe with some values of its sections replaced; None keeps a value."""
        changed = {}
        for name, values in sections.items():
            overrides = {key: value for key, value in values.items() if value is not None}
            section = getattr(self, name)
            changed[name] = type(section).model_validate(section.model_dump() | overrides)
        return self.model_copy(update=changed)
