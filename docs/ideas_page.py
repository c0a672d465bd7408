"""Tables of docs/measurements/ideas.md from docs/measurements/ideas.json."""

from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

from docs.measured_pages import read

NAMES = {
    "gptq-signed": "`gptq`, `range: signed`",
    "gptq-asym": "`gptq`, `symmetric: false`",
    "gptq-asym-joint": "the same, joint search",
    "gptq-tokens": "`gptq`, signed, token weights",
    "gptq-magr": "`gptq`, signed, MagR 1e-5",
    "gptq-magr-more": "`gptq`, signed, MagR 1e-4",
    "autoround": "`autoround`, 200 steps",
    "autoround-asym": "`autoround`, `symmetric: false`",
    "autoround-asym-joint": "the same, joint search",
}
CACHE = "cache "
Row = dict[str, Any]


def ideas_table() -> str:
    """Markdown: KL of each method by bits, a mean over draws with its range, for both demo models."""
    rows = [row for row in _rows() if row["method"] in NAMES]
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = [f"| bits | method | {' | '.join(models)} |", "|---" * (len(models) + 2) + "|"]
    for bits in sorted({row["bits"] for row in rows}, reverse=True):
        for method in NAMES:
            same = [row for row in rows if (row["bits"], row["method"]) == (bits, method)]
            cells = [_spread([row["kl"] for row in same if row["model"] == model]) for model in models]
            if same:
                lines.append(f"| W{bits} g32 | {NAMES[method]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cache_table() -> str:
    """Markdown: KL of the full-precision model with each cache."""
    rows = [row for row in _rows() if row["method"].startswith(CACHE)]
    return _crossed(rows, "`kv_cache`", lambda row: f"`{row['method'].removeprefix(CACHE)}`", lambda row: row["model"])


def rotation_table() -> str:
    """Markdown: KL of the quantized ViT in each rotated model."""
    rows: list[Row] = read("ideas.json")["rotations"]
    return _crossed(rows, "scheme", lambda row: row["rule"], lambda row: row["rotation"])


def _crossed(rows: Sequence[Row], corner: str, across: Callable[[Row], str], down: Callable[[Row], str]) -> str:
    columns, lines = list(dict.fromkeys(map(down, rows))), list(dict.fromkeys(map(across, rows)))
    table = [f"| {corner} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for line in lines:
        same = [row for row in rows if across(row) == line]
        cells = [_short(mean(row["kl"] for row in same if down(row) == column)) for column in columns]
        table.append(f"| {line} | {' | '.join(cells)} |")
    return "\n".join(table)


def _rows() -> list[Row]:
    rows: list[Row] = read("ideas.json")["rows"]
    return rows


def _spread(kls: Sequence[float]) -> str:
    """Mean of some draws, with their smallest and largest; one draw alone."""
    if not kls:
        return ""
    text = _short(mean(kls))
    return text if len(kls) == 1 else f"{text} ({_short(min(kls))} to {_short(max(kls))})"


def _short(kl: float) -> str:
    return f"{kl:.3g}" if kl < 1e-4 else f"{kl:.5f}" if kl < 0.1 else f"{kl:.3f}"
