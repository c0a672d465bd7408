"""Tables of docs/reference/families.md: what mmq can do with each published checkpoint, from its headers alone."""

from collections.abc import Mapping
from math import prod
from typing import Any

from exporter.amounts import size
from exporter.formats import compressed_tensors
from exporter.model.config_check import known_family
from exporter.model.families import Component, Family
from exporter.numerics.quantized import Scheme
from exporter.planning.rule import Rule
from tests.headers.read import HEADER_NAMES, header, header_config

GROUPS = (128, 64, 32)  # the coarsest first
UNPUBLISHED = ("llava-1.5-shapes-34b",)  # the shapes of LLaVA-NeXT 34B in a plain LLaVA, for measurements
Shapes = Mapping[str, tuple[int, ...]]


def support_table() -> str:
    """Markdown: one row per published checkpoint of `tests/headers/`."""
    lines = [
        "| checkpoint | family | 16 bits | 8 / 4 bits | `vision` at 4 bits | `language` at 4 bits | kept in 16 bits |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = [(known_family(header_config(name), name), name) for name in HEADER_NAMES if name not in UNPUBLISHED]
    order = sorted(rows, key=lambda row: (row[0].name, row[1]))
    return "\n".join([*lines, *(_row(family, name) for family, name in order)])


def _row(family: Family, name: str) -> str:
    config, shapes = header_config(name), {tensor: shape for tensor, (_, shape) in header(name).items()}
    whole = 2 * sum(map(prod, shapes.values()))
    saved = 0
    for component, bits in (("vision", 8), ("language", 4)):
        part = {c.name: c for c in family.components}.get(component)
        saved += _saved(part, config, shapes, bits) if part else 0
    cells = [f"`{name.replace('--', '/')}`", f"`{family.name}`", size(whole), size(whole - saved)]
    cells += [_groups(family, component, config, shapes) for component in ("vision", "language")]
    return "| " + " | ".join([*cells, _kept(family, config)]) + " |"


def _linears(part: Component, config: Any) -> list[str]:
    """Names of the weights of all linears that vLLM can load packed."""
    return [
        f"{part.module(i, linear)}.weight"
        for i in range(part.used(config))
        for linear in part.linears_of(config, i)
        if not part.plain(config, linear)
    ]


def _saved(part: Component, config: Any, shapes: Shapes, bits: int) -> int:
    """Bytes that packing a component saves: 8 bits with a scale per row, fewer with the coarsest groups that fit."""
    total = 0
    for name in _linears(part, config):
        rows, columns = shapes[name]
        scheme = Scheme(8, "row") if bits == 8 else _four_bits(rows, columns)
        packed = compressed_tensors.stored_bytes(scheme, columns, rows, 2)
        total += 2 * rows * columns - packed
    return total


def _four_bits(rows: int, columns: int) -> Scheme:
    """4 bits with the coarsest groups that fit; one scale per row as `else: row` stores it."""
    rule = Rule.model_validate({"component": "", "bits": 4, "group_size": GROUPS[0], "else": "row"})
    schemes = [*(Scheme(4, group) for group in GROUPS), rule.fitted(columns).scheme()]
    return next(s for s in schemes if s and compressed_tensors.supports(s, columns, rows) is None)


def _groups(family: Family, component: str, config: Any, shapes: Shapes) -> str:
    """The coarsest groups for 4 bits, and the linears that need other ones."""
    part = {c.name: c for c in family.components}.get(component)
    if part is None:
        return "no such component"
    linears_by_group: dict[str, list[str]] = {}
    for linear in (linear for linear in part.linears_of(config, 0) if not part.plain(config, linear)):
        rows, columns = shapes[f"{part.module(0, linear)}.weight"]
        scheme = _four_bits(rows, columns)
        group = f"8 bits, {scheme.group_size}" if scheme.bits == 8 else str(scheme.group_size)
        linears_by_group.setdefault(group, []).append(linear)
    usual = max(linears_by_group, key=lambda group: len(linears_by_group[group]))
    others = [
        f"{group} for {', '.join(f'`{name}`' for name in names)}"
        for group, names in linears_by_group.items()
        if group != usual
    ]
    return "; ".join([f"groups of {usual}", *others])


def _kept(family: Family, config: Any) -> str:
    """What vLLM cannot load packed, with the reason."""
    reasons: dict[str, list[str]] = {}
    for part in family.components:
        if part.unpackable and part.used(config):
            reasons.setdefault(part.unpackable, []).append(part.name)
        for linear in part.linears_of(config, 0) if part.used(config) else ():
            if reason := part.plain(config, linear):
                reasons.setdefault(reason, []).append(linear)
    listed = [f"{', '.join(f'`{name}`' for name in names)}: {reason}" for reason, names in reasons.items()]
    return "; ".join(listed)
