"""Predictions for every step on real models; steps that do not fit into memory are refused or warned of."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from exporter.device import Device
from exporter.errors import PlanError
from exporter.model.source import open_source
from exporter.planning import steps
from exporter.planning.memory import upstream_tensors
from exporter.planning.plan import Plan, make_plan
from exporter.planning.recipe_file import load_recipe
from exporter.planning.steps import Step, refuse_shortage, step_warnings
from tests.headers import make

GIB = 2**30
RECIPES = {
    make.LLAVA_7B: "llava-w4-vit8",
    make.LLAVA_13B: "llava-w4-vit8",
    make.LLAVA_34B: "llava-w4-vit8",
    make.OPT_27B: "blip2-caption-w8-vit4",
    make.ITM_COCO: "blip2-retrieval-w4",
}
NAMES = ["plan", "read data", "quantize", "write", "verify", "evaluate", "check"]


def gpu(free: float) -> Device:
    """A card with so many GiB free."""
    return Device("cuda:0", "a card", int(free * GIB))


@pytest.fixture(autouse=True)
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with 64 GiB free."""
    monkeypatch.setattr(steps, "free_host_bytes", lambda: 64 * GIB)


@pytest.fixture
def planned(sparse_checkpoint: Callable[[str], Path]) -> Callable[..., Plan]:
    """`planned(HEADER, device)`, with sections of the recipe changed."""
    folders: dict[str, Path] = {}

    def plan(name: str, device: Device, **sections: dict[str, int]) -> Plan:
        recipe = load_recipe(RECIPES[name]).adjusted(**sections)
        folder = folders.setdefault(name, sparse_checkpoint(name))
        checkpoint, family = open_source(str(folder), dtype=recipe.model.dtype)
        return make_plan(recipe, checkpoint, family, device)

    return plan


def by_name(plan: Plan) -> dict[str, Step]:
    """The steps of a plan."""
    return {step.name: step for step in plan.steps}


@pytest.mark.parametrize(
    ("name", "recipe", "options", "gib"),  # options: of the last rule
    [
        (make.LLAVA_7B, "bench/recipes/llava-w4-vit8-gptq.yaml", None, 2.66),
        (make.LLAVA_7B, "bench/recipes/llava-w4-vit8-gptq.yaml", {"correct": True}, 4.58),
        (make.LLAVA_7B, "bench/recipes/llava-w4-awq.yaml", None, 4.07),
        (make.LLAVA_7B, "llava-w3-learned", None, 5.85),
        (make.OPT_27B, "blip2-caption-w8-vit4", None, 0.54),
    ],
)
def test_predicted_memory_of_quantizing_equals_the_measured_peaks(
    name: str, recipe: str, options: dict[str, bool] | None, gib: float, sparse_checkpoint: Callable[[str], Path]
) -> None:
    """On an H100 or H200 (docs/measurements/quantization-time.md)."""
    loaded = load_recipe(recipe)
    if options:
        *rules, last = loaded.quantize
        loaded = loaded.model_copy(update={"quantize": (*rules, last.model_copy(update={"options": options}))})
    checkpoint, family = open_source(str(sparse_checkpoint(name)), dtype=loaded.model.dtype)
    plan = make_plan(loaded, checkpoint, family, gpu(78))
    assert by_name(plan)["quantize"].device_bytes / GIB == pytest.approx(gib, rel=0.05)


@pytest.mark.parametrize(
    ("name", "step", "device", "host"),
    [
        (make.LLAVA_7B, "quantize", 2.66, 1.86),
        (make.LLAVA_7B, "write", 0.57, 3.53),
        (make.LLAVA_7B, "verify", 1.12, 1.75),
        (make.LLAVA_13B, "quantize", 4.18, 2.01),
        (make.LLAVA_13B, "write", 0.86, 3.69),
        (make.LLAVA_34B, "quantize", 7.00, 1.94),
        (make.LLAVA_34B, "write", 1.63, 3.32),
        (make.LLAVA_34B, "verify", 3.18, 2.00),
    ],
)
def test_predicted_memory_of_every_step_equals_the_measured_peaks(
    name: str, step: str, device: float, host: float, planned: Callable[..., Plan]
) -> None:
    """GiB of `llava-w4-vit8` on an H200 (docs/measurements/whole-export.md)."""
    predicted = by_name(planned(name, gpu(140)))[step]
    assert predicted.device_bytes / GIB == pytest.approx(device, rel=0.1)
    assert predicted.host_bytes / GIB == pytest.approx(host, rel=0.1)


