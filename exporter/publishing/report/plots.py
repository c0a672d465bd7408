"""PNG plots of the report, for slides and papers. Needs matplotlib, which the extra `report` installs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.distribution import install_extra
from exporter.errors import DataError
from exporter.files.writing import atomic, make_folder

BLUE, GRAY, RED = "#1f5fbf", "#8a8f98", "#b3261e"
DPI = 150


def write_plots(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write `size.png`, `scores.png` and `errors.png` to `folder` and return their paths; skip plots without data.

    Raises DataError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure  # no pyplot: no window, no global state
    except ImportError:
        hint = f"{install_extra('report')}; the HTML page does not need it"
        raise DataError("PNG plots need matplotlib", hint) from None

    figures: dict[str, Any] = {"size.png": _size(Figure, content)}
    if any(row["relative"] for row in content["scores"]):
        figures["scores.png"] = _scores(Figure, content)
    if content["blocks"]:
        figures["errors.png"] = _errors(Figure, content)
    make_folder(folder)
    for name, figure in figures.items():
        with atomic(folder / name) as temporary:
            figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
    return [folder / name for name in figures]


def _size(figure_class: Any, content: Mapping[str, Any]) -> Any:
    from exporter.amounts import size

    figure = figure_class(figsize=(6, 1.8), layout="constrained")
    axes = figure.subplots()
    sizes = [content["bytes"]["after"], content["bytes"]["before"]]
    bars = axes.barh(["artifact", "source"], sizes, color=[BLUE, GRAY])
    axes.bar_label(bars, labels=[size(count) for count in sizes], padding=4)
    axes.set_xlim(0, 1.25 * max(sizes))
    axes.set_xticks([])
    axes.set_title(content["name"], loc="left")
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    return figure


def _scores(figure_class: Any, content: Mapping[str, Any]) -> Any:
    rows = [row for row in content["scores"] if row["relative"]]
    figure = figure_class(figsize=(7, 1.2 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows):
        low, high, middle = (100 * row["relative"][key] for key in ("low", "high", "change"))
        axes.plot([low, high], [y, y], color=BLUE, linewidth=5, alpha=0.4, solid_capstyle="butt")
        axes.plot([middle], [y], marker="|", markersize=14, markeredgewidth=2.5, color=BLUE)
        if row["allowed"] is not None:
            axes.plot([100 * row["allowed"]] * 2, [y - 0.35, y + 0.35], color=RED, linewidth=2)
    axes.axvline(0, color=GRAY, linewidth=1)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("change relative to the full-precision score, % (95 % interval; red: limit of the gate)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _errors(figure_class: Any, content: Mapping[str, Any]) -> Any:
    blocks = content["blocks"]
    figure = figure_class(figsize=(7, 0.6 + 1.9 * len(blocks)), layout="constrained")
    all_axes = figure.subplots(len(blocks), 1, squeeze=False)[:, 0]
    for axes, (component, rows) in zip(all_axes, blocks.items(), strict=True):
        numbers = range(len(rows))
        axes.bar(numbers, [row["largest"] for row in rows], color=GRAY, alpha=0.5, label="largest linear")
        axes.bar(numbers, [row["mean"] for row in rows], color=BLUE, label="mean of the linears")
        axes.set_title(component, loc="left")
        axes.set_ylabel("relative error")
        axes.set_xlabel("block")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False, fontsize="small"
    )
    return figure
