"""SVG charts of the HTML report, inline: sizes, changes of scores, errors by block.

Shapes stretch with the page (`preserveAspectRatio="none"`), so visible text stays in the HTML around them.
Screen readers get the `aria-label`. Colors come from the page's CSS classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

LEAST_REACH = 0.02  # the axis covers at least 2 % on each side, so that small noise looks small
LEAST_BLOCKS = 8  # minimum number of bars the width is divided into, so that two blocks do not fill the page


def _svg(width: float, height: float, kind: str, label: str, shapes: Sequence[str]) -> Markup:
    start = '<svg class="{}" viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-label="{}">'
    return Markup(start).format(kind, width, height, label) + Markup("".join(shapes)) + Markup("</svg>")


def _bar(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> str:
    text = Markup("<title>{}</title>").format(title) if title else ""
    return f'<rect class="{kind}" x="{x:z.2f}" y="{y:z.2f}" width="{width:z.2f}" height="{height:z.2f}">{text}</rect>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}"/>'


def sizes(before: int, after: int) -> Markup:
    """Two bars, source above artifact; lengths are proportional to the bytes."""
    most = max(before, after, 1)
    shapes = [_bar(0, 1, 100 * before / most, 8, "quiet"), _bar(0, 11, 100 * after / most, 8, "strong")]
    return _svg(100, 20, "sizes", f"the artifact takes {after / max(before, 1):.0%} of the source's bytes", shapes)


def reach(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Limits (low, high) of the axis that all `change` charts share, relative to the full-precision score."""
    ends = [row["relative"][key] for row in rows if row["relative"] for key in ("low", "high")]
    allowed = [row["allowed"] for row in rows if row["allowed"] is not None]
    low, high = min([-LEAST_REACH, *ends, *allowed]), max([LEAST_REACH, *ends])
    return low - 0.1 * (high - low), high + 0.05 * (high - low)


def change(row: Mapping[str, Any], axis: tuple[float, float]) -> Markup:
    """Chart of one metric: zero, interval, measured change and the range the gate forbids. Empty without a baseline."""
    relative = row["relative"]
    if not relative:
        return Markup("")

    def place(share: float) -> float:
        return 100 * (share - axis[0]) / (axis[1] - axis[0])

    shapes = [_line(place(0), 0, place(0), 20, "zero")]
    if row["allowed"] is not None:
        shapes.insert(0, _bar(0, 0, place(row["allowed"]), 20, "forbidden"))
    low, high = place(relative["low"]), place(relative["high"])
    middle = place(relative["change"])
    shapes += [_bar(low, 7, max(high - low, 0.4), 6, "interval"), _line(middle, 3, middle, 17, "mark")]
    interval = f"{relative['low']:+z.1%} to {relative['high']:+z.1%}"
    label = f"{row['name']}: change {relative['change']:+z.1%}, interval {interval}"
    return _svg(100, 20, "change", label, shapes)


def blocks(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Bar chart, one bar per block: mean relative error of its linears, with the largest as a paler bar behind."""
    largest = max(max(row["largest"] for row in rows), 1e-12)
    shapes = []
    for i, row in enumerate(rows):
        title = f"{row['block']}: mean {row['mean']:.4f}, largest {row['largest']:.4f}"
        for key, kind in (("largest", "quiet"), ("mean", "strong")):
            height = 100 * row[key] / largest
            shapes.append(_bar(10 * i + 1, 100 - height, 8, height, kind, title))
    label = f"relative error of {len(rows)} blocks, largest {largest:.4f}"
    return _svg(10 * max(len(rows), LEAST_BLOCKS), 100, "blocks", label, shapes)
