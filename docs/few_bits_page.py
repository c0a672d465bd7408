"""Tables of docs/measurements/few-bits.md from the recorded rows of `bench/peers.py`."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from docs.measured_pages import read

MODELS = {  # title -> what the rows of a table share
    "LLaVA on SmolLM2-135M, language model": {"model": "smollm2-llava", "component": "language"},
    "LLaVA on SmolLM2-135M, vision tower": {"model": "smollm2-llava", "component": "vision"},
    "LLaVA on SmolLM2-135M, trained again, language model": {"model": "smollm2-llava-2", "component": "language"},
    "LLaVA on SmolLM2-135M, trained again, vision tower": {"model": "smollm2-llava-2", "component": "vision"},
    "demo-llava, language model": {"model": "demo-llava", "component": "language"},
    "demo-blip2, language model": {"model": "demo-blip2", "component": "language"},
}
OWN_PROMPTS = {
    "smollm2-llava": "smollm2",
    "smollm2-llava-2": "smollm2",
}  # model -> the prompts that it was trained on, by option; else `family`
SAMPLES = 128
NAMES = {  # name of a run -> its name in the table; without an entry `NAME`
    "gptq-signed": "`gptq`, signed",
    "gptq-corrected": "`gptq`, corrected",
    "gptq-asym": "`gptq`, `symmetric: false`",
    "gptq-asym-joint": "`gptq`, `symmetric: false`, joint ranges",
    "gptq-tokens": "`gptq`, signed, token weights",
    "gptq-signed-corrected": "`gptq`, signed, corrected",
    "gptq-signed-folded": "`awq` folded, then `gptq`, signed",
    "awq-clip": "`awq`, `range: clip`",
    "autoround": "`autoround`, 200 steps",
    "autoround-1000": "`autoround`, 1000 steps",
    "tool-autoround-200": "AutoRound, 200 steps",
    "tool-autoround-1000": "AutoRound, 1000 steps",
    "tool-autoround2-200": "AutoRound, algorithm extension, 200 steps",
    "tool-llmcompressor-gptq": "llm-compressor GPTQ",
    "tool-llmcompressor-awq": "llm-compressor AWQ",
}
Row = dict[str, Any]


def method_tables() -> str:
    """Markdown: a table of each model's component, methods sorted by KL."""
    rows = _rows()
    usual = [row for row in rows if row.get("samples") == SAMPLES and row["calibration_prompts"] == _own(row)]
    tables = []
    for title, shared in MODELS.items():
        own = [row for row in usual if shared.items() <= row.items()]
        if own:
            tables.append(f"### {title}\n\n{_full(rows, shared['model'])}\n\n{_table(own)}")
    return "\n\n".join(tables)


def calibration_table() -> str:
    """Markdown: the same methods by prompts and number of calibration samples, first draw."""
    lines = ["| prompts | samples | method | KL | exact captions | perplexity |", "|---|---|---|---|---|---|"]
    rows = [row for row in _rows() if row["model"] == "smollm2-llava" and row.get("bits") == 3 and row["draw"] == 0]
    studied = {row["method"] for row in rows if row["samples"] != SAMPLES or row["calibration_prompts"] != _own(row)}
    for row in sorted(rows, key=lambda row: (row["method"], row["calibration_prompts"], row["samples"])):
        if row["method"] in studied and row["component"] == "language":
            prompts = "the model's own" if row["calibration_prompts"] == _own(row) else "LLaVA-1.5's"
            cells = [prompts, row["samples"], _name(row["method"]), *_figures([row])]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _rows() -> list[Row]:
    rows: list[Row] = read("few-bits.json")["rows"]
    return rows


def _own(row: Row) -> str:
    return OWN_PROMPTS.get(row["model"], "family")


def _name(method: str) -> str:
    return NAMES.get(method, f"`{method}`")


def _full(rows: Sequence[Row], model: str) -> str:
    """The figures of the full-precision model."""
    row = next(row for row in rows if row["method"] == "full precision" and row["model"] == model)
    text = f"16 bits: {100 * row['captions']:.1f} % of the captions exact"
    return text + (f", perplexity {row['perplexity']:.1f}." if "perplexity" in row else ".")


def _figures(rows: Sequence[Row]) -> list[str]:
    """Means of KL, exact captions and perplexity (empty when it was not measured)."""
    perplexity = ""
    if "perplexity" in rows[0]:
        value = mean(row["perplexity"] for row in rows)
        perplexity = f"{value:.1f}" if value < 1000 else f"{value:.1e}"
    return [_short(mean(row["kl"] for row in rows)), f"{100 * mean(row['captions'] for row in rows):.1f} %", perplexity]


def _short(kl: float) -> str:
    return f"{kl:.5f}" if kl < 0.1 else f"{kl:.3f}"


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "| bits | method | draws | KL | exact captions | perplexity | range of KL | seconds |",
        "|" + "---|" * 8,
    ]
    runs: dict[tuple[int, int, str], list[Row]] = {}
    for row in rows:
        runs.setdefault((row["bits"], row["group"], row["method"]), []).append(row)
    order = sorted(runs.items(), key=lambda item: (-item[0][0], mean(row["kl"] for row in item[1])))
    for (bits, group, method), same in order:
        kls = [row["kl"] for row in same]
        spread = f"{_short(min(kls))} to {_short(max(kls))}" if len(same) > 1 else ""
        seconds = f"{mean(row['seconds'] for row in same):.0f}"
        cells = [f"W{bits} g{group}", _name(method), str(len(same)), *_figures(same), spread, seconds]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
