"""Comparison of the demo models with the paper's BLIP-2: `python -m bench.demo_beside captioning.json retrieval.json`.

`bench/demo_degradation.py --methods rtn,gptq --groups row --json` writes both files. Every figure is relative to the
model's own full precision. The paper's scores are from arXiv 2601.15287 and its repository: CIDEr on COCO with GPTQ
(one scale per row, symmetric; full precision is the mean of all runs with 6 or more bits) and with AWQ (groups of 128,
asymmetric), and recall at 1 on Flickr30k with AWQ; the other components have 16 bits.
"""

import argparse
import json
from pathlib import Path
from typing import Any

FULL = {"gptq": 1.2185, "awq": 1.2542, "text": 97.9, "image": 89.46}
CIDER: dict[tuple[str, int], tuple[float | None, float | None]] = {  # part, bits -> by GPTQ, by AWQ
    ("vision", 4): (1.199, 1.272),
    ("vision", 3): (1.102, 1.275),
    ("vision", 2): (0.005, 0.736),
    ("qformer", 4): (1.248, 1.261),
    ("qformer", 3): (1.212, 1.229),
    ("qformer", 2): (1.089, 1.121),
    ("language", 4): (0.997, 1.164),
    ("language", 3): (0.215, 0.789),
    ("language", 2): (None, 0.005),
    ("all", 8): (1.261, 1.222),
    ("all", 4): (1.009, 1.182),
    ("all", 3): (0.241, 0.805),
}
RECALL: dict[tuple[str, int], tuple[float, float]] = {  # part, bits -> text and image recall at 1, by AWQ
    ("vision", 4): (97.4, 89.66),
    ("vision", 3): (97.4, 88.68),
    ("vision", 2): (84.1, 71.2),
    ("qformer", 4): (97.9, 89.64),
    ("qformer", 3): (98.2, 89.50),
    ("qformer", 2): (88.0, 83.3),
    ("all", 8): (97.9, 89.48),
    ("all", 4): (97.6, 89.68),
    ("all", 3): (97.2, 88.54),
    ("all", 2): (67.5, 61.3),
}
ORDER = [(part, bits) for part in ("vision", "qformer", "language", "all") for bits in (8, 4, 3, 2)]


def rows_of(file: Path) -> tuple[dict[str, float], dict[tuple[str, str, int], dict[str, float]]]:
    """Figures at full precision, and of every (method, part, bits) with one scale per row."""
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    summaries = {(r["method"], r["where"], r["bits"]): r["summary"] for r in rows if r["group"] == "row"}
    return rows[0]["summary"], summaries


def _share(value: float | None, full: float) -> str:
    return "-" if value is None else f"{100 * value / full:.0f} %"


def captioning(file: Path) -> list[str]:
    """Markdown table of captions and answers."""
    full, summaries = rows_of(file)
    lines = ["| part | bits | RTN: captions | answers | GPTQ: captions | answers | paper: CIDEr, GPTQ | AWQ |"]
    lines.append("|" + "---|" * 8)
    for part, bits in ORDER:
        demo = [summaries.get((method, part, bits)) for method in ("rtn", "gptq")]
        if any(demo):
            cells = [_share(f[key] if f else None, full[key]) for f in demo for key in ("captions", "scenes")]
            paper = CIDER.get((part, bits), (None, None))
            cells += [_share(paper[0], FULL["gptq"]), _share(paper[1], FULL["awq"])]
            lines.append(f"| {part} | {bits} | {' | '.join(cells)} |")
    return lines


def retrieval(file: Path) -> list[str]:
    """Markdown table of recall at 1."""
    full, summaries = rows_of(file)
    lines = [
        "| part | bits | RTN: text R@1 | image R@1 | GPTQ: text R@1 | image R@1 | paper, AWQ: text R@1 | image R@1 |"
    ]
    lines.append("|" + "---|" * 8)
    for part, bits in ORDER:
        demo = [summaries.get((method, part, bits)) for method in ("rtn", "gptq")]
        if any(demo):
            cells = [
                _share(f[key] if f else None, full[key]) for f in demo for key in ("matching text", "matching image")
            ]
            paper = RECALL.get((part, bits), (None, None))
            cells += [_share(paper[0], FULL["text"]), _share(paper[1], FULL["image"])]
            lines.append(f"| {part} | {bits} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("captioning", type=Path)
    parser.add_argument("retrieval", type=Path, nargs="?")
    options = parser.parse_args()
    print("\n".join(captioning(options.captioning)))
    if options.retrieval:
        print("\n".join(["", *retrieval(options.retrieval)]))


if __name__ == "__main__":
    main()
