"""Plots of a study as PNG images, drawn with matplotlib. Needs the extra `study`.

Colors are the palette of Okabe and Ito and the map `cividis`, which people with color blindness can distinguish. Every
series also has a distinct marker, and every cell of a heat map shows its value.
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
from exporter.study.records import ScoredSetting
from exporter.study.table import Table

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DPI = 130
DARK = 0.5  # cells below this share of the color range have white text
LEAST_KL = 1e-6  # lower end of the log axis
EXAMS = "scores are relative to the full-precision model on the same samples (allocations: on the validation split)"
UPPER = 0.9  # lower end of the score axis in the detail plot


@dataclass(frozen=True)
class Picture:
    """A plot. name: its file name. about: text alternative for people who cannot see it. png: the file's bytes."""

    name: str
    title: str
    about: str
    png: bytes


def create_figure(width: float, height: float, parts: int = 1) -> tuple[Any, Any]:
    """An empty figure and its axes, `parts` side by side; sizes in inches. Raises DataError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # no pyplot: no window, no global state
    except ImportError:
        raise DataError("plots need matplotlib", install_extra("study")) from None
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, parts)
    for axis in np.ravel(axes):
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def encode_figure(figure: Any, name: str, title: str, about: str) -> Picture:
    """Encode a figure as PNG."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return Picture(name, title, about, buffer.getvalue())


def heat_maps(table: Table, method: str) -> list[Picture]:
    """Heat maps of the score over the bits of each pair of components, with all others at their largest bits."""
    pictures = []
    for i, j in combinations(range(len(table.components)), 2):
        others = [k for k in range(len(table.components)) if k not in (i, j)]
        rows = np.all(
            [table.bits[:, k] == table.bits[:, k].max() for k in others] or [np.ones(len(table.bits), bool)], 0
        )
        subtable = table.where(rows)
        ys, xs = np.unique(subtable.bits[:, i]), np.unique(subtable.bits[:, j])
        if len(xs) > 1 and len(ys) > 1:
            pictures.append(_heat_map(subtable, (i, j), (ys, xs), method))
    return pictures


def _heat_map(subtable: Table, pair: tuple[int, int], bits: tuple[Any, Any], method: str) -> Picture:
    (i, j), (ys, xs) = pair, bits
    cells = np.full((len(ys), len(xs)), np.nan)
    for row, y in enumerate(ys):
        for column, x in enumerate(xs):
            scores = subtable.scores[(subtable.bits[:, i] == y) & (subtable.bits[:, j] == x)]
            cells[row, column] = scores.mean() if len(scores) else np.nan
    figure, axes = create_figure(1.6 + 0.75 * len(xs), 1.3 + 0.5 * len(ys))
    image = axes.imshow(cells, cmap="cividis", origin="lower", aspect="auto")
    low, high = np.nanmin(cells), np.nanmax(cells)
    for row, column in np.argwhere(np.isfinite(cells)):
        dark = (cells[row, column] - low) / max(high - low, 1e-12) < DARK
        axes.text(
            column,
            row,
            f"{cells[row, column]:.3f}",
            ha="center",
            va="center",
            color="white" if dark else "black",
            fontsize=9,
        )
    first, second = subtable.components[i], subtable.components[j]
    axes.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
    axes.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
    axes.set_xlabel(f"{second} bits")
    axes.set_ylabel(f"{first} bits")
    title = f"{subtable.metric} by bits, {method}"
    axes.set_title(title, loc="left")
    figure.colorbar(image, ax=axes)
    about = f"{subtable.metric} from {low:.3f} to {high:.3f} over {first} and {second} bits"
    return encode_figure(figure, f"heat-{first}-{second}-{method}.png", title, about)


