"""SVG charts of the HTML report, inline: sizes, changes of scores, errors by block.

Shapes stretch with the page (`preserveAspectRatio="none"`), so visible text stays in the HTML around them.
Screen readers get the `aria-label`. Colors come from the page's CSS classes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

LEAST_REACH = 0.02  # the axis covers at least 2 % on each side, so that small noise looks small
STEPS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # distances between the marks of an axis
MOST_TICKS = 6  # marks that fit beside each other at 400 px
DATA_ORDER = ("vision", "qformer", "projector", "language", "head")  # components that the data passes, in this order
LEAST_BLOCKS = 8  # minimum number of bars the width is divided into, so that two blocks do not fill the page


def _svg(width: float, height: float, kind: str, label: str, shapes: Sequence[str]) -> Markup:
    start = '<svg class="{}" viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-label="{}">'
    return Markup(start).format(kind, width, height, label) + Markup("".join(shapes)) + Markup("</svg>")


def _bar(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> str:
    text = Markup("<title>{}</title>").format(title) if title else ""
    return f'<rect class="{kind}" x="{x:z.2f}" y="{y:z.2f}" width="{width:z.2f}" height="{height:z.2f}">{text}</rect>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}"/>'


def sizes(before: int, after: int, components: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    """Rows of the chart of sizes: name, bytes of source and artifact, share that is kept in 16 bits, and two bars.

    The first row is the whole; the others are in the order of the data. Lengths are proportional to the bytes: of the
    source's whole in the first row, of the largest component in the others.
    """
    rows = [_size_row("whole model", before, after, sum(c["kept"] for c in components.values()), max(before, after, 1))]
    most = max([1, *(max(c["before"], c["after"]) for c in components.values())])
    ordered = sorted(components, key=lambda name: DATA_ORDER.index(name) if name in DATA_ORDER else len(DATA_ORDER))
    parts = [(name, components[name]) for name in ordered]
    return rows + [_size_row(name, c["before"], c["after"], c["kept"], most) for name, c in parts]


def _size_row(name: str, before: int, after: int, kept: int, most: int) -> dict[str, Any]:
    shapes = [
        _bar(0, 1, 100 * before / most, 8, "quiet", f"source {before:,} bytes"),
        _bar(0, 11, 100 * kept / most, 8, "kept", f"kept unchanged {kept:,} bytes"),
        _bar(100 * kept / most, 11, 100 * (after - kept) / most, 8, "strong", f"artifact {after:,} bytes"),
    ]
    label = f"{name}: the artifact takes {after / max(before, 1):.0%} of the source's bytes"
    return {
        "name": name,
        "before": before,
        "after": after,
        "kept": kept,
        "chart": _svg(100, 20, "sizes", label, shapes),
    }


def reach(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Limits (low, high) of the axis that all `change` charts share, relative to the full-precision score."""
    ends = [row["relative"][key] for row in rows if row["relative"] for key in ("low", "high")]
    allowed = [row["allowed"] for row in rows if row["allowed"] is not None]
    low, high = min([-LEAST_REACH, *ends, *allowed]), max([LEAST_REACH, *ends])
    return low - 0.1 * (high - low), high + 0.05 * (high - low)


def ticks(axis: tuple[float, float]) -> list[dict[str, Any]]:
    """Marks of an axis at round values, at most six (eleven above 600 %): text, and place in percent of its width."""
    span = axis[1] - axis[0]
    wide = 10.0 ** math.floor(math.log10(span))  # shares of a full-precision score near 0 may have any size
    step = next((step for step in STEPS if span / step <= MOST_TICKS), wide)
    numbers = range(math.ceil(axis[0] / step), math.floor(axis[1] / step) + 1)
    digits = 0 if step >= 0.01 else 1
    return [{"text": f"{100 * n * step:+.{digits}f} %" if n else "0", "place": _place(n * step, axis)} for n in numbers]


def _place(share: float, axis: tuple[float, float]) -> float:
    return 100 * (share - axis[0]) / (axis[1] - axis[0])


def change(row: Mapping[str, Any], axis: tuple[float, float]) -> Markup:
    """Chart of one metric: ticks, zero, interval, measured change, and the gate's bound with the range it forbids.

    Empty without a baseline.
    """
    relative = row["relative"]
    if not relative:
        return Markup("")
    shapes = [_line(tick["place"], 0, tick["place"], 20, "tick") for tick in ticks(axis)]
    bound = ""
    if row["allowed"] is not None:
        place = _place(row["allowed"], axis)
        shapes = [_bar(0, 0, place, 20, "forbidden"), *shapes, _line(place, 0, place, 20, "bound")]
        bound = f", the gate allows {row['allowed']:+z.1%}"
    low, middle, high = (_place(relative[key], axis) for key in ("low", "change", "high"))
    shapes += [_line(_place(0, axis), 0, _place(0, axis), 20, "zero")]
    shapes += [_bar(low, 7, max(high - low, 0.4), 6, f"interval {row['tone']}"), _line(middle, 3, middle, 17, "mark")]
    interval = f"{relative['low']:+z.1%} to {relative['high']:+z.1%}"
    label = f"{row['name']}: change {relative['change']:+z.1%}, interval {interval}{bound}"
    return _svg(100, 20, "change", label, shapes)


def _highest(rows: Sequence[Mapping[str, Any]]) -> float:
    return max(*(float(row["largest"]) for row in rows), 1e-12)


def block_axes(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Marks of the chart `blocks`: `errors` from the top, and `numbers` of at most eight blocks; places in percent."""
    largest, count = _highest(rows), len(rows)
    errors = [{"text": f"{largest * share:.4f}" if share else "0", "place": 100 * (1 - share)} for share in (1, 0.5, 0)]
    shown = range(0, count, math.ceil(count / LEAST_BLOCKS))
    places = [100 * (i + 0.5) / max(count, LEAST_BLOCKS) for i in shown]
    return {
        "errors": errors,
        "numbers": [{"text": str(i), "place": place} for i, place in zip(shown, places, strict=True)],
    }


def blocks(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Bar chart, one bar per block: mean relative error of its linears, with the largest as a paler bar behind."""
    largest, width = _highest(rows), 10 * max(len(rows), LEAST_BLOCKS)
    shapes = [_line(0, height, width, height, "tick") for height in (0, 50)]
    for i, row in enumerate(rows):
        title = f"{row['block']}: mean {row['mean']:.4f}, largest {row['largest']:.4f}"
        for key, kind in (("largest", "quiet"), ("mean", "strong")):
            height = 100 * row[key] / largest
            shapes.append(_bar(10 * i + 1, 100 - height, 8, height, kind, title))
    label = f"relative error of {len(rows)} blocks, largest {largest:.4f}"
    return _svg(width, 100, "blocks", label, shapes)