@pytest.mark.parametrize("name", [*RECIPES, "HuggingFaceTB--SmolVLM2-2.2B-Instruct"])
def test_tensors_upstream_of_a_component_are_all_except_those_from_it_on(
    name: str, sparse_checkpoint: Callable[[str], Path]
) -> None:
    """Also for models whose components have one common prefix (`model.`)."""
    checkpoint, family = open_source(str(sparse_checkpoint(name)))
    for position, component in enumerate(family.components):
        later = {c.name for c in family.components[position:]}
        expected = set()
        for tensor in checkpoint.tensors:
            owner = family.component_of(tensor)
            block = next((i for i in range(99) if owner and f"{tensor}.".startswith(f"{owner.block(i)}.")), 0)
            runs = not owner or block < owner.used(checkpoint.config)
            if not (owner and owner.name in later) and runs and not family.reason_kept(tensor.removesuffix(".weight")):
                expected.add(tensor)
        assert set(upstream_tensors(checkpoint.tensors, family, checkpoint.config, component)) == expected
        assert expected


@pytest.mark.parametrize("name", RECIPES)
def test_every_step_is_predicted(name: str, planned: Callable[..., Plan]) -> None:
    plan = planned(name, gpu(140))
    steps_by_name = by_name(plan)
    assert list(steps_by_name) == [step for step in NAMES if step != "check" or not plan.family.unserved]
    assert all(step.seconds > 0 and step.host_bytes > 0 for step in plan.steps)
    dense = 2 * plan.parameters
    assert steps_by_name["evaluate"].device_bytes > dense  # of weights, not of the words that they are packed into
    assert plan.family.unserved or steps_by_name["check"].device_bytes > dense
    assert steps_by_name["quantize"].device_bytes < dense / 2 or plan.family.unserved  # retrieval keeps every picture
    assert max(steps_by_name[step].host_bytes for step in ("quantize", "write", "verify")) < 4 * GIB
    assert step_warnings(plan.steps, gpu(140)) == []


def test_seconds_are_near_what_was_measured(planned: Callable[..., Plan]) -> None:
    """21 to 22 s on an H100 and an H200; a CPU's core has a ten-thousandth of their arithmetic."""
    assert by_name(planned(make.LLAVA_7B, gpu(140)))["quantize"].seconds == pytest.approx(21.5, rel=0.25)
    cpu = Device("cpu", "CPU", 64 * GIB)
    assert by_name(planned(make.LLAVA_7B, cpu))["quantize"].seconds > 3600 / torch.get_num_threads()
    parts = [by_name(planned(name, gpu(140))) for name in (make.LLAVA_7B, make.LLAVA_13B, make.LLAVA_34B)]
    for step in ("quantize", "write", "verify", "evaluate"):
        seconds = [part[step].seconds for part in parts]
        assert seconds == sorted(seconds)


def test_a_7b_on_a_card_of_24_gib_is_evaluated_in_smaller_batches(planned: Callable[..., Plan]) -> None:
    plan = planned(make.LLAVA_7B, gpu(24))
    assert by_name(plan)["evaluate"].device_bytes < 24 * GIB
    assert "batch 20" in by_name(plan)["evaluate"].note
    (warning,) = step_warnings(plan.steps, gpu(24))
    assert "it runs 20 samples at a time (change this with --eval-batch" in warning
    assert step_warnings(plan.steps, gpu(24), skip_evaluation=True) == []
    smaller = planned(make.LLAVA_7B, gpu(24), evaluation={"batch": 4})
    assert step_warnings(smaller.steps, gpu(24)) == []


