"""Tables from recorded measurements: checks of tiny models in vLLM, and the models of other families by bits."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

MEASUREMENTS = Path(__file__).parent / "measurements"
BITS = (8, 4, 3, 2)
NOT_RUN = "not run"  # key of a recorded check that a machine could not run -> the reason


def read(name: str) -> dict[str, Any]:
    """A recorded JSON file of docs/measurements/."""
    content: dict[str, Any] = json.loads((MEASUREMENTS / name).read_text(encoding="utf-8"))
    return content


def model_checks(name: str = "checked-families.json") -> str:
    """Markdown: a row per check of a tiny model in vLLM. name: of the recorded file."""
    lines = [
        "| model | schemes | vLLM's linears | engine | floor | scales doubled | doubled on both sides |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, checks in read(name).items():
        for schemes, check in checks.items():
            linears = ", ".join(f"{count} {name[17:]}" for name, count in sorted(check["schemes"].items()))
            control = check.get("control") or {}
            doubled = [format(control[key], ".4f") if control else "" for key in ("moved", "restored")]
            cells = [f"`{model}`", schemes, linears, f"{check['mean']:.4f}", f"{check['floor']:.4f}", *doubled]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gpu_checks() -> str:
    """Markdown: a row per check of a tiny model in vLLM on a GPU, with the kernels that its log names."""
    lines = ["| model | schemes | vLLM's linears by kernel | engine | floor |", "|---|---|---|---|---|"]
    for model, checks in read("checked-families-gpu.json").items():
        for schemes, check in checks.items():
            if NOT_RUN in check:
                lines.append(f"| `{model}` | {schemes} | {NOT_RUN}: {check[NOT_RUN]} |  |  |")
                continue
            pairs = (kernel.split(" for CompressedTensors") for kernel in check["kernels"])
            counts = {name[17:]: count for name, count in check["schemes"].items()}
            linears = ", ".join(
                f"{counts[scheme]} {scheme}: {kernel.removesuffix('LinearKernel')}" for kernel, scheme in pairs
            )
            lines.append(f"| `{model}` | {schemes} | {linears} | {check['mean']:.4f} | {check['floor']:.4f} |")
    return "\n".join(lines)


def whole_checks() -> str:
    """Markdown: verdicts of tiny checkpoints whose statistics were compared with the whole forward pass, by name."""
    verdicts = Counter(result["verdict"] for result in read("whole-check.json").values())
    lines = [f"**{', '.join(f'{count} {verdict}' for verdict, count in verdicts.items())}.**", ""]
    lines += ["| checkpoint | verdict | Hessians | largest difference | blocks verified |", "|---|---|---|---|---|"]
    for name, result in read("whole-check.json").items():
        if "reason" in result:
            lines.append(f"| `{name}` | {result['verdict']}: {result['reason']} |  |  |  |")
            continue
        verified = result["skipped"] or f"{result['blocks']}, difference {result['difference']:.1g}"
        cells = [f"`{name}`", result["verdict"], str(result["hessians"]), f"{result['largest']:.1e}", verified]
        lines.append(f"| {' | '.join(cells)} |")
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
