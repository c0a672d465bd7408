"""One kind of tower or text model: the fields of its config, and the shapes of its tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from exporter.model.families.config_fields import MOST_ROWS, Field, Number, Values

Shape = tuple[int, ...]
Shapes = dict[str, Shape]  # tensor name below the part's prefix -> shape

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")


def no_misfits(values: Values) -> list[str]:
    """All fields fit each other."""
    return []


@dataclass(frozen=True)
class Part:
    """One kind of tower or text model.

    fields: what its config holds. shapes: of all its tensors, as transformers builds them. misfits: which fields do not
    fit each other.
    """

    fields: tuple[Field, ...]
    shapes: Callable[[Values], Shapes]
    misfits: Callable[[Values], list[str]] = no_misfits

    def field(self, key: str) -> Field:
        """The field called `key` (KeyError when there is none)."""
        return {field.key: field for field in self.fields}[key]


def linear(name: str, outputs: int, inputs: int, bias: bool = True) -> Shapes:
    """Tensors of one linear."""
    weight: Shapes = {f"{name}.weight": (outputs, inputs)}
    return weight | ({f"{name}.bias": (outputs,)} if bias else {})


def norm(name: str, width: int, bias: bool = True) -> Shapes:
    """Tensors of one norm."""
    weight: Shapes = {f"{name}.weight": (width,)}
    return weight | ({f"{name}.bias": (width,)} if bias else {})


def blocks(prefix: str, count: int, block: Shapes) -> Shapes:
    """Tensors of `count` equal blocks."""
    return {f"{prefix}.{i}.{name}": shape for i in range(count) for name, shape in block.items()}


def below(prefix: str, shapes: Shapes) -> Shapes:
    """The same tensors below `prefix`."""
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def pad_token(default: int) -> Number:
    """The token of padding; null where there is none."""
    return Number("pad_token_id", default, least=-1, most=MOST_ROWS, null=lambda values: 0)


def pad_misfit(values: Values) -> list[str]:
    """A token of padding that the embedding does not have: it cannot be built."""
    pad, rows = values["pad_token_id"], values["vocab_size"]
    return [f"pad_token_id: {pad}, and vocab_size is {rows}"] if pad >= rows else []


def heads_misfit(values: Values) -> list[str]:
    """Attention heads that do not divide the width."""
    width, heads = values["hidden_size"], values["num_attention_heads"]
    return [f"num_attention_heads: {heads} heads do not divide hidden_size {width}"] if width % heads else []


def part_of(parts: Mapping[str, Mapping[str, Part]], config: Mapping[str, Any], key: str) -> Part:
    """The part that a checked config.json names under `key`. parts: key -> `model_type` -> part, the default first."""
    known = parts[key]
    return known[config[key].get("model_type", next(iter(known)))]


def size_of(parts: Mapping[str, Mapping[str, Part]], config: Mapping[str, Any], key: str, name: str) -> Any:
    """Field `name` of a part's object in a checked config.json, by default what transformers takes."""
    return part_of(parts, config, key).field(name).of(config[key])
