"""What mmq knows of a model family: data tables and small pure functions, no behavior.

Names: a *checkpoint name* is the tensor's name on the hub and the only identity; the live module name (in the
transformers class) and the runtime name (inside vLLM) are derived from it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from exporter.files.strict_json import kind
from exporter.model.families.config_fields import Choice, Field, Number, Section, Values, read_fields
from exporter.model.families.parts.part import Part, Shapes

Role = Literal["attention", "mlp"]
Config = Mapping[str, Any]  # a parsed config.json
Inputs = Mapping[str, Any]  # a batch as the processor makes it: names and tensors
Sizes = Mapping[str, Values]  # the checked fields of a config.json: of its objects by key, of itself under ""

PART_NAMES = {"vision_config": "vision tower", "qformer_config": "Q-Former", "text_config": "text model"}
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_DTYPES = ("float32", "float16", "bfloat16", "float64")
# Keys of any object: transformers makes two entries for each label, and loads code from the hub for other attention.
_EVERYWHERE: tuple[Field, ...] = (
    Number("num_labels", 2, least=0, most=10**5),
    Choice("_attn_implementation", "sdpa", _ATTENTION, null=True),
    Choice("attn_implementation", "sdpa", _ATTENTION, null=True),
    Choice("dtype", "float32", _DTYPES, null=True),
    Choice("torch_dtype", "float32", _DTYPES, null=True),
    Section("auto_map"),
)


@dataclass(frozen=True)
class Smoothing:
    """One exact fold: divide `source`'s output by s, multiply the input columns of every target by s.

    source, targets: names relative to the block. rows: which part of a fused source feeds the targets,
    as (index, parts): (2, 3) is the last third of a fused qkv.
    """

    source: str
    targets: tuple[str, ...]
    rows: tuple[int, int] | None = None


def run_whole(model: Any, inputs: Inputs) -> Any:
    """The model's own forward pass."""
    return model(**inputs, use_cache=False)


def logits(model: Any, inputs: Inputs) -> Any:
    """Scores of the next token, `[batch, tokens, vocabulary]`."""
    return run_whole(model, inputs).logits


@dataclass(frozen=True)
class Pass:
    """One way in which the model reaches a component.

    run: calls the model on a batch (calibration stops it at the component's first block).
    padded: what the first block receives is `[batch, tokens, in]` with padding, and its last tokens are those that the
    attention mask is about (whatever comes before them is never padding).
    """

    run: Callable[[Any, Inputs], Any] = run_whole
    padded: bool = False


