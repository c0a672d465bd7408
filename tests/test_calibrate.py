"""Streaming calibration equals a naive version that keeps the whole model and runs it from the start each time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from exporter.device import choose
from exporter.errors import CalibrationError
from exporter.events import Event
from exporter.files.shard_writer import ShardWriter
from exporter.methods import METHODS
from exporter.model.checkpoint import Checkpoint
from exporter.model.families import FAMILIES, Family
from exporter.model.stream import Stream
from exporter.numerics.quantized import QuantizedLinear
from exporter.numerics.ranges import fit_scale
from exporter.planning.plan import Plan, make_plan
from exporter.planning.recipe import Recipe, Rule
from exporter.planning.recipe_file import load_recipe
from exporter.quantization import block_io, calibrate
from exporter.quantization.block import relative_error
from exporter.quantization.workdir import Workdir
from tests.slow import some_of
from tests.test_families import live_model, tiny_inputs
from tests.tiny_models import QUICK

LLAVA = FAMILIES["llava"]
LANGUAGE = (
    Rule(component="language", method="rtn", bits=3, group_size="row", blocks="0:1", role="attention"),
    Rule(component="language", method="gptq", bits=3, group_size=32, symmetric=False, options=QUICK["gptq"]),
)
RULES = (
    Rule(component="vision", method="gptq", bits=4, group_size=16, options=QUICK["gptq"]),
    Rule(component="projector", method="gptq", bits=4, group_size="row", options=QUICK["gptq"]),
    *LANGUAGE,
)
FORMER = Rule(component="qformer", method="gptq", bits=4, group_size=16, options=QUICK["gptq"])
RULES_OF = {
    "llava": RULES,
    "blip2": (
        RULES[0],
        FORMER.model_copy(update={"store": "dequantized"}),
        RULES[1].model_copy(update={"store": "dequantized"}),
        *LANGUAGE,
    ),
    "blip2-itm": (RULES[0], FORMER),
}
UNITS_OF = {
    "llava": ["vision"] * 2 + ["projector"] + ["language"] * 2,
    "blip2": ["vision"] * 2 + ["qformer"] * 3 + ["projector"] + ["language"] * 2,
    "blip2-itm": ["vision"] * 2 + ["qformer"] * 3,
}


families = pytest.mark.parametrize("family", [FAMILIES[name] for name in RULES_OF], ids=RULES_OF)


def tiny_checkpoint(folder: Path, family: Family = LLAVA) -> Checkpoint:
    """The tiny model of the family as a hub-style folder in float32, so that nothing is rounded on the way."""
    folder.mkdir()
    writer = ShardWriter(folder, 10**9)
    for name, parameter in live_model(family).named_parameters():
        writer.add(family.canonical_name(name), parameter.detach().clone())
    writer.finish()
    (folder / "config.json").write_text(json.dumps(family.tiny_config()))
    return Checkpoint.open(folder, family.canonical_name)


def plan_for(checkpoint: Checkpoint, rules: tuple[Rule, ...] = RULES, family: Family = LLAVA) -> Plan:
    """A plan with the given rules on the tiny model."""
    recipe = load_recipe("llava-w4").model_dump() | {"quantize": [rule.model_dump() for rule in rules], "gates": ()}
    return make_plan(Recipe.model_validate(recipe), checkpoint, family, choose("cpu"))


def batches_for(family: Family) -> list[dict[str, torch.Tensor]]:
    """Two batches of different sizes and lengths, with padding."""
    return [tiny_inputs(family, 2, 6), tiny_inputs(family, 3, 9)]


def streamed(plan: Plan, checkpoint: Checkpoint, work: Path, batches: list[dict[str, torch.Tensor]]) -> Workdir:
    """Run the calibration; the work folder holds the result."""
    workdir = Workdir.open(work, {"test": 1})
    calibrate.run(plan, checkpoint, workdir, batches, choose("cpu"), lambda event: None)
    return workdir


def whole_model_twin(plan: Plan, batches: list[dict[str, torch.Tensor]]) -> dict[str, QuantizedLinear]:
    """The same walk without streaming: for every phase, run the whole model on all batches and watch one linear."""
    family = plan.family
    model, results = live_model(family), {}
    for unit in plan.units:
        component = family.component(unit.component)
        for phase in component.phases:
            rows = [row for row in unit.rows if row.linear in phase]
            if not rows:
                continue
            statistics = watch_module(model, rows[0].module, family, batches)
            for row in rows:
                linear = model.get_submodule(family.live_name(row.module))
                method = METHODS[row.rule.method]
                arguments = (row.scheme, row.rule.parsed_options(), torch.bfloat16)
                results[row.module], _ = method.quantize_linear(linear.weight.detach(), statistics, *arguments)
            for row in rows:
                linear = model.get_submodule(family.live_name(row.module))
                linear.weight.data = results[row.module].dequantize()
    return results


TEXT_IN_FORMER = ("attention.attention", "attention.output", "intermediate.", "output.")  # what also sees words


def watch_module(model: nn.Module, module: str, family: Family, batches: list[dict[str, torch.Tensor]]) -> object:
    """GPTQ statistics of one linear's input over whole forward passes, padding left out.

    Written out by name and by shape, and with whole passes only: the retrieval model's matching head, then its
    contrastive head, which calls the Q-Former twice, first for the pictures and then for the words.
    """
    linear = model.get_submodule(family.live_name(module))
    statistics = METHODS["gptq"].Statistics(linear.in_features, torch.device("cpu"))
    former = module.partition("encoder.layer.")[2].partition(".")[2] if family.name == "blip2-itm" else ""
    for matching in (True, False) if former else (None,):
        for batch in batches:
            mask, calls = batch["attention_mask"].bool(), []
            queries = torch.ones(len(mask), 5, dtype=torch.bool)

            def see(_: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict, calls: list = calls) -> None:
                calls.append(args[0] if args else kwargs["hidden_states"])

            handle = linear.register_forward_pre_hook(see, with_kwargs=True)
            with torch.no_grad():
                model(**batch, **({} if matching is None else {"use_image_text_matching_head": matching}))
            handle.remove()
            real = mask if "language_model" in module else None
            if former.startswith(TEXT_IN_FORMER):
                both = former.startswith("attention.")
                real = torch.cat([queries, mask], dim=1) if matching and both else mask
                if not matching and both:
                    statistics.update(calls.pop(0).flatten(0, 1))
            (x,) = calls
            rows = x.reshape(-1, x.shape[-1])
            statistics.update(rows if real is None else rows[real.flatten()])
    return statistics


@families
def test_streaming_equals_running_the_whole_model(family: Family, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", family)
    plan, batches = plan_for(checkpoint, RULES_OF[family.name], family), batches_for(family)
    assert [unit.component for unit in plan.units] == UNITS_OF[family.name]
    workdir = streamed(plan, checkpoint, tmp_path / "work", batches)
    expected = whole_model_twin(plan, batches)
    streamed_linears = {name: q for unit in plan.units for name, q in workdir.read(unit).linears.items()}
    assert streamed_linears.keys() == expected.keys()
    for name, linear in streamed_linears.items():
        same = (linear.codes == expected[name].codes).float().mean()
        assert same > 0.995, f"{name}: {same:.4f} of the codes agree; float sums in another order move a few"
        assert torch.equal(linear.scale, expected[name].scale), name


def test_linears_with_one_scale_per_tensor_do_not_share_it(tmp_path: Path) -> None:
    """q, k and v are quantized together where rows do not influence each other; one scale a tensor is the paper's."""
    checkpoint = tiny_checkpoint(tmp_path / "model", LLAVA)
    plan = plan_for(checkpoint, (Rule(component="language", method="rtn", bits=4, group_size="tensor"),))
    workdir = streamed(plan, checkpoint, tmp_path / "work", [])
    for unit in plan.units:
        linears = workdir.read(unit).linears
        for row in unit.rows:
            assert row.scheme is not None
            scale, _ = fit_scale(checkpoint.read(row.tensor.name).float(), row.scheme, torch.bfloat16)
            assert torch.equal(linears[row.module].scale, scale), row.module


