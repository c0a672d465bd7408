"""Predicted bytes and seconds of every step, for recipes and devices that between them use every term.

`test_steps.py` compares predictions with measurements, within a tenth; here no term may change unnoticed. After a
change of a formula: `python -m tests.test_predictions` writes the new figures.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.device import Device
from exporter.dtypes import FLOAT16
from exporter.model.families import FAMILIES
from exporter.model.source import open_source
from exporter.planning import durations, memory, rates, steps
from exporter.planning.placement import Placement
from exporter.planning.plan import Plan, make_plan
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import load_recipe
from exporter.planning.whole_model import WholeModel
from tests.headers import make
from tests.headers.read import write_sparse_checkpoint

FILE = Path(__file__).parent / "golden" / "predictions.json"
GIB = 2**30
CARD, SMALL, HOST = (
    Device("cuda:0", "a card", 80 * GIB),
    Device("cuda:0", "a card", 8 * GIB),
    Device("cpu", "CPU", 64 * GIB),
)
SMOL = "HuggingFaceTB--SmolVLM2-2.2B-Instruct"
GPTQ = {"component": "language", "bits": 4, "group_size": 128, "method": "gptq"}
VISION = {"component": "vision", "bits": 8, "group_size": "row", "method": "gptq"}
CASES: dict[str, tuple[str, str, Device, list[dict[str, Any]]]] = {  # header, recipe, device, other rules
    "gptq": (make.LLAVA_7B, "llava-w4-vit8", CARD, []),
    "small card": (make.LLAVA_7B, "llava-w4-vit8", SMALL, []),
    "cpu": (make.LLAVA_7B, "llava-w4-vit8", HOST, []),
    "awq": (make.LLAVA_7B, "llava-w4", CARD, [GPTQ | {"method": "awq"}]),
    "fold": (make.LLAVA_7B, "llava-w4", CARD, [GPTQ | {"fold": "awq"}]),
    "corrected": (make.LLAVA_7B, "llava-w4", CARD, [GPTQ | {"options": {"correct": True}}, VISION]),
    "corrected on a cpu": (make.LLAVA_7B, "llava-w4", HOST, [GPTQ | {"options": {"correct": True}}]),
    "learned": (make.LLAVA_7B, "llava-w4", CARD, [GPTQ | {"method": "autoround", "options": {"steps": 50}}]),
    "few samples": (make.LLAVA_7B, "llava-w4-vit8", CARD, []),
    "fold of few samples": (make.LLAVA_7B, "llava-w4", CARD, [GPTQ | {"fold": "awq"}]),
    "few samples corrected": (make.LLAVA_7B, "llava-w4", CARD, [GPTQ | {"options": {"correct": True}}]),
    "few samples learned": (make.LLAVA_7B, "llava-w4", CARD, [GPTQ | {"method": "autoround"}]),
    "opt": (make.OPT_27B, "blip2-caption-w8-vit4", CARD, []),
    "retrieval": (make.ITM_COCO, "blip2-retrieval-w4", CARD, []),
    "retrieval on a cpu": (make.ITM_COCO, "blip2-retrieval-w4", HOST, []),
    "smolvlm": (SMOL, "llava-w4", CARD, [GPTQ | {"group_size": 64}]),
}


def planned(name: str, write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The plan of a case on a host with 64 GiB free and one core."""
    header, recipe_name, device, rules = CASES[name]
    monkeypatch.setattr(steps, "free_host_bytes", lambda: 64 * GIB)
    monkeypatch.setattr(rates, "cpu_threads", lambda: 1)
    recipe = load_recipe(recipe_name)
    if "few samples" in name:  # then weights take the most memory
        recipe = recipe.adjusted(calibration={"samples": 2, "batch": 1})
    if rules:
        recipe = Recipe.model_validate(recipe.model_dump() | {"quantize": rules})
    checkpoint, family = open_source(str(write(header)), dtype=recipe.model.dtype)
    return make_plan(recipe, checkpoint, family, device)


def predictions(plan: Plan) -> dict[str, list[Any]]:
    """Step -> bytes on the device, bytes on the host, seconds, note and warning."""
    return {
        step.name: [step.device_bytes, step.host_bytes, round(step.seconds, 5), step.note, step.warning]
        for step in plan.steps
    }


@pytest.mark.parametrize("name", CASES)
def test_no_term_of_a_prediction_changes_unnoticed(
    name: str, sparse_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert predictions(planned(name, sparse_checkpoint, monkeypatch)) == json.loads(FILE.read_text())[name]


def test_every_peak_of_quantizing_a_block_is_counted() -> None:
    """Sizes for which each of the peaks is the largest: many inputs, many weights, one large linear, a CPU."""
    strips, square = memory.STRIP_BYTES, 100 * 100
    assert memory._quantize(0, [10], CARD) == (4 + 9) * 10
    assert memory._quantize(0, [10, 10], CARD) == (8 + 9) * 20
    assert memory._quantize(100, [10], CARD) == 4 * 10 + 8 * square + strips * 100
    assert memory._quantize(1, [10**6], CARD) == 4 + (4 + 1) * 10**6 + 14 * 10**6
    assert memory._quantize(1, [10**6] * 9, CARD) == (8 + 4 + 1 + 2) * 9 * 10**6 + (4 + 2)
    assert memory._quantize(1, [10**6] * 9, HOST) == (8 + 4 + 1 + 4 + 4) * 9 * 10**6 + (4 + 4)
    assert memory._smooth([(10, [7, 5]), (20, [9])]) == 4 * (100 + 400) + 28 * 9 + 4 * 9
    codes, phases = 30 + 6, [(10, [30]), (2, [6])]
    assert memory._solve(phases, False, CARD) == max(13 * 30 + codes, 13 * 6 + codes + 30)


def test_every_peak_of_a_correction_is_counted() -> None:
    peaks = memory._correction(width=8, count=32, rows=3, size=2, batch=100)
    assert peaks == {
        "collect": 2 * 256 + 100 + 3 * 3 * 8 * 2,
        "factor": 4 * 32 + 3 * 256 + memory.STRIP_BYTES * 8,
        "shift": 2 * 128 + 3 * 256 + 2 * 4 * 4 * 8,
        "share": 2 * 128 + 256 + 100 + 144 + 2 * 4 * 4 * 3,
    }
    assert memory._correct([(8, [16, 16]), (2, [4])], 3, 2, 100) == 36 + max(peaks.values())


def test_seconds_of_an_evaluation_are_for_the_gates_tasks() -> None:
    recipe, family = load_recipe("llava-w4"), FAMILIES["llava"]
    assert len(family.tasks) == 2
    whole = WholeModel(1000, 0, 0, 10, 0, 0, 0, operations=10**15, depth=32)
    place = Placement(FLOAT16, batch=32, streamed=False, bytes=0)
    one, both, doubled = (
        durations.evaluate_seconds(recipe.model_copy(update={"gates": gates}), family, whole, place, CARD)
        for gates in (recipe.gates[:1], (), recipe.gates[:1] * 2)
    )
    assert one == doubled < both


def main() -> None:
    """Write the figures of all cases."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:

        def write(header: str) -> Path:
            place = Path(folder) / header
            return place if place.exists() else write_sparse_checkpoint(place, header)

        figures = {name: predictions(planned(name, write, patch)) for name in CASES}
    FILE.write_text(json.dumps(figures).replace("{", "{\n").replace("], ", "],\n").replace("}, ", "},\n") + "\n")


if __name__ == "__main__":
    main()
