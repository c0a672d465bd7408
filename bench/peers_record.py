"""Gather rows of `bench/peers.py --lines` into docs/measurements/few-bits.json.

    python -m bench.peers_record demos.jsonl compare.jsonl --rename /tmp/llava=smollm2-llava --json smollm2=built.json

Of rows about the same run (model, component, bits, group, samples, prompts, draw, method) the last one is kept; rows
judged on validation samples are left out. Then `python -m docs.generate` writes the tables of
docs/measurements/few-bits.md; with --out docs/measurements/ideas.json, those of docs/measurements/ideas.md.
"""

import argparse
import json
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parent.parent / "docs" / "measurements" / "few-bits.json"
RUN = ("model", "component", "bits", "group", "samples", "calibration_prompts", "draw", "method")


def gathered(files: list[Path], names: dict[str, str]) -> list[dict[str, Any]]:
    """The rows of the files in a fixed order, without repeated runs. names: model in the files -> its name."""
    runs: dict[tuple[str, ...], dict[str, Any]] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row.get("split", "test") != "test":
                continue
            row["model"] = names.get(row["model"], row["model"])
            runs[tuple(str(row.get(key, "")) for key in RUN)] = {
                name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()
            }
    return [runs[run] for run in sorted(runs)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--rename", nargs="*", default=[], help="OLD=NEW names of models")
    parser.add_argument("--json", nargs="*", default=[], help="NAME=FILE, other recorded figures")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    rows = gathered(options.files, dict(pair.split("=", 1) for pair in options.rename))
    others = {pair.split("=", 1)[0]: json.loads(Path(pair.split("=", 1)[1]).read_text()) for pair in options.json}
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = "".join(f"{json.dumps(name)}: {json.dumps(content)},\n" for name, content in others.items())
    options.out.write_text(f'{{\n{head}"rows": [\n{lines}\n]\n}}\n', encoding="utf-8")
    print(f"{len(rows)} rows in {options.out}")


if __name__ == "__main__":
    main()
