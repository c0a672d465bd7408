"""What a study found, as tables."""

from rich.console import Group
from rich.table import Table

from exporter.study.importance import Importance, Shares


def importance_page(found: Importance) -> Group:
    """Shares and marginal drops, with a sentence on how to read each."""
    head = f"{found.metric}, {found.full_score:.4g} with the most bits; {found.shares.rows} settings"
    parts: list[Table | str] = [head, _shares(found.shares, "percent of what decides the score, in this whole grid")]
    region = "; ".join(f"{name} {_numbers(bits)}" for name, bits in found.usable.items())
    parts.append(f"\nusable bits: {region}")
    if found.inside:
        parts.append(_shares(found.inside, f"the same among the {found.inside.rows} settings in that region"))
    return Group(*parts, "", _drops(found))


def _numbers(bits: tuple[float, ...]) -> str:
    return ", ".join(f"{b:g}" for b in bits) or "none"


def _shares(shares: Shares, title: str) -> Table:
    r2 = f"R2: forest {shares.r2_forest:.2f}, line {shares.r2_linear:.2f}"
    table = Table(
        "component", "consensus", "forest", "permutation", "SHAP", title=f"{title} ({r2})", title_justify="left"
    )
    for name in shares.consensus:
        ways = (shares.consensus, shares.forest, shares.permutation, shares.shap)
        table.add_row(name, *(f"{way[name]:.1f}" for way in ways))
    return table


def _drops(found: Importance) -> Table:
    title = "what bits cost there: mean share of the full score, others the same (standard error)"
    widths = sorted({drop.bits for drops in found.marginal.values() for drop in drops})
    table = Table("component", *(f"{bits:g} bits" for bits in widths), title=title, title_justify="left")
    for name, drops in found.marginal.items():
        known = {drop.bits: f"{drop.drop:+.1%} ({drop.error:.1%})" for drop in drops}
        table.add_row(name, *(known.get(bits, "") for bits in widths))
    return table
