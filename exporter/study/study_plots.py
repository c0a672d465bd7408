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
from exporter.study.records import PlottedSetting, ScoredSetting
from exporter.study.score_table import Table
from exporter.study.setting_rows import pareto_front

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DPI = 130
PHONE = 4.2  # width in inches of figures that stay readable at 400 px
DARK = 0.5  # cells below this share of the color range have white text
LEAST_KL = 1e-6  # lower end of the log axis
EXAMS = "scores are relative to the full-precision model on the same samples"
UPPER = 0.9  # lower end of the score axis in the detail plot
FAR_BELOW = 0.7  # the detail plot is drawn if a share below this one stretches the axis, and several are above UPPER


@dataclass(frozen=True)
class Plot:
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


def encode_figure(figure: Any, name: str, title: str, about: str) -> Plot:
    """Encode a figure as PNG."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return Plot(name, title, about, buffer.getvalue())


def heat_maps(table: Table, method: str) -> list[Plot]:
    """Heat maps of the score over the bits of each pair of components, with all others at their largest bits."""
    plots = []
    for i, j in combinations(range(len(table.components)), 2):
        others = [k for k in range(len(table.components)) if k not in (i, j)]
        rows = np.all(
            [table.bits[:, k] == table.bits[:, k].max() for k in others] or [np.ones(len(table.bits), bool)], 0
        )
        subtable = table.where(rows)
        ys, xs = np.unique(subtable.bits[:, i]), np.unique(subtable.bits[:, j])
        if len(xs) > 1 and len(ys) > 1:
            plots.append(_heat_map(subtable, (i, j), (ys, xs), method))
    return plots


def _heat_map(subtable: Table, pair: tuple[int, int], bits: tuple[Any, Any], method: str) -> Plot:
    (i, j), (ys, xs) = pair, bits
    cells = np.full((len(ys), len(xs)), np.nan)
    for row, y in enumerate(ys):
        for column, x in enumerate(xs):
            scores = subtable.scores[(subtable.bits[:, i] == y) & (subtable.bits[:, j] == x)]
            cells[row, column] = scores.mean() if len(scores) else np.nan
    figure, axes = create_figure(max(PHONE, 1.6 + 0.45 * len(xs)), 1.3 + 0.45 * len(ys))
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
    title = f"{subtable.metric[:1].upper()}{subtable.metric[1:]} by bits, {method}"
    figure.colorbar(image, ax=axes)
    about = f"{subtable.metric} from {low:.3f} to {high:.3f} over {first} and {second} bits"
    return encode_figure(figure, f"heat-{first}-{second}-{method}.png", title, about)


def pareto(
    series: Mapping[str, Sequence[PlottedSetting]],
    other_series: Mapping[str, Sequence[PlottedSetting]],
    line_series: str,
) -> list[Plot]:
    """Scatter plots of score over bits per weight, of all scores and above UPPER, with the Pareto front of `series`.

    other_series: of other models, without effect on the front. line_series: name of the series to draw as a line.
    """
    front_points = front([point for points in series.values() for point in points])
    about = "; ".join(share_text(point) for point in front_points[:: max(1, len(front_points) // 6)])
    shares = [point.share for points in (*series.values(), *other_series.values()) for point in points]
    views: list[tuple[str, str, float | None]] = [("pareto.png", "Score relative to full precision, by size", None)]
    if min(shares) < FAR_BELOW and sum(share >= UPPER for share in shares) > 2:
        views.append(("pareto-upper.png", f"The same, above {UPPER:.0%}", UPPER))
    plots = []
    for name, title, low in views:
        figure, axis = create_figure(PHONE, 4.2)
        for number, (label, points) in enumerate({**series, **other_series}.items()):
            style: dict[str, Any] = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
            hollow = {"markerfacecolor": "none"} if label in other_series else {}
            line = {"linestyle": "-" if label == line_series else "none", "label": label}
            _scatter(axis, points, style | hollow | line)
        if front_points:
            steps = [(point.bits_per_weight, point.share) for point in front_points]
            dashes: dict[str, Any] = {"color": "#555555", "linewidth": 1, "linestyle": "--", "label": "Pareto front"}
            axis.step(*zip(*steps, strict=True), where="post", **dashes)
        axis.axhline(1, color="#555555", linewidth=1, linestyle=":", label="full precision")
        axis.set_xlabel("bits per weight of the whole artifact")
        axis.set_ylabel("share of the full-precision score")
        axis.grid(alpha=0.25)
        if low is not None:
            axis.set_ylim(low, 1.02)
        figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=1 if len(series) > 3 else 2)
        split = f" ({line_series}: on the validation split)" if line_series in series else ""
        text = (
            f"Pareto front: {about}; {EXAMS}{split}; bars: 95 % intervals"
            if low is None
            else f"Scores from {low:.0%} on"
        )
        plots.append(encode_figure(figure, name, title, text))
    return plots


def _scatter(axis: Any, points: Sequence[PlottedSetting], style: Mapping[str, Any]) -> None:
    """Points with their intervals, in the order of size."""
    ordered = sorted(points, key=lambda point: (point.bits_per_weight, point.share))
    ends = [point.interval or (point.share, point.share) for point in ordered]
    errors = [[max(p.share - low, 0), max(high - p.share, 0)] for p, (low, high) in zip(ordered, ends, strict=True)]
    bars = np.array(errors).T if any(point.interval for point in ordered) else None
    xs, ys = [point.bits_per_weight for point in ordered], [point.share for point in ordered]
    axis.errorbar(xs, ys, bars, alpha=0.85, elinewidth=0.8, capsize=2, **style)


def share_text(point: PlottedSetting) -> str:
    """A setting in words: its share of the score with its interval, and its size."""
    interval = f" ({point.interval[0]:.1%} to {point.interval[1]:.1%})" if point.interval else ""
    return f"{point.share:.1%}{interval} at {point.bits_per_weight:.2f} bits per weight"


def front(points: Sequence[PlottedSetting]) -> list[PlottedSetting]:
    """The Pareto front by size: points whose share is larger than that of every point with at most their size."""
    return pareto_front(points, lambda point: (point.bits_per_weight, point.share))


def importance_bars(result: Importance, name: str) -> Plot:
    """Bars of the consensus importance per component, in the whole grid and in the usable region."""
    figure, axes = create_figure(PHONE, 3.4)
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
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=2)
    title = f"Importance of components for {result.metric}, {name}"
    about = "; ".join(f"{label}: {', '.join(f'{c} {s:.0f} %' for c, s in x.items())}" for label, x in series.items())
    about += f"; from {result.shares.rows} settings"
    return encode_figure(figure, f"importance-{name}.png", title, about)


def marginal_lines(result: Importance, name: str) -> Plot:
    """Change of score per bit width of each component in the usable region, with standard errors."""
    figure, axes = create_figure(PHONE, 3.4)
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
    worst = {
        name: min(changes, key=lambda change: change.change) for name, changes in result.marginal.items() if changes
    }
    about = "largest loss: " + ", ".join(f"{name} {c.change:+z.1%} ± {c.error:.1%}" for name, c in worst.items())
    about += " (standard error over the bits of the other components)"
    return encode_figure(figure, f"marginal-{name}.png", title, about)


def sensitivity(settings: Sequence[ScoredSetting]) -> Plot:
    """Divergence of each part quantized alone, with a marker per bit width, on a logarithmic axis."""
    by_bits: dict[int, dict[str, float]] = {}
    for setting in settings:
        if "bits" in setting.about:
            by_slot = by_bits.setdefault(int(setting.about["bits"]), {})
            name = str(setting.about["place"])
            by_slot[name] = min(setting.scores["kl"], by_slot.get(name, np.inf))
    places = list(dict.fromkeys(name for by_slot in by_bits.values() for name in by_slot))
    figure, axes = create_figure(PHONE, 1.4 + 0.24 * max(len(places), 4))
    clipped = sum(value < LEAST_KL for by_slot in by_bits.values() for value in by_slot.values())
    for number, (bits, by_slot) in enumerate(sorted(by_bits.items())):
        rows = [places.index(name) for name in by_slot]
        values = [max(value, LEAST_KL) for value in by_slot.values()]
        style = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
        axes.plot(values, rows, linestyle="none", markersize=6, label=f"{bits} bits", **style)
    values = [max(value, LEAST_KL) for by_slot in by_bits.values() for value in by_slot.values()]
    axes.set_xlim(min(values) / 2, max(values) * 2)
    axes.set_xscale("log")
    axes.set_yticks(range(len(places)), places, fontsize=9)
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.set_xlabel("KL per token, quantized alone")
    if clipped:
        label = f"{LEAST_KL:.0e} or less"
        axes.axvline(LEAST_KL, color="#555555", linewidth=1, linestyle=":", zorder=0, label=label)
    axes.grid(alpha=0.25)
    figure.legend(frameon=False, fontsize=9, ncols=3, loc="outside lower center")
    title = "Sensitivity: KL divergence with one part quantized"
    lowest = min(by_bits)
    top = sorted(by_bits[lowest].items(), key=lambda item: -item[1])[:3]
    about = f"largest at {lowest} bits: " + ", ".join(f"{name} {value:.3g}" for name, value in top)
    about += f"; {clipped} values below {LEAST_KL:.0e} are drawn at {LEAST_KL:.0e}" if clipped else ""
    return encode_figure(figure, "sensitivity.png", title, about)
