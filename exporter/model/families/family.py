"""`Family`: the data that describes a model family, and what follows from it for one config.json.

Names: a *checkpoint name* is the tensor's name on the hub, which identifies it; the live name (in the transformers
class) and the runtime name (inside vLLM) are derived from it.
"""

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from exporter.files.strict_json import kind
from exporter.model.families.component import Component, Config, Inputs, logits
from exporter.model.families.config_fields import Choice, Field, Number, Section, TokenIds, Values, read_fields
from exporter.model.families.names import Names
from exporter.model.families.parts.part import Parts, Shapes, TinyProcessor, part_of, section, size_of
from exporter.transformers_import import import_transformers

Sizes = Mapping[str, Values]  # validated fields of config.json: object key -> fields; "" for the top level

PART_NAMES = {"vision_config": "vision tower", "qformer_config": "Q-Former", "text_config": "text model"}
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_DTYPES = ("float32", "float16", "bfloat16", "float64")
# Keys of all objects: transformers allocates two entries per label, and other attention values load code from the hub.
_EVERYWHERE: tuple[Field, ...] = (
    Number("num_labels", 2, least=0, most=10**5),
    Choice("_attn_implementation", "sdpa", _ATTENTION, null=True),
    Choice("attn_implementation", "sdpa", _ATTENTION, null=True),
    Choice("dtype", "float32", _DTYPES, null=True),
    Choice("torch_dtype", "float32", _DTYPES, null=True),
    Section("auto_map"),
    TokenIds("bos_token_id"),
    TokenIds("eos_token_id"),
)


@dataclass(frozen=True)
class AtMost:
    """The largest allowed value of a processor's setting."""

    value: int


