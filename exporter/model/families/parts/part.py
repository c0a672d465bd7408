"""`Part`: the config fields and tensor shapes of one kind of vision tower or text model; helpers to build shapes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from exporter.model.families.config_fields import MAX_ROWS, Field, Number, Values

Shape = tuple[int, ...]
Shapes = dict[str, Shape]  # tensor name below the part's prefix -> shape

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")


def no_misfits(values: Values) -> list[str]:
    """No problems, for parts whose fields are independent."""
    return []


@dataclass(frozen=True)
class Part:
    """One kind of vision tower or text model.

    fields: of its config. shapes: of all its tensors, as transformers builds them. misfits: problems between its
    fields.
    """

    fields: tuple[Field, ...]
    shapes: Callable[[Values], Shapes]
    misfits: Callable[[Values], list[str]] = no_misfits

    def field(self, key: str) -> Field:
        """The field with this key (KeyError when there is none)."""
        return {field.key: field for field in self.fields}[key]


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


def part_of(parts: Mapping[str, Mapping[str, Part]], config: Mapping[str, Any], key: str) -> Part:
    """The part that a validated config.json names under `key`.

    parts: key -> `model_type` -> part, the default first.
    """
    kinds = parts[key]
    return kinds[config[key].get("model_type", next(iter(kinds)))]


def size_of(parts: Mapping[str, Mapping[str, Part]], config: Mapping[str, Any], key: str, name: str) -> Any:
    """Field `name` of a part's object in a validated config.json, or transformers' default."""
    return part_of(parts, config, key).field(name).of(config[key])
