"""The data that describes a model family: `Family`, its `Component`s, smoothings and passes.

Names: a *checkpoint name* is the tensor's name on the hub, which identifies it; the live name (in the transformers
class) and the runtime name (inside vLLM) are derived from it.
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
Inputs = Mapping[str, Any]  # the processor's output for a batch: name -> tensor
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
)


@dataclass(frozen=True)
class Smoothing:
    """One exact fold: divides `source`'s output by s, and multiplies the input columns of every target by s.

    source, targets: names relative to the block. rows: the part of a fused source that feeds the targets, as
    (index, parts): (2, 3) is the last third of a fused qkv.
    """

    source: str
    targets: tuple[str, ...]
    rows: tuple[int, int] | None = None


def run_whole(model: Any, inputs: Inputs) -> Any:
    """Run the model's own forward pass."""
    return model(**inputs, use_cache=False)


def logits(model: Any, inputs: Inputs) -> Any:
    """Logits of the next token, `[batch, tokens, vocabulary]`."""
    return run_whole(model, inputs).logits


@dataclass(frozen=True)
class Pass:
    """One way in which the model runs a component.

    run: calls the model on a batch (calibration stops it at the component's first block).
    padded: whether the first block's input is `[batch, tokens, in]` with padding; its last tokens are those of the
    attention mask, and tokens before them are never padding.
    """

    run: Callable[[Any, Inputs], Any] = run_whole
    padded: bool = False


@dataclass(frozen=True)
class Component:
    """A part of the model that is quantized as a chain of blocks.

    blocks: checkpoint prefix of block `{i}`. A component of one block has no `{i}`; one that is a single linear has the
    linear's name here and as its only linear.
    used: number of blocks that run at inference.
    stored: number of blocks in the checkpoint; unused ones are kept, for the reason `unused`.
    phases: linears of a block in data order; linears of one phase share their input.
    roles: role of each linear.
    has: whether block `i` has a linear, for components whose blocks differ.
    target: pattern that matches block `{i}` by its runtime name and its live name, for quantization configs.
    tokens: number of input rows per sample over all passes, to predict memory.
    context: number of values per sample that blocks receive besides their input over all passes (cross-attention).
    passes: how calibration runs the component; every pass over a batch gives inputs of its first block.
    unpadded: linears whose input has no padding even if the block's input has; other linears receive the block's
    last tokens, or all of them.
    fused: runtime module -> the linears that vLLM fuses into it, which must share one scheme.
    unpackable: why vLLM cannot load this component packed, or None.
    formats: the formats in which vLLM loads it packed; None: all.
    without_data: why only methods without calibration data can quantize it, or None.
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
        """All linears that a block can have, in data order."""
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
        """The common prefix of the checkpoint names of all its blocks, without the final dot."""
        return self.blocks.partition("{i}")[0].rstrip(".")

    def holds(self, name: str) -> bool:
        """Whether a tensor or module with this checkpoint name is in one of its blocks."""
        return f"{name}.".startswith(f"{self.prefix}.")


@dataclass(frozen=True)
class Family:
    """Everything that differs between model families.

    architectures: values of config.json's `architectures` that select the family.
    components: in data order, upstream first.
    kept: linears that are never quantized: pattern over checkpoint names (without `.weight`), and the reason.
    canonical_name: maps names that other programs saved to the hub's names.
    live_name, runtime_name: checkpoint name -> name in the transformers class / inside vLLM.
    config_class: name of the transformers config class.
    skeleton: config -> transformers model, built on the current default device.
    tiny_config: a small config for tests with the real structure.
    question_prompt contains `{question}`, fallback_prompt (for processors without chat template) `{text}`.
    image_tokens: number of tokens of a picture in a prompt.
    positions: the largest number of tokens of the model, including those of the picture.
    vocabulary: the number of tokens that the model has embeddings for.
    picture_side: width and height in pixels of the vision tower's input.
    processor_fields: settings of the processor that follow from config.json.
    image_marker: the placeholder of a picture in prompts.
    reply_end: the text that ended replies in training: None for the tokenizer's end token, "" for no text.
    outputs: all outputs of the model for a batch as one tensor, to compare two loadings of it.
    refuses: why mmq does not support a model of this family, from its config.json, or None.
    float32: prefixes of checkpoint names that transformers always computes in float32.
    unserved: why vLLM cannot load this family, or ""; its artifacts are for transformers.
    parts: object of config.json -> `model_type` -> the part; the first is the default.
    fields: the fields that mmq reads from config.json's top level.
    misfits: problems between fields of different objects.
    shapes: shapes of all tensors of a checkpoint, by checkpoint name, as transformers builds them.
    tied: output head -> the embedding that can share its tensor; such a head may be stored or not.
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
        """The component with this tensor or module in its blocks, by checkpoint name; None when it is in none."""
        return next((component for component in self.components if component.holds(name)), None)

    def text(self, question: str | None) -> str:
        """The user's text next to the picture: the question in the family's wording, or the caption request."""
        return self.caption_prompt if question is None else self.question_prompt.format(question=question)

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
            section = config.get(key)
            if not isinstance(section, dict):
                problems.append(f"{key}: expected an object, got {kind(section) if key in config else 'no value'}")
                continue
            name = section.get("model_type", next(iter(supported)))
            if not isinstance(name, str) or name not in supported:
                label = name if isinstance(name, str) else kind(name)
                problems.append(f"its {PART_NAMES[key]} is {label}; mmq supports {', '.join(supported)}")
                continue
            part = supported[name]
            values, wrong = read_fields(section, (*part.fields, *_EVERYWHERE), f"{key}.")
            problems += wrong or [f"{key}.{misfit}" for misfit in part.misfits(values)]
            sizes[key] = values | {"model_type": name}
        return sizes, problems or self.misfits(sizes)