@pytest.mark.parametrize("family", some_of({name: (FAMILIES[name],) for name in RULES_OF}, ["llava", "blip2-itm"]))
def test_padding_does_not_change_the_result(family: Family, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", family)
    plan = plan_for(checkpoint, RULES_OF[family.name][-1:], family)
    batch = tiny_inputs(family, 2, 6)
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][~batch["attention_mask"].bool()] = 77  # only tokens that the mask hides
    first = streamed(plan, checkpoint, tmp_path / "a", [batch])
    second = streamed(plan, checkpoint, tmp_path / "b", [other])
    for unit in plan.units:
        for name, linear in first.read(unit).linears.items():
            assert torch.equal(linear.codes, second.read(unit).linears[name].codes), name


def test_rounding_needs_no_data_and_reads_weights_only(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    plan = plan_for(checkpoint, (Rule(component="language", method="rtn", bits=4, group_size=32),))
    workdir = streamed(plan, checkpoint, tmp_path / "work", [])
    row = plan.units[1].rows[3]
    expected, _ = METHODS["rtn"].quantize_linear(
        checkpoint.read(row.tensor.name), None, row.scheme, row.rule.parsed_options(), torch.bfloat16
    )
    assert torch.equal(workdir.read(plan.units[1]).linears[row.module].codes, expected.codes)


def test_errors_are_relative_output_errors(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    plan, batches = plan_for(checkpoint, RULES[:1]), [tiny_inputs(LLAVA)]
    result = streamed(plan, checkpoint, tmp_path / "work", batches).read(plan.units[0])
    module = f"{plan.units[0].block}.self_attn.q_proj"
    statistics = watch_module(live_model(LLAVA), module, LLAVA, batches)
    weight = checkpoint.read(f"{module}.weight")
    lost = statistics.energy(weight - result.linears[module].dequantize()) / statistics.energy(weight)
    assert result.errors[module] == pytest.approx(lost**0.5, rel=1e-3)
    assert 0 < result.errors[module] < 0.2


def test_an_error_that_rounds_below_zero_is_zero() -> None:
    """Seen at 8 bits on a GPU, where the products of the report have 16 bits."""

    class Rounding:
        def energy(self, matrix: torch.Tensor) -> float:
            return -1e-9 if float(matrix.abs().max()) < 1 else 4.0

    weight = torch.full((2, 2), 2.0)
    assert relative_error(weight, weight - 1e-3, Rounding()) == 0.0
    assert relative_error(weight, weight * 2, Rounding()) == 1.0


def test_missing_data_is_an_error(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    plan = plan_for(checkpoint)
    with pytest.raises(CalibrationError, match="need calibration data"):
        streamed(plan, checkpoint, tmp_path / "a", [])


def test_events_count_units_that_are_on_disk_and_all_weights_are_unloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    plan, workdir, counts = plan_for(checkpoint), Workdir.open(tmp_path / "work", {}), []
    entered: dict[str, list[tuple[int, int]]] = {}
    streams: list[Stream] = []

    class Recorded(Stream):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            streams.append(self)

    def listen(event: Event) -> None:
        if event.stage == "quantize":
            counts.append((event.done, len(list((tmp_path / "work").glob("[0-9]*.safetensors")))))
        if event.stage == "calibrate":
            entered.setdefault(event.message, []).append((event.done, event.total))

    monkeypatch.setattr(block_io, "Stream", Recorded)
    calibrate.run(plan, checkpoint, workdir, [tiny_inputs(LLAVA)] * 2, choose("cpu"), listen)
    assert counts == [(i, i) for i in range(1, len(plan.units) + 1)]
    assert entered == {f"inputs of {name}": [(1, 2), (2, 2)] for name in ("vision", "projector", "language")}
    assert streams
    assert all(tensor.is_meta for stream in streams for tensor in stream.model.parameters())
