"""Pictures of a study, as matplotlib figures. Needs the extra `study`.

Colors are those of Okabe and Ito and the map `cividis`: both are told apart by people with any color blindness. Every
series has a marker of its own too, and every cell of a map its number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import combinations
from typing import Any

import numpy as np

from exporter.distribution import install_extra
from exporter.errors import DataError
from exporter.study.importance import Importance
from exporter.study.records import Measured
from exporter.study.table import Table

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DPI = 130
DARK = 0.5  # cells below this share of the color range get white numbers
LEAST_KL = 1e-6  # a log axis starts here
EXAMS = "scores are relative to the full-precision model on the same samples (allocations: on the validation split)"
UPPER = 0.9  # where the upper end of scores begins


@dataclass(frozen=True)
class Picture:
    """One picture. name: of its file. about: what it shows, for people who cannot see it. png: the file's bytes."""

    name: str
    title: str
    about: str
    png: bytes


def figure(width: float, height: float, parts: int = 1) -> tuple[Any, Any]:
    """An empty figure and its axes, `parts` side by side (DataError without matplotlib)."""
    try:
        from matplotlib.figure import Figure  # no pyplot: no window, no global state
    except ImportError:
        raise DataError("pictures need matplotlib", install_extra("study")) from None
    made = Figure(figsize=(width, height), layout="constrained")
    axes = made.subplots(1, parts)
    for part in np.ravel(axes):
        part.spines[["top", "right"]].set_visible(False)
    return made, axes


def finished(made: Any, name: str, title: str, about: str) -> Picture:
    """A figure as a file's bytes."""
    buffer = BytesIO()
    made.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return Picture(name, title, about, buffer.getvalue())


def heat_maps(table: Table, method: str) -> list[Picture]:
    """Score over the bits of each two components, the others at their most bits."""
    pictures = []
    for i, j in combinations(range(len(table.components)), 2):
        others = [k for k in range(len(table.components)) if k not in (i, j)]
        rows = np.all(
            [table.bits[:, k] == table.bits[:, k].max() for k in others] or [np.ones(len(table.bits), bool)], 0
        )
        part = table.where(rows)
        ys, xs = np.unique(part.bits[:, i]), np.unique(part.bits[:, j])
        if len(xs) > 1 and len(ys) > 1:
            pictures.append(_heat_map(part, (i, j), (ys, xs), method))
    return pictures


def _heat_map(part: Table, pair: tuple[int, int], bits: tuple[Any, Any], method: str) -> Picture:
    (i, j), (ys, xs) = pair, bits
    cells = np.full((len(ys), len(xs)), np.nan)
    for a, y in enumerate(ys):
        for b, x in enumerate(xs):
            found = part.scores[(part.bits[:, i] == y) & (part.bits[:, j] == x)]
            cells[a, b] = found.mean() if len(found) else np.nan
    made, axes = figure(1.6 + 0.75 * len(xs), 1.3 + 0.5 * len(ys))
    shown = axes.imshow(cells, cmap="cividis", origin="lower", aspect="auto")
    low, high = np.nanmin(cells), np.nanmax(cells)
    for a, b in np.argwhere(np.isfinite(cells)):
        dark = (cells[a, b] - low) / max(high - low, 1e-12) < DARK
        axes.text(b, a, f"{cells[a, b]:.3f}", ha="center", va="center", color="white" if dark else "black", fontsize=9)
    first, second = part.components[i], part.components[j]
    axes.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
    axes.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
    axes.set_xlabel(f"{second} bits")
    axes.set_ylabel(f"{first} bits")
    title = f"{part.metric} by bits, {method}"
    axes.set_title(title, loc="left")
    made.colorbar(shown, ax=axes)
    about = f"{part.metric} from {low:.3f} to {high:.3f} over {first} and {second} bits"
    return finished(made, f"heat-{first}-{second}-{method}.png", title, about)


