"""Comparison of allocations with hand-written recipes: `python bench/study_demo.py --folder DIR [--model demo-llava]`.

For each built-in recipe of the model's family, exports the recipe and the allocation of the same size and evaluates
both on the same test samples; and reports the smallest allocation whose KL divergence is at most the recipe's.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from exporter.device import choose
from exporter.events import Event
from exporter.planning.recipe_file import built_in
from exporter.study import propose
from exporter.study.allocate import front, solve
from exporter.study.allocation_run import score_choices
from exporter.study.prepare import base_recipe
from exporter.study.sensitivity import measure, rules
from exporter.study.worker_pool import local
from exporter.study.worker_tasks import Setup, exam_samples, open_model

BITS, GROUPS = (2, 3, 4, 5, 6, 8), (128,)
POINTS = 40  # sizes on the Pareto front
WRITTEN = {  # family -> prefixes of the hand-written recipes
    "llava": ("llava-",),
    "blip2": ("blip2-caption-", "blip2-vqa-"),
    "blip2-itm": ("blip2-retrieval-",),
}


def print_note(event: Event) -> None:
    """Print notes to standard error; standard output has the table."""
    if event.stage == "note":
        print(event.message, file=sys.stderr, flush=True)


def compared(setup: Setup, samples: int, workers: int, points: int) -> dict[str, Any]:
    """The whole comparison as plain data."""
    model = open_model(setup)
    names = [name for name in built_in() if name.startswith(WRITTEN[model.family.name])]
    written = [(name, propose.comparable(name, model.recipe, model.family)) for name in names]
    schemes = rules(BITS, GROUPS, "gptq", True, False, model.recipe.format)
    device = choose(setup.device)
    with local(workers) as pool:
        places, full, outcome = measure(setup, "role", (), schemes, pool, print_note)
        sizes = [model.plan(recipe.quantize).bytes_after for _, recipe in written]
        same_size = [solve(places, full, size) for size in sizes]
        on_front = [choice for choice in front(places, full, points) if choice.bytes < full]
        candidates, written_scores = score_choices(setup, places, [*same_size, *on_front], written, pool, print_note)
    rows = []
    for i, (name, recipe) in enumerate(written):
        named = propose.recipe_of(model.recipe, f"as-large-as-{name}", places, same_size[i], exam_samples(setup), 0.99)
        proposed, written_result = (
            propose.confirm(candidate, setup.folder / "confirmed", device, setup.places, samples, print_note)
            for candidate in (named, recipe)
        )
        at_most_kl = [
            candidate
            for candidate in candidates
            if candidate.measured.scores["kl"] <= written_scores[i].measured.scores["kl"]
        ]
        smaller = min(at_most_kl, key=lambda candidate: candidate.measured.bytes, default=None)
        rows.append(
            {
                "recipe": name,
                "written": written_result.row() | {"kl": written_scores[i].measured.scores["kl"]},
                "chosen": proposed.row() | {"kl": candidates[i].measured.scores["kl"]},
                "smallest_as_near": smaller.row() if smaller else None,
            }
        )
        print(line(rows[-1]), flush=True)
    cost = {"seconds": dict(outcome.seconds), "cpu_seconds": outcome.cpu_seconds}
    return {
        "rows": rows,
        "front": [candidate.row() for candidate in candidates[len(same_size) :]],
        "samples": samples,
        "sensitivities": cost,
    }


def line(row: dict[str, Any]) -> str:
    """One row of a Markdown table."""
    cells = [row["recipe"]]
    for kind in ("written", "chosen"):
        figures = row[kind]
        values = [f"{metric['after']:.3f}" for _, metric in sorted(figures["metrics"].items())]
        cells += [f"{figures['bytes'] / 1000:.1f} kB", *values, f"{figures['drop']:+z.1%}", f"{figures['kl']:z.5f}"]
    small = row["smallest_as_near"]
    cells.append(f"{small['bytes'] / 1000:.1f} kB, KL {small['kl']:z.5f}" if small else "none")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo-llava")
    parser.add_argument("--folder", type=Path, required=True, help="work folder; a stopped run resumes there")
    parser.add_argument("--samples", type=int, default=500, help="of each task, real answers")
    parser.add_argument(
        "--proxy", type=int, default=64, help="of each task, for sensitivities; the front has 4 times these"
    )
    parser.add_argument("--points", type=int, default=POINTS, help="sizes of the front")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    recipe = base_recipe(options.model, None, (), 128, 0)
    setup = Setup(options.folder, recipe.model_dump_json(), samples=options.proxy, device=options.device)
    result = compared(setup, options.samples, options.workers, options.points)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
