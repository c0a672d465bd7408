"""Tables from recorded measurements: checks of tiny models in vLLM, and the models of other families by bits."""

import json
from pathlib import Path
from typing import Any

from docs.family_pages import UNPUBLISHED
from exporter.model.families import FAMILIES
from tests.headers.read import HEADER_NAMES, header_config
from tests.tiny_models import CONFIGS

MEASUREMENTS = Path(__file__).parent / "measurements"
BITS = (8, 4, 3, 2)


def read(name: str) -> dict[str, Any]:
    """A recorded JSON file of docs/measurements/."""
    content: dict[str, Any] = json.loads((MEASUREMENTS / name).read_text(encoding="utf-8"))
    return content


def family_checks() -> str:
    """Markdown: a row per family, what of it is planned, packed and checked in vLLM on a CPU."""
    results = read("checked-families.json")
    heads = ("family", "published headers planned", "packed", "4 bits in vLLM", "int8 in vLLM", "other parts in vLLM")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    published = [name for name in HEADER_NAMES if name not in UNPUBLISHED]
    planned = [header_config(name)["architectures"][0] for name in published]
    for name, family in FAMILIES.items():
        count = sum(planned.count(architecture) for architecture in family.architectures)
        packed = ", ".join(part.name for part in family.components if not (part.unpackable or part.without_data))
        others = {model: result for model, result in results.items() if CONFIGS[model][0].name == name != model}
        checks = [f"not served: {family.unserved}", "", ""] if family.unserved else _checks(results[name], others)
        lines.append(f"| `{name}` | {count} | {packed} | {' | '.join(checks)} |")
    return "\n".join(lines)


def _checks(result: dict[str, Any], others: dict[str, Any]) -> list[str]:
    """Cells of one family: both schemes of its default parts, and its other parts."""
    parts = [_part(model) for model in others]
    passed = all(check["passed"] for checks in others.values() for check in checks.values())
    rest = f"{', '.join(parts)}: {'passed' if passed else 'failed'}" if parts else ""
    return [*(_verdict(result[schemes]) for schemes in ("w4", "w8a8")), rest]


def _part(model: str) -> str:
    """The part in which a tiny model differs from the default of its family."""
    family = CONFIGS[model][0]
    return f"`{model.removeprefix(family.name + '-').removesuffix('_vision_model')}`"


def _verdict(check: dict[str, Any]) -> str:
    if not check["passed"]:
        return f"failed: {check['problems'][0]}"
    return f"passed: {check['mean']:.3f} ({check['floor']:.3f})"


def model_checks() -> str:
    """Markdown: a row per check of a tiny model in vLLM."""
    lines = [
        "| model | schemes | vLLM's linears | engine | floor | scales doubled | doubled on both sides |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, checks in read("checked-families.json").items():
        for schemes, check in checks.items():
            linears = ", ".join(f"{count} {name[17:]}" for name, count in sorted(check["schemes"].items()))
            control = check.get("control") or {}
            doubled = [format(control[key], ".4f") if control else "" for key in ("moved", "restored")]
            cells = [f"`{model}`", schemes, linears, f"{check['mean']:.4f}", f"{check['floor']:.4f}", *doubled]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def lineage_tables() -> str:
    """Markdown: a table of each trained model of another family."""
    results = read("lineages.json")
    return "\n\n".join(f"## `{family}`\n\n{_lineage(rows)}" for family, rows in results.items())


def _lineage(rows: list[dict[str, Any]]) -> str:
    """The trained model of a family by bits."""
    lines = [
        "| bits | where | RTN: captions | NLL | answers | KL | GPTQ: captions | NLL | answers | KL |",
        "|" + "---|" * 10,
    ]
    (full,) = [row for row in rows if row["method"] == "none"]
    lines.append(f"| 16 | - | {' | '.join(_scores(full))} | {' | '.join(_scores(full))} |")
    for bits in BITS:
        for where, (vision, language) in {"vision": (bits, 16), "language": (16, bits), "both": (bits, bits)}.items():
            cells = []
            for method in ("rtn", "gptq"):
                key = {"method": method, "vision_bits": vision, "language_bits": language}
                (row,) = [row for row in rows if key.items() <= row.items()]
                cells += _scores(row)
            lines.append(f"| {bits} | {where} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _scores(row: dict[str, Any]) -> list[str]:
    """Shares of exact captions and answers, the captions' negative log-likelihood, and the divergence."""
    names = ("captioning exact", "captioning nll", "vqa exact")
    return [*(format(row[name], ".3f") for name in names), format(row["kl"], ".4f")]
