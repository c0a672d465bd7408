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
WIDTHS = ({"vision": 8, "language": 4}, {"vision": 4, "language": 3})
Shapes = Mapping[str, tuple[int, ...]]


def support_table() -> str:
    """Markdown: one row per published checkpoint of `tests/headers/`."""
    lines = [
        "| checkpoint | family | 16 bits | 8 / 4 bits | 4 / 3 bits | `vision` in 4 | `language` in 4 bits | kept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = [(known_family(header_config(name), name), name) for name in HEADER_NAMES if name not in UNPUBLISHED]
    order = sorted(rows, key=lambda row: (row[0].name, row[1]))
    return "\n".join([*lines, *(_row(family, name) for family, name in order)])


def _row(family: Family, name: str) -> str:
    config, shapes = header_config(name), {tensor: shape for tensor, (_, shape) in header(name).items()}
    cells = [f"`{name.replace('--', '/')}`", f"`{family.name}`", *map(size, sizes_of(name))]
    cells += [_groups(family, component, config, shapes) for component in ("vision", "language")]
    return "| " + " | ".join([*cells, _kept(family, config)]) + " |"


def sizes_of(name: str) -> tuple[int, int, int]:
    """Bytes of a published checkpoint's tensors: in 16 bits, and with `WIDTHS` in `vision` and `language`."""
    config, shapes = header_config(name), {tensor: shape for tensor, (_, shape) in header(name).items()}
    parts = {part.name: part for part in known_family(config, name).components}
    whole = 2 * sum(map(prod, shapes.values()))
    smaller = [
        whole - sum(_saved(parts[key], config, shapes, bits) for key, bits in widths.items() if key in parts)
        for widths in WIDTHS
    ]
    return whole, smaller[0], smaller[1]


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
        scheme = Scheme(8, "row") if bits == 8 else _grouped(bits, rows, columns)
        packed = compressed_tensors.stored_bytes(scheme, columns, rows, 2)
        total += 2 * rows * columns - packed
    return total


def _grouped(bits: int, rows: int, columns: int) -> Scheme:
    """The coarsest groups that fit; one scale per row as `else: row` stores it."""
    rule = Rule.model_validate({"component": "", "bits": bits, "group_size": GROUPS[0], "else": "row"})
    schemes = [*(Scheme(bits, group) for group in GROUPS), rule.fitted(columns).scheme()]
    return next(s for s in schemes if s and compressed_tensors.supports(s, columns, rows) is None)


def _groups(family: Family, component: str, config: Any, shapes: Shapes) -> str:
    """The coarsest groups for 4 bits, and the linears that need other ones."""
    part = {c.name: c for c in family.components}.get(component)
    if part is None:
        return "no such component"
    linears_by_group: dict[str, list[str]] = {}
    for linear in (linear for linear in part.linears_of(config, 0) if not part.plain(config, linear)):
        rows, columns = shapes[f"{part.module(0, linear)}.weight"]
        scheme = _grouped(4, rows, columns)
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