def test_a_34b_on_a_card_of_24_gib_is_evaluated_block_by_block(planned: Callable[..., Plan]) -> None:
    plan = planned(make.LLAVA_34B, gpu(24))
    assert "block by block" in by_name(plan)["evaluate"].note
    warnings = step_warnings(plan.steps, gpu(24))
    assert "block by block" in warnings[0]
    assert warnings[1].startswith("check needs about 65.0 GiB on a card, where 24.0 GiB are free: use --device cpu")
    refuse_shortage(plan.steps, gpu(24))


def test_fewer_samples_make_quantizing_fit_on_a_small_gpu(planned: Callable[..., Plan]) -> None:
    plan = planned(make.LLAVA_7B, gpu(2.5))
    with pytest.raises(
        PlanError, match=r"quantize needs about 2\.\d GiB on a card, where 2\.5 GiB are free: use fewer --s"
    ):
        refuse_shortage(plan.steps, gpu(2.5))
    refuse_shortage(planned(make.LLAVA_7B, gpu(2.5), calibration={"samples": 32}).steps, gpu(2.5))


def test_a_small_host_is_refused_with_every_step_that_does_not_fit(
    planned: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(make.LLAVA_7B, gpu(140))
    monkeypatch.setattr(steps, "free_host_bytes", lambda: 2 * GIB)
    with pytest.raises(PlanError) as caught:
        refuse_shortage(plan.steps, gpu(140))
    lines = caught.value.message.splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["quantize", "write"]
    assert "about 3.4 GiB on the host, where 2.0 GiB are free" in lines[1]


def test_on_a_cpu_all_memory_is_the_hosts(planned: Callable[..., Plan]) -> None:
    cpu = Device("cpu", "CPU", 23 * GIB)
    on_cpu, on_gpu = by_name(planned(make.LLAVA_7B, cpu)), by_name(planned(make.LLAVA_7B, gpu(140)))
    assert all(step.device_bytes == 0 for step in on_cpu.values())
    assert on_cpu["quantize"].host_bytes > on_gpu["quantize"].device_bytes
    assert "bfloat16" in on_cpu["evaluate"].note
    assert on_cpu["evaluate"].host_bytes < 23 * GIB


def test_retrieval_counts_the_stored_features_and_scores(planned: Callable[..., Plan]) -> None:
    few, many = (
        by_name(planned(make.ITM_COCO, gpu(140), evaluation={"samples": count}))["evaluate"].host_bytes
        for count in (100, 5000)
    )
    features = 677 * 1408 * 2
    scores = 5 * 4  # float32, of five texts a picture
    assert many - few == steps.BOUND + scores * 5000**2 - 100 * features - scores * 100**2


def test_a_recipe_that_needs_no_data_reads_none(sparse_checkpoint: Callable[[str], Path]) -> None:
    checkpoint, family = open_source(str(sparse_checkpoint(make.LLAVA_7B)))
    plain, calibrated = (
        by_name(make_plan(load_recipe(name), checkpoint, family, gpu(80)))["read data"]
        for name in ("llava-w8", "llava-w4")
    )
    assert calibrated.host_bytes - plain.host_bytes == 128 * 3 * 336 * 336 * 4


def test_no_step_on_a_cpu_is_told_to_use_the_cpu(planned: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = Device("cpu", "CPU", 2**20)
    plan = planned(make.LLAVA_7B, cpu)
    monkeypatch.setattr(steps, "free_host_bytes", lambda: 2**20)
    problems = steps.shortages(plan.steps, cpu)
    assert set(problems) == {step.name for step in plan.steps}
    assert not [problem for problem in problems.values() if "--device cpu" in problem]
    assert problems["check"].endswith("close other programs that use memory, or use a machine with more")
    assert problems["evaluate"].endswith(": use a smaller --eval-batch or --skip-evaluation")
    assert steps.advice("quantize", gpu(1)).endswith("a smaller calibration.batch in the recipe, or --device cpu")