def pareto(
    series: Mapping[str, Sequence[tuple[float, float]]],
    other_series: Mapping[str, Sequence[tuple[float, float]]],
    line_series: str,
) -> Picture:
    """Scatter plots of score over bits per weight, full range and upper end, with the Pareto front of `series`.

    series: name -> points (bits per weight, share of the full score). other_series: the same for other models, without
    effect on the front. line_series: name of the series to draw as a line.
    """
    figure, axes = create_figure(10, 4.8, 2)
    front_points = front([point for points in series.values() for point in points])
    for number, (name, points) in enumerate({**series, **other_series}.items()):
        xs, ys = zip(*sorted(points), strict=True)
        style = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 5}
        hollow = {"markerfacecolor": "none"} if name in other_series else {}
        for axis in axes:
            axis.plot(
                xs, ys, linestyle="-" if name == line_series else "none", alpha=0.85, label=name, **style, **hollow
            )
    for axis in axes:
        if front_points:
            axis.step(
                *zip(*front_points, strict=True),
                where="post",
                color="#555555",
                linewidth=1,
                linestyle="--",
                label="Pareto front",
            )
        axis.set_xlabel("bits per weight of the whole artifact")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("score relative to full precision")
    axes[1].set_ylim(UPPER, 1.02)
    axes[1].set_title(f"above {UPPER:.0%}", loc="left", fontsize=10)
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower center", ncols=3)
    title = "Score relative to full precision, by size"
    axes[0].set_title(title, loc="left")
    about = "; ".join(f"{y:.1%} at {x:.2f} bits per weight" for x, y in front_points[:: max(1, len(front_points) // 6)])
    return encode_figure(figure, "pareto.png", title, f"Pareto front: {about}; {EXAMS}")


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto front, sorted by x: points whose y is larger than that of every point with at most their x."""
    front_points: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front_points or y > front_points[-1][1]:
            front_points.append((x, y))
    return front_points


def importance_bars(result: Importance, name: str) -> Picture:
    """Bars of the consensus importance per component, in the whole grid and in the usable region."""
    figure, axes = create_figure(7.5, 3.2)
    series = {"whole grid": result.shares.consensus} | (
        {"usable bits only": result.inside.consensus} if result.inside else {}
    )
    components = list(result.shares.consensus)
    width = 0.8 / len(series)
    for number, (label, shares) in enumerate(series.items()):
        positions = np.arange(len(components)) + width * (number - (len(series) - 1) / 2)
        values = [shares.get(component, 0.0) for component in components]
        hatch = {"hatch": "//" * number, "edgecolor": "white"}
        bars = axes.bar(positions, values, 0.95 * width, label=label, color=COLORS[number], **hatch)
        axes.bar_label(bars, [f"{value:.0f} %" for value in values], padding=2, fontsize=9)
    axes.set_xticks(range(len(components)), components)
    axes.set_ylabel("consensus importance, %")
    axes.set_ylim(0, 115)
    axes.legend(
        frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1)
    )  # outside of the axes, because bars may reach any corner
    title = f"Importance of components for {result.metric}, {name}"
    axes.set_title(title, loc="left")
    about = "; ".join(f"{label}: {', '.join(f'{c} {s:.0f} %' for c, s in x.items())}" for label, x in series.items())
    return encode_figure(figure, f"importance-{name}.png", title, about)


def marginal_lines(result: Importance, name: str) -> Picture:
    """Change of score per bit width of each component in the usable region, with standard errors."""
    figure, axes = create_figure(6.5, 3.2)
    for number, (component, changes) in enumerate(result.marginal.items()):
        style = {"color": COLORS[number], "marker": MARKERS[number], "label": component, "capsize": 2}
        if changes:
            values, errors = [100 * c.change for c in changes], [100 * c.error for c in changes]
            axes.errorbar([c.bits for c in changes], values, errors, **style)
    axes.axhline(0, color="#555555", linewidth=1)
    axes.set_xticks(sorted({c.bits for changes in result.marginal.values() for c in changes}))
    axes.set_xlabel("bits")
    axes.set_ylabel("change of score, %")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    title = f"Change of score by bits in the usable region, {name}"
    axes.set_title(title, loc="left")
    worst = {name: min((c.change for c in changes), default=0.0) for name, changes in result.marginal.items()}
    about = "largest loss: " + ", ".join(f"{name} {change:+z.1%}" for name, change in worst.items())
    return encode_figure(figure, f"marginal-{name}.png", title, about)


def sensitivity(settings: Sequence[ScoredSetting]) -> Picture:
    """Divergence of each part quantized alone, with a marker per bit width, on a logarithmic axis."""
    by_bits: dict[int, dict[str, float]] = {}
    for setting in settings:
        if "bits" in setting.about:
            by_slot = by_bits.setdefault(int(setting.about["bits"]), {})
            name = str(setting.about["place"])
            by_slot[name] = min(setting.scores["kl"], by_slot.get(name, np.inf))
    places = list(dict.fromkeys(name for by_slot in by_bits.values() for name in by_slot))
    figure, axes = create_figure(2 + 0.42 * max(len(places), 8), 4.2)
    clipped = sum(value < LEAST_KL for by_slot in by_bits.values() for value in by_slot.values())
    for number, (bits, by_slot) in enumerate(sorted(by_bits.items())):
        xs = [places.index(name) for name in by_slot]
        ys = [max(value, LEAST_KL) for value in by_slot.values()]
        style = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
        axes.plot(xs, ys, linestyle="none", markersize=6, label=f"{bits} bits", **style)
    values = [max(value, LEAST_KL) for by_slot in by_bits.values() for value in by_slot.values()]
    axes.set_ylim(min(values) / 2, max(values) * 2)
    axes.set_yscale("log")
    axes.set_xticks(range(len(places)), places, rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("KL per token, quantized alone")
    if clipped:
        label = f"{LEAST_KL:.0e} or less"
        axes.axhline(LEAST_KL, color="#555555", linewidth=1, linestyle=":", zorder=0, label=label)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
    title = "Sensitivity: KL divergence with one part quantized"
    axes.set_title(title, loc="left")
    lowest = min(by_bits)
    top = sorted(by_bits[lowest].items(), key=lambda item: -item[1])[:3]
    about = f"largest at {lowest} bits: " + ", ".join(f"{name} {value:.3g}" for name, value in top)
    about += f"; {clipped} values below {LEAST_KL:.0e} are drawn at {LEAST_KL:.0e}" if clipped else ""
    return encode_figure(figure, "sensitivity.png", title, about)