@dataclass(frozen=True)
class Component:
    """A part of the model that is quantized as a chain of blocks.

    blocks: checkpoint prefix of block `{i}`; a component of one block has no `{i}`, and one that is a single linear
    has that linear's name here and as its only linear.
    used: blocks that run at inference; stored: blocks the checkpoint holds (the rest is kept, with `unused`).
    phases: linears of a block in the order the data meets them; members of one phase share their input.
    has: whether block `i` has a linear, for components whose blocks differ.
    target: pattern that finds block `{i}` under its runtime name and its live name alike (what configs are made of).
    tokens: rows of its input that one sample makes over all passes, to predict memory.
    context: values that one sample's blocks are given beside their input over all passes (what cross-attention reads).
    passes: how calibration reaches it; every pass over a batch makes inputs of its first block.
    unpadded: linears whose input never holds padding even when the block's does; the others receive the block's last
    tokens, or all of them.
    fused: runtime module -> the linears the serving engine fuses into it; these must share one scheme.
    unpackable: None, or why the serving engine cannot load this component packed.
    formats: the formats in which the serving engine loads it packed; None: all.
    without_data: None, or why only methods that need no calibration data can quantize it.
    """

    name: str
    blocks: str
    used: Callable[[Config], int]
    stored: Callable[[Config], int]
    phases: tuple[tuple[str, ...], ...]
    roles: Mapping[str, Role]
    target: str
    tokens: Callable[[Config], int]
    has: Callable[[Config, int, str], bool] = lambda config, i, linear: True
    context: Callable[[Config], int] = lambda config: 0
    passes: tuple[Pass, ...] = (Pass(),)
    unpadded: frozenset[str] = frozenset()
    unused: str = ""
    smoothings: tuple[Smoothing, ...] = ()
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unpackable: str | None = None
    formats: tuple[str, ...] | None = None
    without_data: str | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear that a block may have, in data order."""
        return tuple(name for phase in self.phases for name in phase)

    def linears_of(self, config: Config, i: int) -> tuple[str, ...]:
        """The linears of block `i`, in data order."""
        return tuple(name for name in self.linears if self.has(config, i, name))

    def module(self, i: int, linear: str) -> str:
        """Checkpoint name of a linear of block `i`, without `.weight`."""
        return self.block(i) if linear == self.blocks else f"{self.block(i)}.{linear}"

    def block(self, i: int) -> str:
        """Checkpoint prefix of block `i`."""
        return self.blocks.format(i=i)

    @property
    def prefix(self) -> str:
        """What the checkpoint names of all its blocks begin with, without the number and the point before it."""
        return self.blocks.partition("{i}")[0].rstrip(".")

    def holds(self, name: str) -> bool:
        """Whether a tensor or module of this checkpoint name lies in one of its blocks."""
        return f"{name}.".startswith(f"{self.prefix}.")


@dataclass(frozen=True)
class Family:
    """Everything that differs between model families.

    architectures: values of config.json's `architectures` it answers to.
    components: in data order, upstream first.
    kept: linears that are never quantized: pattern over checkpoint names (without `.weight`) and the reason.
    canonical_name: maps names that other savers wrote to the hub's own names.
    live_name, runtime_name: checkpoint name -> name in the transformers class / inside vLLM.
    config_class: name of the transformers class that a config.json becomes.
    skeleton: config -> transformers model, built under whatever default device is set.
    tiny_config: a config small enough for tests, with the real structure.
    question_prompt has `{question}`; fallback_prompt (for processors without chat template) has `{text}`.
    image_tokens: places that a picture takes among the tokens of a prompt.
    positions: tokens that the model can take at most, the picture's among them.
    vocabulary: tokens that the model has embeddings of.
    picture_side: width and height in pixels of what the vision tower takes.
    processor_fields: settings of the processor that follow from config.json.
    image_marker: what stands for a picture in prompts.
    reply_end: what ended replies in the model's training: None for the tokenizer's end token, "" for nothing.
    outputs: all that the model says about a batch, as one tensor: what two loadings of it must agree in.
    refuses: why mmq cannot take a model of this family, from its config.json; None when it can.
    float32: beginnings of checkpoint names that transformers computes in float32 whatever dtype is asked for.
    unserved: why the serving engine cannot open this family at all; such artifacts are for transformers.
    parts: object of config.json -> `model_type` -> the part; the first is what counts when none is named.
    fields: what mmq reads of config.json beside its parts' objects.
    misfits: which fields do not fit each other.
    shapes: of all tensors that a checkpoint holds, by checkpoint name, as transformers builds them.
    tied: output head -> the embedding that it may be one tensor with; such a head may be stored or not.
    """

    name: str
    architectures: tuple[str, ...]
    components: tuple[Component, ...]
    kept: tuple[tuple[str, str], ...]
    canonical_name: Callable[[str], str]
    live_name: Callable[[str], str]
    runtime_name: Callable[[str], str]
    config_class: str
    skeleton: Callable[[Config], Any]
    tiny_config: Callable[[], Config]
    question_prompt: str
    caption_prompt: str
    fallback_prompt: str
    max_new_tokens: Mapping[str, int]
    tasks: tuple[str, ...]
    image_tokens: Callable[[Config], int]
    positions: Callable[[Config], int]
    vocabulary: Callable[[Config], int]
    picture_side: Callable[[Config], int]
    processor_fields: Callable[[Config], Mapping[str, Any]] = lambda config: {}
    image_marker: str = "<image>"
    reply_end: str | None = None
    outputs: Callable[[Any, Inputs], Any] = logits
    refuses: Callable[[Config], str | None] = lambda config: None
    float32: tuple[str, ...] = ()
    unserved: str = ""
    parts: Mapping[str, Mapping[str, Part]] = field(default_factory=dict)
    fields: tuple[Field, ...] = ()
    misfits: Callable[[Sizes], list[str]] = lambda sizes: []
    shapes: Callable[[Sizes], Shapes] = lambda sizes: {}
    tied: Mapping[str, str] = field(default_factory=dict)

    def component(self, name: str) -> Component:
        """The component called `name` (KeyError when there is none)."""
        return {component.name: component for component in self.components}[name]

    def component_of(self, name: str) -> Component | None:
        """The component whose blocks hold a tensor or module of this checkpoint name, also a norm; None outside."""
        return next((component for component in self.components if component.holds(name)), None)

    def text(self, question: str | None) -> str:
        """What a user says beside the picture: the question in the family's wording, or the request for a caption."""
        return self.caption_prompt if question is None else self.question_prompt.format(question=question)

    def reason_kept(self, module: str) -> str | None:
        """Why the linear `module` (a checkpoint name without `.weight`) is never quantized, or None."""
        return next((reason for pattern, reason in self.kept if re.fullmatch(pattern, module)), None)

    def engine_name(self, module: str) -> str:
        """Runtime name of the linear that `module` (a checkpoint name) becomes: the fused one's if it is fused."""
        name = self.runtime_name(module)
        component = self.component_of(module)
        for fused, members in component.fused.items() if component else ():
            for member in members:
                if name.endswith(f".{member}"):
                    return name.removesuffix(member) + fused
        return name

    def read(self, config: Config) -> tuple[Sizes, list[str]]:
        """Fields of a config.json with their defaults, and what is wrong with it (some fields may then be absent)."""
        values, problems = read_fields(config, (*self.fields, *_EVERYWHERE), "")
        sizes: dict[str, Values] = {"": values}
        for key, known in self.parts.items():
            section = config.get(key)
            if not isinstance(section, dict):
                problems.append(f"{key}: expected an object, it is {kind(section) if key in config else 'absent'}")
                continue
            name = section.get("model_type", next(iter(known)))
            if not isinstance(name, str) or name not in known:
                named = name if isinstance(name, str) else kind(name)
                problems.append(f"its {PART_NAMES[key]} is {named}; mmq takes {', '.join(known)}")
                continue
            part = known[name]
            values, wrong = read_fields(section, (*part.fields, *_EVERYWHERE), f"{key}.")
            problems += wrong or [f"{key}.{misfit}" for misfit in part.misfits(values)]
            sizes[key] = values | {"model_type": name}
        return sizes, problems or self.misfits(sizes)