@dataclass(frozen=True)
class Family:
    """Everything that differs between model families.

    models: what models it has, for the documentation. heading: of its section in docs/reference/families.md.
    architectures: values of config.json's `architectures` that select the family; the first is transformers' class.
    config_class: name of the transformers config class.
    parts: object of config.json -> `model_type` -> the part; the first is the default.
    assemble: the components for a config.json, in data order, upstream first.
    names: how tensors are called in checkpoints, in the live model and inside vLLM, for a config.json.
    shapes: shapes of all tensors of a checkpoint, by checkpoint name, as transformers builds them.
    question_prompt contains `{question}`, fallback_prompt (for processors without chat template) `{text}`.
    image_tokens: number of tokens of a picture in a prompt; of one of 640x480 pixels where the number varies.
    positions: the largest number of tokens of the model, including those of the picture.
    vocabulary: the number of tokens that the model has embeddings for.
    pixels: the last dimensions of the processor's `pixel_values`; empty when they depend on the picture.
    tiny: the top level of a small config for tests; objects of parts in it change those of the parts.
    tiny_processor: a processor for such a config.
    kept: linears that are never quantized: pattern over checkpoint names (without `.weight`), and the reason.
    fields: the fields that mmq reads from config.json's top level.
    flat: objects of config.json whose keys may be at the top level instead.
    misfits: problems between fields of different objects.
    varies: whether the number of image tokens depends on the picture.
    any_size: whether it does so for a config.json's parts only.
    nested: whether the processor takes a list of pictures for every text.
    processor_fields: settings of the processor that follow from config.json.
    shared_settings: attributes of the processor that must equal config.json's values if the processor has them.
    image_marker: the placeholder of a picture in prompts.
    reply_end: the text that ended replies in training: None for the tokenizer's end token, "" for no text.
    outputs: all outputs of the model for a batch as one tensor, to compare two loadings of it.
    refuses: why mmq does not support a model of this family, from its config.json, or None.
    float32: prefixes of checkpoint names that transformers always computes in float32.
    unserved: why vLLM cannot load this family, or ""; its artifacts are for transformers.
    engine_packages: Python packages that this family needs in vLLM's environment beside vLLM.
    tied: output head -> the embedding that can share its tensor; such a head may be stored or not.
    components, tensor_names: those of one config.json (see `of`); before, those of the default parts.
    """

    name: str
    models: str
    heading: str
    architectures: tuple[str, ...]
    config_class: str
    parts: Parts
    assemble: Callable[[Config], tuple[Component, ...]]
    shapes: Callable[[Sizes], Shapes]
    question_prompt: str
    caption_prompt: str
    fallback_prompt: str
    max_new_tokens: Mapping[str, int]
    tasks: tuple[str, ...]
    image_tokens: Callable[[Config], int]
    positions: Callable[[Config], int]
    vocabulary: Callable[[Config], int]
    pixels: Callable[[Config], tuple[int, ...]]
    tiny: Mapping[str, Any]
    tiny_processor: Callable[[Config], TinyProcessor]
    names: Callable[[Config], Names] = lambda config: Names()
    kept: tuple[tuple[str, str], ...] = ()
    fields: tuple[Field, ...] = ()
    flat: tuple[str, ...] = ()
    misfits: Callable[[Sizes], list[str]] = lambda sizes: []
    varies: bool = False
    any_size: Callable[[Config], bool] = lambda config: False
    nested: bool = False
    processor_fields: Callable[[Config], Mapping[str, Any]] = lambda config: {}
    shared_settings: Callable[[Config], Mapping[str, Any]] = lambda config: {}
    image_marker: str = "<image>"
    reply_end: str | None = None
    outputs: Callable[[Any, Inputs], Any] = logits
    refuses: Callable[[Config], str | None] = lambda config: None
    float32: tuple[str, ...] = ()
    unserved: str = ""
    engine_packages: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    components: tuple[Component, ...] = ()
    tensor_names: Names | None = None

    def __post_init__(self) -> None:
        """Use the default parts until `of` names others."""
        if not self.components:
            object.__setattr__(self, "components", self.assemble({}))
        if self.tensor_names is None:
            object.__setattr__(self, "tensor_names", self.names({}))

    def of(self, config: Config) -> "Family":
        """The family with the components and names of a config.json's parts."""
        varies = self.varies or self.any_size(config)
        return replace(self, components=self.assemble(config), tensor_names=self.names(config), varies=varies)

    def canonical_name(self, name: str) -> str:
        """The hub's name of a tensor that another program may have saved under another name."""
        assert self.tensor_names is not None
        return self.tensor_names.canonical(name)

    def live_name(self, name: str) -> str:
        """Name of a checkpoint's tensor or module in the transformers class."""
        assert self.tensor_names is not None
        return self.tensor_names.live(name)

    def runtime_name(self, name: str) -> str:
        """Name of a checkpoint's tensor or module inside vLLM."""
        assert self.tensor_names is not None
        return self.tensor_names.runtime(name)

    def skeleton(self, config: Config) -> Any:
        """The transformers model for a config.json, with uninitialized weights, on the current default device."""
        transformers = import_transformers()
        described = getattr(transformers, self.config_class).from_dict(copy.deepcopy(dict(config)))
        return getattr(transformers, self.architectures[0])(described)

    def tiny_config(self, **parts: str) -> dict[str, Any]:
        """A small config for tests with the real structure. parts: object of config.json -> `model_type`."""
        config = copy.deepcopy(dict(self.tiny)) | {"architectures": [self.architectures[0]]}
        for key, kinds in self.parts.items():
            part = kinds[parts.get(key, next(iter(kinds)))]
            config[key] = copy.deepcopy(dict(part.tiny)) | config.get(key, {})
            config |= part.tiny_top
        return config

    def tiny_configs(self) -> dict[str, dict[str, Any]]:
        """Small configs with every part of the family, by the `model_type` that differs from the default's."""
        configs, used = (
            {self.name: self.tiny_config()},
            {id(next(iter(kinds.values()))) for kinds in self.parts.values()},
        )
        for key, kinds in self.parts.items():
            for name, part in kinds.items():
                if id(part) not in used:
                    configs[f"{self.name}-{name}"] = self.tiny_config(**{key: name})
                    used.add(id(part))
        return configs

    def image_token(self, config: Config) -> int | None:
        """Id of the placeholder of a picture in prompts; None when config.json names none."""
        ids = (config.get(key) for key in ("image_token_index", "image_token_id"))
        return next((int(number) for number in ids if number is not None), None)

    def heads(self, config: Config) -> dict[str, int]:
        """Number of attention heads of every part, by its object in config.json."""
        pairs = {key: next(iter(kinds.values())).stack.heads for key, kinds in self.parts.items()}
        return {key: int(size_of(self.parts, config, key, name)) for key, name in pairs.items()}

    def shared_heads(self, config: Config) -> dict[str, int]:
        """Number of key and value heads of every part that groups its queries, by its object in config.json."""
        name = "num_key_value_heads"
        grouped = [key for key in self.parts if any(f.key == name for f in part_of(self.parts, config, key).fields)]
        return {key: int(size_of(self.parts, config, key, name)) for key in grouped}

    def component(self, name: str) -> Component:
        """The component called `name` (KeyError when there is none)."""
        return {component.name: component for component in self.components}[name]

    def component_of(self, name: str) -> Component | None:
        """The component with this tensor or module in its blocks, by checkpoint name; None when it is in none."""
        return next((component for component in self.components if component.holds(name)), None)

    def component_with(self, name: str) -> Component | None:
        """`component_of` for a model whose config.json is not at hand: among the components of all parts."""
        return next((component for family in self._assembled if (component := family.component_of(name))), None)

    @cached_property
    def _assembled(self) -> tuple["Family", ...]:
        """The family with each of its parts in turn."""
        return tuple(replace(self, components=self.assemble(config)) for config in self.tiny_configs().values())

    def text(self, question: str | None) -> str:
        """The user's text next to the picture: the question in the family's wording, or the caption request."""
        return self.caption_prompt if question is None else self.question_prompt.replace("{question}", question)

    def reason_kept(self, module: str) -> str | None:
        """Why the linear `module` (a checkpoint name without `.weight`) is never quantized, or None."""
        return next((reason for pattern, reason in self.kept if re.fullmatch(pattern, module)), None)

    def engine_name(self, module: str) -> str:
        """Runtime name of vLLM's linear that contains `module` (a checkpoint name), which differs if it is fused."""
        name = self.runtime_name(module)
        component = self.component_of(module)
        for fused, members in component.fused.items() if component else ():
            for member in members:
                if name.endswith(f".{member}"):
                    return name.removesuffix(member) + fused
        return name

    def read(self, config: Config) -> tuple[Sizes, list[str]]:
        """Validated fields of a config.json with defaults, and its problems (invalid objects have no fields)."""
        values, problems = read_fields(config, (*self.fields, *_EVERYWHERE), "")
        sizes: dict[str, Values] = {"": values}
        for key, supported in self.parts.items():
            content = section(config, key) if key in self.flat else config.get(key)
            if not isinstance(content, dict):
                problems.append(f"{key}: expected an object, got {kind(content) if key in config else 'no value'}")
                continue
            name = content.get("model_type", next(iter(supported)))
            if not isinstance(name, str) or name not in supported:
                label = name if isinstance(name, str) else kind(name)
                problems.append(f"its {PART_NAMES[key]} is {label}; mmq supports {', '.join(supported)}")
                continue
            part = supported[name]
            values, wrong = read_fields(content, (*part.fields, *_EVERYWHERE), f"{key}.")
            problems += wrong or [f"{key}.{misfit}" for misfit in part.misfits(values)]
            sizes[key] = values | {"model_type": name}
        return sizes, problems or [*_two_image_tokens(config), *self.misfits(sizes)]


def _two_image_tokens(config: Config) -> list[str]:
    """A problem when config.json has both keys for the placeholder of a picture, with different values."""
    old, new = (config.get(key) for key in ("image_token_index", "image_token_id"))
    if None in (old, new) or old == new:
        return []
    return [f"image_token_index: {old}, but image_token_id is {new}: set both to the same value"]
