"""Comparison of published importance with mmq's, from score files: `python bench/study_paper.py FOLDER [--json FILE]`.

The folder contains the paper's CSV files (arXiv 2601.15287): one row per setting, bits in columns `*_bits`.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exporter.study.importance import importance
from exporter.study.score_table import read_csv

WITHIN = 1.5  # percentage points


@dataclass(frozen=True)
class Published:
    """One line of the paper's table 1. file: its scores; score: their column; shares: in percent."""

    title: str
    file: str
    score: str
    shares: dict[str, float]


TABLE = (
    Published("BLIP-2 COCO, GPTQ", "gptq_scores.csv", "cider", {"vision": 50.4, "qformer": 2.0, "language": 47.6}),
    Published(
        "BLIP-2 COCO, AWQ", "awq_image_captioning.csv", "CIDEr", {"vision": 17.1, "qformer": 2.5, "language": 80.5}
    ),
    Published("LLaVA GQA, AWQ", "llava_awq_gqa.csv", "acc", {"vision": 5.38, "language": 94.62}),
    Published("LLaVA GQA, GPTQ", "llava_gptq_gqa.csv", "acc", {"vision": 20.87, "language": 79.13}),
    Published("BLIP-2 Flickr text, AWQ", "awq_image_text_retrieval.csv", "txt_r1", {"vision": 73.2, "qformer": 26.8}),
    Published("BLIP-2 Flickr image, AWQ", "awq_image_text_retrieval.csv", "img_r1", {"vision": 84.7, "qformer": 15.3}),
)


def row(published: Published, folder: Path) -> dict[str, Any]:
    """Importance from the file, and its largest difference from the published shares."""
    result = importance(read_csv(folder / published.file, published.score))
    consensus = result.shares.consensus
    largest_difference = max(abs(consensus[name] - share) for name, share in published.shares.items())
    usable_region = result.inside.consensus if result.inside else None
    figures = {
        "consensus": consensus,
        "off": largest_difference,
        "r2_linear": result.shares.r2_linear,
        "usable": result.usable,
        "inside": usable_region,
    }
    return asdict(published) | figures | {"marginal": {c: [asdict(d) for d in ds] for c, ds in result.marginal.items()}}


def line(result: dict[str, Any]) -> str:
    """One row of a Markdown table."""

    def shares(values: dict[str, float] | None) -> str:
        return " / ".join(f"{value:.1f}" for value in values.values()) if values else "too few"

    verdict = "yes" if result["off"] <= WITHIN else f"no, {result['off']:.1f} off"
    cells = [result["title"], shares(result["shares"]), shares(result["consensus"]), verdict, shares(result["inside"])]
    cells.append(f"{result['r2_linear']:.2f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print("| what | published | ours | within 1.5 points | usable region | R2 of a line |\n|---|---|---|---|---|---|")
    rows = [row(published, options.folder) for published in TABLE]
    for result in rows:
        print(line(result))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
