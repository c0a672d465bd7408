"""Differences between two artifacts: recipe, bits, scores, size, versions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.planning.recipe import Recipe
from exporter.publishing.artifact_summary import Summary


@dataclass(frozen=True)
class Change:
    """One difference. what: the property. change: second - first for numbers, None for texts."""

    what: str
    first: str
    second: str
    change: float | None = None


def difference(first: Summary, second: Summary) -> tuple[Change, ...]:
    """All differences, most important first; empty for two artifacts of the same model, recipe and versions."""
    changes = [
        *_texts("source model", first.source, second.source),
        *_texts("format", first.manifest.format, second.manifest.format),
        *_parts(first, second),
        *_numbers("bits per weight", first.manifest.bits_per_weight, second.manifest.bits_per_weight, "{:.2f}"),
        *_numbers("bytes", first.bytes, second.bytes, "{:,.0f}"),
        *_metrics(first, second),
        *_texts("gates", verdict(first), verdict(second)),
        *_recipe(first.recipe, second.recipe),
        *_versions(first.manifest.versions, second.manifest.versions),
    ]
    changed = {name for name in _linears(first) | _linears(second) if _digest(first, name) != _digest(second, name)}
    if changed:
        share = f"{len(changed)} of {len(_linears(first) | _linears(second))}"
        changes.append(Change("quantized linears with different integers", "", share))
    return tuple(changes)


def verdict(summary: Summary) -> str:
    """Verdict of the report's gates, or that the artifact was never evaluated."""
    if summary.report is None:
        return "never evaluated"
    return summary.report.verdict


def _linears(summary: Summary) -> set[str]:
    return set(summary.manifest.linears)


def _digest(summary: Summary, name: str) -> Any:
    return summary.manifest.linears.get(name)


def _texts(what: str, first: str, second: str) -> list[Change]:
    return [Change(what, first, second)] if first != second else []


def _numbers(what: str, first: float, second: float, shown: str) -> list[Change]:
    return [Change(what, shown.format(first), shown.format(second), second - first)] if first != second else []


def _parts(first: Summary, second: Summary) -> list[Change]:
    schemes = [
        {name: scheme_text(summary, name) for name in dict.fromkeys(part.component for part in summary.parts)}
        for summary in (first, second)
    ]
    names = dict.fromkeys([*schemes[0], *schemes[1]])
    default = "16 bits"
    return [c for name in names for c in _texts(name, schemes[0].get(name, default), schemes[1].get(name, default))]


def scheme_text(summary: Summary, component: str) -> str:
    """Scheme and method of one component, such as `W4 g128 gptq`; a list when its blocks differ."""
    parts = [part for part in summary.parts if part.component == component]
    return ", ".join(f"{part.scheme} {'/'.join(part.methods)}".strip() for part in parts)


def _metrics(first: Summary, second: Summary) -> list[Change]:
    before, after = first.metrics(), second.metrics()
    measured = [samples_of(first), samples_of(second)]
    changes = []
    for name in dict.fromkeys([*before, *after]):
        if name in before and name in after and measured[0][name] != measured[1][name]:
            texts = [f"{m[name][1]:.4f} ({of[name]})" for m, of in zip((before, after), measured, strict=True)]
            changes.append(Change(f"{name}, not comparable: other samples", texts[0], texts[1]))
        elif name not in before or name not in after:
            texts = [f"{m[name][1]:.4f}" if name in m else "not measured" for m in (before, after)]
            changes.append(Change(name, texts[0], texts[1]))
        else:
            changes += _numbers(name, before[name][1], after[name][1], "{:.4f}")
            changes += _numbers(f"{name} at full precision", before[name][0], after[name][0], "{:.4f}")
    return changes


def samples_of(summary: Summary) -> dict[str, str]:
    """`task metric` -> number, data and seed of the samples of its score; scores of other samples do not compare."""
    if summary.report is None:
        return {}
    about = summary.report.evaluation
    origin = ", ".join(
        f"{key} {value}" for key, value in (("data", about.data), ("seed", about.seed)) if value is not None
    )
    return {f"{m.task} {m.metric}": f"{m.samples} samples; {origin}" for m in summary.report.measures}


def _recipe(first: Recipe, second: Recipe) -> list[Change]:
    """Every recipe value that differs, by its path, without the prose in evidence and summary."""
    flat = [flattened(recipe.model_dump(mode="json"), "recipe") for recipe in (first, second)]
    prose = ("recipe.evidence", "recipe.summary")
    paths = [path for path in dict.fromkeys([*flat[0], *flat[1]]) if not path.startswith(prose)]
    return [c for path in paths for c in _texts(path, flat[0].get(path, "(none)"), flat[1].get(path, "(none)"))]


def flattened(value: Any, path: str) -> dict[str, str]:
    """Flatten nested mappings and lists to one mapping from paths (`recipe.quantize[0].bits`) to texts."""
    if isinstance(value, Mapping):
        return {k: v for key, item in value.items() for k, v in flattened(item, f"{path}.{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, item in enumerate(value) for k, v in flattened(item, f"{path}[{i}]").items()}
    return {path: str(value)}


def _versions(first: Mapping[str, str], second: Mapping[str, str]) -> list[Change]:
    names = dict.fromkeys([*first, *second])
    return [c for n in names for c in _texts(f"{n} version", first.get(n, "absent"), second.get(n, "absent"))]
