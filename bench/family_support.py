"""Export a tiny model of every family with GPTQ and AWQ in 8, 4 and 3 bits: `python -m bench.family_support`.

The models have the sizes of `bench/check_families.py`. Each export quantizes every component that calibration data can
quantize, and verifies the artifact against compressed-tensors in transformers. 8 bits have one scale per row; 4 and 3
bits have groups of 32, and `else: row` where these do not divide the inputs. Writes
docs/measurements/family-support.json: per family, method, bits and component the number of linears by what became of
them, and what the verification compared. `docs/generate.py` makes the table.
"""

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from bench.check_families import served_config
from exporter.device import choose
from exporter.errors import MmqError
from exporter.events import ignore
from exporter.model.families import FAMILIES, Family
from exporter.pipeline.export import Export, export
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import load_recipe
from tests.tiny_models import CONFIGS, QUICK, write_tiny

RESULTS = Path(__file__).parent.parent / "docs" / "measurements" / "family-support.json"
METHODS, BITS = ("gptq", "awq"), (8, 4, 3)


def recipe_for(family: Family, folder: Path, method: str, bits: int) -> Recipe:
    """One method and width for every component; components that vLLM cannot load packed are stored in 16 bits."""
    rules = [
        {
            "component": part.name,
            "method": method,
            "bits": bits,
            **({"group_size": "row"} if bits == 8 else {"group_size": 32, "else": "row"}),
            "store": "dequantized" if part.unpackable else "packed",
            "options": QUICK[method],
        }
        for part in family.components
        if not part.without_data
    ]
    calibration = {"data": "demo", "tasks": list(family.tasks), "samples": 8, "batch": 4}
    changed = {"quantize": rules, "model": {"repo": str(folder)}, "calibration": calibration, "gates": ()}
    return Recipe.model_validate(load_recipe("llava-w4").model_dump() | {"name": f"{method}-{bits}", **changed})


def outcome(done: Export) -> dict[str, Any]:
    """What became of each component's linears, and the result of the verification."""
    components: dict[str, dict[str, int]] = {}
    for part in done.plan.family.components:
        rows = [row for row in done.plan.of(part.name) if row.linear and row.scheme]
        kinds = Counter(f"{row.decision}, {row.scheme.bits} bits" for row in rows if row.scheme)
        if kinds:
            components[part.name] = dict(sorted(kinds.items()))
    assert not done.verified.skipped, done.verified.skipped
    return {
        "components": components,
        "blocks": done.verified.blocks,
        "difference": done.verified.block_difference,
    }


def main() -> None:
    """Export the models and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    names = parser.parse_args().only
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in names:
        (family, config), results[name] = CONFIGS[name], {}
        config = config if family.unserved else served_config(config)
        with tempfile.TemporaryDirectory(prefix="mmq-support-") as scratch:
            source = write_tiny(Path(scratch) / "model", family, config=config)
            for method in METHODS:
                for bits in BITS:
                    recipe, out = recipe_for(family, source, method, bits), Path(scratch) / f"{method}-{bits}"
                    try:
                        done = export(recipe, out=out, device=choose("cpu"), on_event=ignore, skip_evaluation=True)
                        result = outcome(done)
                    except MmqError as error:
                        result = {"refused": str(error)}
                    results[name].setdefault(method, {})[str(bits)] = result
                    print(name, method, bits, json.dumps(result), flush=True)
        ordered = {known: results[known] for known in FAMILIES if known in results}
        RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")


if __name__ == "__main__":
    main()
