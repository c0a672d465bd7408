"""Tables of a study's results for the terminal: importance, and the settings of a grid."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

from exporter.amounts import size
from exporter.study.importance import Importance, Shares
from exporter.study.records import NO_SCORES, ScoredSetting, columns
from exporter.study.run import Outcome
from exporter.study.setting_rows import SettingRow, front_rows, is_reference, rows_of
from exporter.study.verdict import verdict

VARYING_COLUMNS = ("method", "group_size", "zero_points", "blocks", "role")  # shown if they vary


def importance_page(result: Importance) -> Group:
    """Shares and marginal changes, each with a title that explains it."""
    head = f"{result.metric}, {result.full_score:.4g} with the most bits; {result.shares.rows} settings"
    notes = [f"note: {text}" for text in result.notes]
    parts: list[Table | str] = [head, *notes]
    parts.append(_shares(result.shares, "importance for the score in percent, whole grid"))
    region = "; ".join(f"{name} {_bits_text(bits)}" for name, bits in result.usable.items())
    parts.append(f"\nusable bits: {region}")
    if result.inside:
        parts.append(
            _shares(result.inside, f"importance among the {result.inside.rows} settings with usable bits only")
        )
    return Group(*parts, "", _changes(result))


def _bits_text(bits: tuple[float, ...]) -> str:
    return ", ".join(f"{b:g}" for b in bits) or "none"


def _shares(shares: Shares, title: str) -> Table:
    r2 = f"R2: forest {shares.r2_forest:.2f}, line {shares.r2_linear:.2f}"
    table = Table("component", "consensus", "forest", "permutation", "SHAP", title=f"{title} ({r2})")
    for name in shares.consensus:
        methods = (shares.consensus, shares.forest, shares.permutation, shares.shap)
        table.add_row(name, *(f"{shares_of_method[name]:.1f}" for shares_of_method in methods))
    return table


def _changes(result: Importance) -> Table:
    title = "change of score per bit width among usable bits: mean share of full score, others equal (standard error)"
    widths = sorted({change.bits for changes in result.marginal.values() for change in changes})
    table = Table("component", *(f"{bits:g} bits" for bits in widths), title=title)
    for name, changes in result.marginal.items():
        cells = {change.bits: f"{change.change:+z.1%} ({change.error:.1%})" for change in changes}
        table.add_row(name, *(cells.get(bits, "") for bits in widths))
    return table


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    """The settings of a grid with their scores, and the cost of the run, as JSON-compatible data."""
    return {
        "points": [setting.row() for setting in outcome.settings],
        "scored": outcome.scored,
        "units_made": outcome.quantized,
        "units": outcome.units,
        "units_named": outcome.used_units,
        "seconds": dict(outcome.seconds),
        "cpu_seconds": outcome.cpu_seconds,
    }


def outcome_page(outcome: Outcome) -> Group:
    """Table with one row per setting, smallest first, with a mark on the Pareto front."""
    bits = [name for name in columns_of(outcome.settings) if name.endswith("_bits") and _varies(outcome.settings, name)]
    other_columns = [name for name in VARYING_COLUMNS if _varies(outcome.settings, name)]
    scores = _scores_shown(outcome.settings)
    rows = {row.id: row for row in rows_of(outcome.settings)}
    front_ids = {row.id for row in front_rows(list(rows.values()))}
    change = ["change"] * any(row.change is not None for row in rows.values())
    table = Table("")
    for name in (*map(_short_name, bits), *other_columns, "size", "bits/w", *map(_short_name, scores), *change):
        table.add_column(name, justify="left" if name in other_columns else "right")
    for setting in sorted(outcome.settings, key=lambda measured: measured.bytes):
        cells = [str(setting.about[name]) for name in (*bits, *other_columns)]
        values = [f"{setting.scores[name]:z.{4 if name == 'kl' else 3}f}" for name in scores]
        values += [change_text(rows[setting.id]) for _ in change]
        mark = "*" if setting.id in front_ids else ""
        table.add_row(mark, *cells, size(setting.bytes), f"{setting.bits_per_weight:.2f}", *values)
    notes = ["* on the Pareto front: no setting of at most this size scores higher"]
    return Group(table, *notes, *_samples_notes(list(rows.values())), _cost_text(outcome))


def _scores_shown(settings: tuple[ScoredSetting, ...]) -> list[str]:
    """Names of the scores with a column: the tasks' main metrics, `score` and `kl`."""
    names = settings[0].scores if settings else ()
    return [name for name in names if not name.endswith((" nll", " kl")) and name not in NO_SCORES]


def change_text(row: SettingRow) -> str:
    """A change in percent, with its interval: `-4.2% (-9.1% to +0.3%)`."""
    if row.full or row.change is None:
        return "reference" if row.full else ""
    if row.change_interval is None:
        return f"{row.change:+z.1%}"
    low, high = row.change_interval
    return f"{row.change:+z.1%} ({low:+z.1%} to {high:+z.1%})"


def _samples_notes(rows: Sequence[SettingRow]) -> list[str]:
    """What a change is, on how many samples, and the verdict."""
    if not any(row.change is not None and not row.full for row in rows):
        return []
    counts = sorted({row.samples for row in rows if row.samples})
    samples = f"; {' or '.join(f'{count:,}' for count in counts)} samples each" if counts else ""
    interval = ", with its 95 % interval" * any(row.change_interval for row in rows)
    return [f"change: setting - full precision, as a share of its score{interval}{samples}", verdict(rows)]


def _short_name(name: str) -> str:
    """Short name of a column."""
    return name.removesuffix("_bits").removesuffix(" exact")


def columns_of(settings: tuple[ScoredSetting, ...]) -> list[str]:
    """Names of the columns that describe settings."""
    return columns([setting.about for setting in settings])


def _varies(settings: tuple[ScoredSetting, ...], name: str) -> bool:
    return len({setting.about.get(name) for setting in settings} - {"none"}) > 1


def _cost_text(outcome: Outcome) -> str:
    """Number of computed and reused settings and units, and the time."""
    full = sum(map(is_reference, outcome.settings))
    count = f"{len(outcome.settings) - full} settings{' and full precision' if full else ''}"
    steps = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in outcome.seconds.items())
    lines = [f"{count}, {outcome.scored} scored in this run; {steps}; {outcome.cpu_seconds:.0f} CPU seconds"]
    if outcome.sequential:
        lines.append(f"each setting is quantized alone, as an export does: {outcome.quantized} units, none shared")
    else:
        lines.append(
            f"they use {outcome.used_units} units, {outcome.units} of them distinct; "
            f"{outcome.quantized} quantized in this run"
        )
    if outcome.scored:
        seconds_per_setting = sum(outcome.seconds.values()) / outcome.scored
        lines.append(f"{seconds_per_setting:.1f} s per setting scored in this run")
    return "\n".join(lines)
