"""`Part`: the declaration of one kind of vision tower or text model, which families share; helpers for shapes."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from exporter.model.families.config_fields import MAX_ROWS, Field, Number, Values, read_fields

Shape = tuple[int, ...]
Shapes = dict[str, Shape]  # tensor name below the part's prefix -> shape

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")


def no_misfits(values: Values) -> list[str]:
    """No problems, for parts whose fields are independent."""
    return []


Role = Literal["attention", "mlp"]


@dataclass(frozen=True)
class Smoothing:
    """One exact fold: divides `source`'s output by s, and multiplies the input columns of every target by s.

    source, targets: names relative to the block. rows: the part of a fused source that feeds the targets, as
    (index, parts): (2, 3) is the last third of a fused qkv.
    """

    source: str
    targets: tuple[str, ...]
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Stack:
    """The equal blocks of a part, and the linears of one block.

    path: name of block `{i}` below the part. phases: linears in data order; linears of one phase share their input.
    attention: the linears whose role is attention; that of the others is mlp. smoothings: exact folds. fused: vLLM's
    linear -> the linears that it contains, which need one scheme. row_parallel: linears that tensor parallelism divides
    along their inputs. count: the field with the number of blocks. heads: the field with the number of attention heads.
    """

    path: str
    phases: tuple[tuple[str, ...], ...]
    attention: tuple[str, ...]
    row_parallel: tuple[str, ...]
    smoothings: tuple[Smoothing, ...] = ()
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    count: str = "num_hidden_layers"
    heads: str = "num_attention_heads"

    @property
    def roles(self) -> dict[str, Role]:
        """Role of each linear, in data order."""
        names = (name for phase in self.phases for name in phase)
        return {name: "attention" if name in self.attention else "mlp" for name in names}


@dataclass(frozen=True)
class Part:
    """One kind of vision tower or text model.

    fields: of its config. shapes: of all its tensors, as transformers builds them. stack: its blocks. misfits: problems
    between its fields. tiny: its object in a config for tests, with the real structure. tiny_top: what such a config
    needs at its top level for this part. inner: what hub checkpoints have between the family's prefix and the part's
    own names.
    """

    fields: tuple[Field, ...]
    shapes: Callable[[Values], Shapes]
    stack: Stack
    misfits: Callable[[Values], list[str]] = no_misfits
    tiny: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tiny_top: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    inner: str = ""


@dataclass(frozen=True)
class TinyProcessor:
    """A processor for the family's tiny configs, as tests write it into a model folder.

    library, pictures: names of transformers' classes for the processor and its image processor. settings: of the image
    processor. fields: of the processor. tokens: its special tokens, with falling ids from the largest one; the first
    one is the placeholder of a picture. prompt: what the chat template writes for a picture; None: no template.
    named: whether the tokenizer names its placeholder of a picture.
    """

    library: str
    pictures: str
    settings: Mapping[str, Any]
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tokens: tuple[str, ...] = ("<image>",)
    prompt: str | None = "<image>\n"
    named: bool = True


def linear(name: str, outputs: int, inputs: int, bias: bool = True) -> Shapes:
    """Shapes of one linear."""
    weight: Shapes = {f"{name}.weight": (outputs, inputs)}
    return weight | ({f"{name}.bias": (outputs,)} if bias else {})


def norm(name: str, width: int, bias: bool = True) -> Shapes:
    """Shapes of one norm."""
    weight: Shapes = {f"{name}.weight": (width,)}
    return weight | ({f"{name}.bias": (width,)} if bias else {})


def blocks(prefix: str, count: int, block: Shapes) -> Shapes:
    """Shapes of `count` equal blocks."""
    return {f"{prefix}.{i}.{name}": shape for i in range(count) for name, shape in block.items()}


def below(prefix: str, shapes: Shapes) -> Shapes:
    """The same shapes with `prefix` before the names."""
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def pad_token(default: int) -> Number:
    """The field of the padding token; null means that there is none."""
    return Number("pad_token_id", default, least=-1, most=MAX_ROWS, null=lambda values: 0)


def pad_misfit(values: Values) -> list[str]:
    """A problem when the padding token is outside of the embedding, which torch cannot build."""
    pad, rows = values["pad_token_id"], values["vocab_size"]
    return [f"pad_token_id: {pad} must be less than vocab_size {rows}"] if pad >= rows else []


def heads_misfit(values: Values) -> list[str]:
    """A problem when the number of attention heads does not divide the width."""
    width, heads = values["hidden_size"], values["num_attention_heads"]
    return [f"num_attention_heads: {heads} does not divide hidden_size {width}"] if width % heads else []


def tied_misfit(sizes: Mapping[str, Values], reason: str) -> list[str]:
    """A problem when the two flags for a tied output head differ. sizes: fields by object of config.json."""
    top, text = (sizes[key]["tie_word_embeddings"] for key in ("", "text_config"))
    differ = f"tie_word_embeddings: {json.dumps(top)}, but text_config.tie_word_embeddings is {json.dumps(text)}"
    return [f"{differ}; {reason}: set both to the same value"] if top != text else []


def ignored_tie(sizes: Mapping[str, Values]) -> list[str]:
    """A problem when only the text model's flag ties the head, for families whose top level decides."""
    reason = "transformers 5 reads the first one and older versions the second one"
    return tied_misfit(sizes, reason) if sizes["text_config"]["tie_word_embeddings"] else []


Parts = Mapping[str, Mapping[str, Part]]  # object of config.json -> `model_type` -> part, the default first


def section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object of config.json; older files of some models have the text model's keys at the top level instead."""
    content = config.get(key)
    return (
        content
        if isinstance(content, dict)
        else {name: value for name, value in config.items() if name != "model_type"}
    )


def part_of(parts: Parts, config: Mapping[str, Any], key: str) -> Part:
    """The part that a config.json names under `key`; the default one for a `model_type` that is not in `parts`."""
    kinds = parts[key]
    default = next(iter(kinds))
    return kinds.get(section(config, key).get("model_type", default), kinds[default])


def size_of(parts: Parts, config: Mapping[str, Any], key: str, name: str) -> Any:
    """Field `name` of a part's object in a validated config.json, or transformers' default.

    KeyError when the part has no such field.
    """
    return read_fields(section(config, key), part_of(parts, config, key).fields, "")[0][name]


def field_of(parts: Parts, key: str, name: str) -> Callable[[Mapping[str, Any]], int]:
    """A function from config.json to field `name` of the part under `key`."""
    return lambda config: int(size_of(parts, config, key, name))
