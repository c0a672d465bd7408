"""Quality by bits of models of other families: `python -m bench.lineages llava-next=DIR smolvlm=DIR`.

DIR is a model that `tools/demo_training/lineages.py` trained. The script writes pictures, captions and questions of the
demo scenes as a data folder, and runs `mmq study` on each model, as a user would: RTN and GPTQ with one scale per row,
in vision, in language and in both. Writes docs/measurements/lineages.json, from which `docs/generate.py` makes the
tables.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from exporter.data.demo.samples import samples

RESULTS = Path(__file__).parent.parent / "docs" / "measurements" / "lineages.json"
COUNTS = {"train": 128, "test": 200}
BITS = "2,3,4,8,16"
COLUMNS = ("method", "vision_bits", "language_bits", "captioning exact", "captioning nll", "vqa exact", "kl")


def write_data(folder: Path) -> None:
    """A folder with a picture, its caption and one question about it per scene, for training and test."""
    for split, count in COUNTS.items():
        (folder / split).mkdir(parents=True)
        lines = []
        captions, questions = (samples(task, split, count * 2) for task in ("captioning", "vqa"))  # type: ignore[arg-type]
        by_scene = {sample.identity.split("/")[2]: sample for sample in questions if "scenes" in sample.identity}
        for sample in captions[:count]:
            scene = sample.identity.split("/")[2]
            sample.image().save(folder / split / f"{scene}.png")
            line: dict[str, Any] = {"file_name": f"{scene}.png", "caption": sample.references[0]}
            if question := by_scene.get(scene):
                line |= {"question": question.question, "answer": question.references[0]}
            lines.append(json.dumps(line))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def study(model: Path, data: Path, out: Path) -> list[dict[str, Any]]:
    """Rows of the table: each component alone, and both."""
    command = [sys.executable, "-m", "exporter", "study", "--model", str(model), "--data", str(data), "--bits", BITS]
    command += ["--components", "vision,language", "--methods", "rtn,gptq", "--samples", str(COUNTS["test"])]
    command += ["--calibration", str(COUNTS["train"]), "--workers", "1", "--device", "cpu", "--out", str(out), "--json"]
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for combine in ("alone", "together"):
        done = subprocess.run([*command, "--combine", combine], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        for point in json.loads(done.stdout.splitlines()[-1])["points"]:
            rows[tuple(point[key] for key in COLUMNS[:3])] = {key: point[key] for key in COLUMNS}
    return list(rows.values())


def main() -> None:
    """Measure the models and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="FAMILY=DIR")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="mmq-lineages-") as scratch:
        write_data(Path(scratch) / "data")
        for argument in options.models:
            family, _, folder = argument.partition("=")
            results[family] = study(Path(folder), Path(scratch) / "data", Path(scratch) / family)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(family, *results[family], sep="\n")


if __name__ == "__main__":
    main()
