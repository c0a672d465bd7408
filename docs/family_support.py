"""The table of docs/reference/families.md: what is recorded of each family, from headers, exports and checks."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

from docs.family_pages import UNPUBLISHED, sizes_of
from docs.measured_pages import MEASUREMENTS, NOT_RUN, read
from exporter.amounts import size
from exporter.model import families
from exporter.model.config_check import known_family
from exporter.model.families import FAMILIES, Family
from tests.headers.read import HEADER_NAMES, header_config
from tests.tiny_models import CONFIGS

HEADS = (
    "family",
    "declared in",
    "`mmq plan`: headers",
    "smallest one: 16, 8 / 4, 4 / 3 bits",
    "GPTQ",
    "AWQ",
    "`verify`",
)
CPU_HEADS = ("4 bits in vLLM, CPU", "int8 in vLLM, CPU", "other parts in vLLM, CPU")
GPU_HEADS = ("4 bits in vLLM, GPU", "8 bits in vLLM, GPU", "other parts in vLLM, GPU")


def family_support() -> str:
    """Markdown: a row per family. The columns of a GPU are there once `bench.check_families --preset gpu` has run."""
    support, checks = read("family-support.json"), read("checked-families.json")
    on_gpu = read("checked-families-gpu.json") if (MEASUREMENTS / "checked-families-gpu.json").is_file() else None
    heads = HEADS + CPU_HEADS + (GPU_HEADS if on_gpu else ())
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, family in FAMILIES.items():
        file, length, count = declaration(family)
        declared = f"`{file}`: {length} lines" + (f" for {count} families" if count > 1 else "")
        cells = [f"`{name}`", declared, *_published(family)]
        cells += [_methods(support[name][method], family) for method in ("gptq", "awq")]
        cells += [_verified(support[name]), *_served(checks, family, ("w4", "w8a8"))]
        cells += _served(on_gpu, family, ("w4", "w8")) if on_gpu else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def declaration(family: Family) -> tuple[str, int, int]:
    """The file that declares a family, its lines, and the number of families in it."""
    modules = [sys.modules[f"{families.__name__}.{path.stem}"] for path in Path(families.__path__[0]).glob("[!_]*.py")]
    module = next(module for module in modules if any(value is family for value in vars(module).values()))
    count = sum(value in FAMILIES.values() for value in vars(module).values() if isinstance(value, Family))
    file = Path(str(module.__file__))
    return file.name, len(file.read_text(encoding="utf-8").splitlines()), count


def smallest(family: Family) -> tuple[int, str, tuple[int, int, int]]:
    """Number of published headers that the tests plan; name of the smallest checkpoint; its bytes as in `sizes_of`."""
    name = smallest_name(family)
    return len(_headers(family)), name.split("--")[1], sizes_of(name)


def smallest_name(family: Family) -> str:
    """The header of the family's smallest published checkpoint."""
    return min(_headers(family), key=lambda name: sizes_of(name)[0])


def _headers(family: Family) -> list[str]:
    """The headers of the family's published checkpoints."""
    return [n for n in HEADER_NAMES if n not in UNPUBLISHED and known_family(header_config(n), n).name == family.name]


def _published(family: Family) -> list[str]:
    """Cells: number of headers, and the sizes of the smallest checkpoint."""
    count, name, sizes = smallest(family)
    return [str(count), f"`{name}`: {', '.join(map(size, sizes))}"]


def _methods(results: dict[str, Any], family: Family) -> str:
    """The components that a method quantized, and the bits; what differs from the bits of the rule; refusals."""
    groups: dict[str, list[str]] = {}
    for bits, result in results.items():
        groups.setdefault(_outcome(result, bits), []).append(bits)
    cells = [f"{', '.join(bits)} bits: {text}" for text, bits in groups.items()]
    unpackable = [f"`{part.name}`" for part in family.components if part.unpackable]
    return "; ".join([*cells, *([f"{', '.join(unpackable)} stored in 16 bits, see below"] if unpackable else [])])


def _outcome(result: dict[str, Any], bits: str) -> str:
    """The components of one export, with the linears that have other bits than the rule."""
    if "refused" in result:
        return f"refused: {result['refused']}"
    texts = []
    for name, kinds in result["components"].items():
        others = {kind.split(", ")[1]: count for kind, count in kinds.items() if f", {bits} bits" not in kind}
        total = sum(kinds.values())
        texts.append(name + "".join(f" ({count} of {total} linears in {kind})" for kind, count in others.items()))
    return ", ".join(texts)


def _verified(results: dict[str, Any]) -> str:
    """Number of verified exports, and the largest difference between two readers of the same artifact."""
    exports = [export for by_bits in results.values() for export in by_bits.values() if "refused" not in export]
    return f"{len(exports)} exports, largest difference {max(export['difference'] for export in exports):.1g}"


def _served(results: dict[str, Any], family: Family, schemes: tuple[str, str]) -> list[str]:
    """Cells of the checks in vLLM: both schemes of the default parts, and the other parts; or why there are none."""
    if family.unserved:
        return [f"none: {family.unserved}", "none", "none"]
    others = {name: result for name, result in results.items() if CONFIGS[name][0].name == family.name != name}
    verdicts = Counter(check.get("passed") for result in others.values() for check in result.values())
    rest = (
        f"{', '.join(map(_part, others))}: {'failed' if verdicts[False] else 'passed'}" if others else "no other parts"
    )
    own = results.get(family.name, {})
    return [*(_verdict(own[name]) if name in own else NOT_RUN for name in schemes), rest]


def _part(model: str) -> str:
    """The part in which a tiny model differs from the default of its family."""
    family = CONFIGS[model][0]
    return f"`{model.removeprefix(family.name + '-').removesuffix('_vision_model')}`"


def _verdict(check: dict[str, Any]) -> str:
    if NOT_RUN in check:
        return f"{NOT_RUN}: {check[NOT_RUN]}"
    if not check["passed"]:
        return f"failed: {check['problems'][0]}"
    return f"passed: {check['mean']:.3f} ({check['floor']:.3f})"