def pareto(
    series: Mapping[str, Sequence[tuple[float, float]]], others: Mapping[str, Sequence[tuple[float, float]]], line: str
) -> Picture:
    """Share of the full score over bits a weight, whole and its upper end, with the front of what was measured here.

    series: name -> (bits a weight, share of the full score). others: the same of other models, which are in no front.
    line: the series that is drawn as a line too.
    """
    made, axes = figure(10, 4.8, 2)
    edge = front([point for points in series.values() for point in points])
    for number, (name, points) in enumerate({**series, **others}.items()):
        xs, ys = zip(*sorted(points), strict=True)
        style = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 5}
        hollow = {"markerfacecolor": "none"} if name in others else {}
        for part in axes:
            part.plot(xs, ys, linestyle="-" if name == line else "none", alpha=0.85, label=name, **style, **hollow)
    for part in axes:
        if edge:
            style = {"color": "#555555", "linewidth": 1, "linestyle": "--", "label": "Pareto front"}
            part.step(*zip(*edge, strict=True), where="post", **style)
        part.set_xlabel("bits per weight of the whole artifact")
        part.grid(alpha=0.25)
    axes[0].set_ylabel("score relative to full precision")
    axes[1].set_ylim(UPPER, 1.02)
    axes[1].set_title(f"above {UPPER:.0%}", loc="left", fontsize=10)
    handles, labels = axes[1].get_legend_handles_labels()
    made.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower center", ncols=3)
    title = "Score relative to full precision, by size"
    axes[0].set_title(title, loc="left")
    about = "; ".join(f"{y:.1%} at {x:.2f} bits per weight" for x, y in edge[:: max(1, len(edge) // 6)])
    return finished(made, "pareto.png", title, f"Pareto front: {about}; {EXAMS}")


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other of at most their x has a larger y, by x."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or y > kept[-1][1]:
            kept.append((x, y))
    return kept


def importance_bars(found: Importance, name: str) -> Picture:
    """Shares in the whole grid and in the usable region, a bar for each component."""
    made, axes = figure(7.5, 3.2)
    series = {"whole grid": found.shares.consensus} | (
        {"usable bits only": found.inside.consensus} if found.inside else {}
    )
    components = list(found.shares.consensus)
    width = 0.8 / len(series)
    for number, (label, shares) in enumerate(series.items()):
        places = np.arange(len(components)) + width * (number - (len(series) - 1) / 2)
        values = [shares.get(component, 0.0) for component in components]
        hatch = {"hatch": "//" * number, "edgecolor": "white"}
        bars = axes.bar(places, values, 0.95 * width, label=label, color=COLORS[number], **hatch)
        axes.bar_label(bars, [f"{value:.0f} %" for value in values], padding=2, fontsize=9)
    axes.set_xticks(range(len(components)), components)
    axes.set_ylabel("consensus importance, %")
    axes.set_ylim(0, 115)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))  # bars may reach any corner
    title = f"Importance of components for {found.metric}, {name}"
    axes.set_title(title, loc="left")
    about = "; ".join(f"{label}: {', '.join(f'{c} {s:.0f} %' for c, s in x.items())}" for label, x in series.items())
    return finished(made, f"importance-{name}.png", title, about)


def marginal_lines(found: Importance, name: str) -> Picture:
    """What bits cost each component in the usable region."""
    made, axes = figure(6.5, 3.2)
    for number, (component, drops) in enumerate(found.marginal.items()):
        style = {"color": COLORS[number], "marker": MARKERS[number], "label": component, "capsize": 2}
        if drops:
            axes.errorbar(
                [d.bits for d in drops], [100 * d.drop for d in drops], [100 * d.error for d in drops], **style
            )
    axes.axhline(0, color="#555555", linewidth=1)
    axes.set_xticks(sorted({d.bits for drops in found.marginal.values() for d in drops}))
    axes.set_xlabel("bits")
    axes.set_ylabel("relative loss of score, %")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    title = f"Loss by bits in the usable region, {name}"
    axes.set_title(title, loc="left")
    worst = {c: max((d.drop for d in drops), default=0.0) for c, drops in found.marginal.items()}
    about = "largest drop: " + ", ".join(f"{c} {drop:.1%}" for c, drop in worst.items())
    return finished(made, f"marginal-{name}.png", title, about)


def sensitivity(found: Sequence[Measured]) -> Picture:
    """Divergence of each place alone, a marker for each number of bits; the axis is logarithmic."""
    cells: dict[int, dict[str, float]] = {}
    for one in found:
        if "bits" in one.about:
            by_place = cells.setdefault(int(one.about["bits"]), {})
            name = str(one.about["place"])
            by_place[name] = min(one.scores["kl"], by_place.get(name, np.inf))
    places = list(dict.fromkeys(name for by_place in cells.values() for name in by_place))
    made, axes = figure(2 + 0.42 * max(len(places), 8), 4.2)
    floored = sum(value < LEAST_KL for by_place in cells.values() for value in by_place.values())
    for number, (bits, by_place) in enumerate(sorted(cells.items())):
        xs = [places.index(name) for name in by_place]
        ys = [max(value, LEAST_KL) for value in by_place.values()]
        style = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
        axes.plot(xs, ys, linestyle="none", markersize=6, label=f"{bits} bits", **style)
    drawn = [max(value, LEAST_KL) for by_place in cells.values() for value in by_place.values()]
    axes.set_ylim(min(drawn) / 2, max(drawn) * 2)
    axes.set_yscale("log")
    axes.set_xticks(range(len(places)), places, rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("KL per token, quantized alone")
    if floored:
        label = f"{LEAST_KL:.0e} or less"
        axes.axhline(LEAST_KL, color="#555555", linewidth=1, linestyle=":", zorder=0, label=label)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
    title = "Sensitivity: KL divergence with one part quantized"
    axes.set_title(title, loc="left")
    lowest = min(cells)
    top = sorted(cells[lowest].items(), key=lambda item: -item[1])[:3]
    about = f"largest at {lowest} bits: " + ", ".join(f"{name} {value:.3g}" for name, value in top)
    about += f"; {floored} values below {LEAST_KL:.0e} are drawn at {LEAST_KL:.0e}" if floored else ""
    return finished(made, "sensitivity.png", title, about)
