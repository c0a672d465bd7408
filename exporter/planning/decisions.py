"""Decides for every checkpoint tensor, from recipe and headers, whether it is packed, stored dequantized, or kept."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from exporter.dtypes import BFLOAT16, Dtype
from exporter.formats import FORMATS
from exporter.model.checkpoint import Checkpoint, TensorInfo
from exporter.model.families import Component, Family
from exporter.numerics.quantized import Scheme
from exporter.planning.recipe import Recipe, Rule
from exporter.planning.refusals import Member, fallback_lines, refusal_lines
from exporter.planning.rule import KEEP

MAX_LISTED = 5  # problems of one kind that an error lists
Decision = Literal["packed", "dequantized", "kept"]


@dataclass(frozen=True)
class PlanRow:
    """One tensor of the checkpoint and the decision about it.

    component: the part of the model that the tensor belongs to ("" for embeddings, heads and norms outside of
    components). block: checkpoint prefix of its block. linear: name of the linear inside the block. rule: the recipe
    rule that quantizes it. reason: why it is not packed. bytes_after: its size in the artifact.
    """

    tensor: TensorInfo
    decision: Decision
    reason: str = ""
    component: str = ""
    block: str = ""
    linear: str = ""
    rule: Rule | None = None
    bytes_after: int = 0

    @property
    def scheme(self) -> Scheme | None:
        """The quantization scheme; None when the tensor is kept."""
        return self.rule.scheme() if self.rule else None

    @property
    def module(self) -> str:
        """Checkpoint name of the linear, without `.weight`."""
        return self.tensor.name.removesuffix(".weight")


@dataclass(frozen=True)
class Decisions:
    """A row for every tensor, with the problems of the recipe.

    used: indices of the rules that match a linear. fallbacks: lines about linears that a rule's `else` applies to.
    """

    rows: list[PlanRow]
    used: set[int]
    problems: list[str]
    fallbacks: list[str]


def decide(recipe: Recipe, checkpoint: Checkpoint, family: Family) -> Decisions:
    """Decide every tensor."""
    problems: list[str] = []
    places = _places(checkpoint, family, problems)
    rows, inputs = [], dict[int, set[int]]()
    refused, changed = dict[str, list[Member]](), list[Member]()
    for tensor in checkpoint.tensors.values():
        module = tensor.name.removesuffix(".weight")
        place = places.get(module) if tensor.name.endswith(".weight") else None
        if place is None:
            reason = family.reason_kept(module) or _reason_not_linear(tensor, family, checkpoint.config)
            part = family.component_of(tensor.name)
            rows.append(PlanRow(tensor, "kept", reason, part.name if part else "", bytes_after=tensor.bytes))
            continue
        component, index, linear = place
        number, rule = _first_match(recipe, component, index, linear, checkpoint.config)
        plain = component.plain(checkpoint.config, linear)
        row = _linear_row(tensor, component, index, linear, rule, recipe.format, plain, problems)
        rows.append(row)
        if number is None or rule is None:
            continue
        of_rule, columns = inputs.setdefault(number, set()), tensor.shape[-1] if tensor.shape else 0
        if row.reason and row.reason == plain:
            continue
        of_rule.add(columns)
        member = (number, linear, columns)
        if row.decision == "packed" and (refusal := _refusal(row, recipe.format)):
            refused.setdefault(refusal, []).append(member)
        elif rule.fallback and rule.leaves_columns(columns):
            changed.append(member)
    order = {(component.name, name): i for component in family.components for i, name in enumerate(component.linears)}

    def in_data_order(members: list[Member]) -> list[Member]:
        return sorted(members, key=lambda member: (member[0], order[recipe.quantize[member[0]].component, member[1]]))

    refused = {reason: in_data_order(members) for reason, members in refused.items()}
    problems += refusal_lines(recipe, refused, inputs)
    return Decisions(rows, set(inputs), problems, fallback_lines(recipe, in_data_order(changed)))


def _places(checkpoint: Checkpoint, family: Family, problems: list[str]) -> dict[str, tuple[Component, int, str]]:
    """Module name -> (component, block index, name inside the block) of every linear that a forward pass runs.

    Appends a problem for every linear without a 16- or 32-bit matrix in the checkpoint.
    """
    places = {}
    wrong = []
    for component in family.components:
        for i in range(component.used(checkpoint.config)):
            for linear in component.linears_of(checkpoint.config, i):
                module = component.module(i, linear)
                info = checkpoint.tensors.get(f"{module}.weight")
                if info is None or len(info.shape) != 2 or not info.dtype.is_floating_point or info.dtype.itemsize == 1:
                    actual = f"has {info.dtype} {list(info.shape)}" if info else "does not have it"
                    wrong.append(f"{module}.weight: expected a 16-bit or 32-bit matrix, but the checkpoint {actual}")
                places[module] = (component, i, linear)
    problems += wrong[:MAX_LISTED]
    if len(wrong) > MAX_LISTED:
        problems.append(f"and {len(wrong) - MAX_LISTED} more of the same kind")
    return places


def _first_match(
    recipe: Recipe, component: Component, index: int, linear: str, config: Any
) -> tuple[int | None, Rule | None]:
    for number, rule in enumerate(recipe.quantize):
        role_fits = rule.role is None or rule.role == component.roles[linear]
        if rule.component == component.name and role_fits and rule.matches_block(index, component.used(config)):
            return number, rule
    return None, None


def _linear_row(
    tensor: TensorInfo,
    component: Component,
    index: int,
    linear: str,
    rule: Rule | None,
    format_name: str,
    plain: str | None,
    problems: list[str],
) -> PlanRow:
    """The decision about a linear. plain: why vLLM builds it in 16 bits, or None."""
    row = PlanRow(tensor, "kept", "", component.name, component.block(index), linear, bytes_after=tensor.bytes)
    if rule is None or rule.bits == 16 or len(tensor.shape) != 2:
        return replace(row, reason="the recipe keeps it in 16 bits" if rule else "no rule of the recipe matches it")
    if plain and rule.store != "dequantized":
        return replace(row, reason=plain)
    columns, rule = tensor.shape[1], rule.fitted(tensor.shape[1])
    if rule.bits == 16:
        return replace(row, reason=f"groups of {rule.group_size} do not divide its {columns} inputs (else: {KEEP})")
    if component.without_data and rule.needs_data:
        problems.append(f"component '{component.name}', method {rule.method}: {component.without_data}")
    if rule.store == "dequantized":
        size = tensor.size * stored_scale_dtype(tensor.dtype).itemsize
        reason = f"quantized values, stored in 16 bits: {component.unpackable or 'the recipe has store: dequantized'}"
        return replace(row, decision="dequantized", reason=reason, rule=rule, bytes_after=size)
    scheme = rule.scheme()
    assert scheme is not None
    if component.unpackable and rule.store != "plugin":
        remedy = "remove the rule, or add `store: dequantized`, or `store: plugin` for a vLLM with mmq's plugin"
        problems.append(f"component '{component.name}': {component.unpackable}; {remedy}")
    if rule.store == "plugin" and not component.unpackable:
        problems.append(f"component '{component.name}' needs no plugin in vLLM: remove `store: plugin`")
    if component.formats and format_name not in component.formats:
        supported = ", ".join(component.formats)
        problems.append(
            f"component '{component.name}': vLLM loads it packed only in format {supported}, not {format_name}"
        )
    scale_bytes = stored_scale_dtype(tensor.dtype).itemsize
    size = FORMATS[format_name].stored_bytes(scheme, columns, tensor.shape[0], scale_bytes)
    return replace(row, decision="packed", rule=rule, bytes_after=size)


def _refusal(row: PlanRow, format_name: str) -> str | None:
    """Why the format cannot store a packed linear, or None."""
    assert row.scheme is not None
    return FORMATS[format_name].supports(row.scheme, row.tensor.shape[1], row.tensor.shape[0])


def stored_scale_dtype(weight: Dtype) -> Dtype:
    """Dtype of stored scales: that of a 16-bit weight, bfloat16 for float32 weights."""
    return weight if weight.itemsize == 2 else BFLOAT16


def _reason_not_linear(tensor: TensorInfo, family: Family, config: Any) -> str:
    for component in family.components:
        for i in range(component.used(config), component.stored(config)):
            if tensor.name.startswith(component.block(i) + "."):
                return component.unused
    if tensor.name.endswith(".bias"):
        return "bias"
    if "embed" in tensor.name:
        return "embedding: vLLM cannot load it packed"
    return "norm" if len(tensor.shape) == 1 else "mmq does not quantize this linear"
