"""Plans: a decision for every tensor of the true 7B model, from headers alone; impossible recipes are refused."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.random_checkpoint import write_processor
from exporter.commands.plan_tables import plan_table
from exporter.device import Device
from exporter.errors import PlanError
from exporter.formats import FORMATS
from exporter.model.checkpoint import Checkpoint
from exporter.model.families import FAMILIES
from exporter.model.source import open_source
from exporter.numerics.quantized import Scheme
from exporter.planning.plan import Plan, make_plan
from exporter.planning.recipe import Recipe, Rule
from exporter.planning.recipe_file import built_in, load_recipe
from tests.headers.read import header_config

LLAVA_7B = "llava-hf--llava-1.5-7b-hf"
H100 = Device("cuda:0", "H100", 78 * 2**30)
CPU = Device("cpu", "CPU", 64 * 2**30)


@pytest.fixture
def big(sparse_checkpoint: Callable[[str], Path]) -> Checkpoint:
    """The 7B model at true size; its weights are holes that would take 14 GB to read."""
    return Checkpoint.open(sparse_checkpoint(LLAVA_7B), FAMILIES["llava"].canonical_name)


def plan_of(name: str, checkpoint: Checkpoint, *rules: Rule) -> Plan:
    """The plan of a shipped recipe, optionally with other rules."""
    recipe = load_recipe(name)
    if rules:
        recipe = Recipe.model_validate(recipe.model_dump() | {"quantize": [rule.model_dump() for rule in rules]})
    return make_plan(recipe, checkpoint, FAMILIES["llava"], H100)


@pytest.mark.parametrize("name", [name for name in built_in() if name.startswith("llava")])
def test_every_tensor_of_the_true_7b_gets_one_decision(
    name: str, big: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "read", None)  # a plan reads no tensor
    plan = plan_of(name, big)
    assert [row.tensor.name for row in plan.rows] == list(big.tensors)
    assert plan.parameters == 7_063_427_072
    assert all(row.reason or row.decision == "packed" for row in plan.rows)
    packed = {row.module for row in plan.rows if row.decision == "packed"}
    assert packed == {row.module for unit in plan.units for row in unit.rows}
    assert len([m for m in packed if m.startswith("language_model.model.layers.")]) == 224
    vision = (
        0 if name in ("llava-w4", "llava-fp8-vit16", "llava-fp8-vit16-cache8") else 23 * 6
    )  # the 24th block never runs
    assert len([m for m in packed if m.startswith("vision_tower.")]) == vision
    assert "language_model.lm_head" not in packed


def test_a_recipe_works_on_every_family_with_its_components() -> None:
    """The shipped default for LLaVA on BLIP-2, whose language model, vision tower and projector are others."""
    checkpoint, family = open_source("demo-blip2")
    plan = make_plan(load_recipe("llava-w4-vit8"), checkpoint, family, CPU)
    assert plan.family.name == "blip2"
    packed = {(row.component, row.scheme) for row in plan.rows if row.decision == "packed"}
    assert packed == {("vision", Scheme(8, "row")), ("language", Scheme(4, 128))}
    assert all(row.decision == "kept" for row in (*plan.of("qformer"), *plan.of("projector")))


def test_components_and_tasks_that_a_family_lacks_are_refused_together() -> None:
    checkpoint, family = open_source("demo-blip2-itm")
    with pytest.raises(PlanError) as caught:
        make_plan(load_recipe("llava-w4-vit8"), checkpoint, family, CPU)
    message = caught.value.message
    assert "quantize[1]: family blip2-itm has no component 'projector'; it has vision, qformer" in message
    assert "quantize[2]: family blip2-itm has no component 'language'; it has vision, qformer" in message
    assert "gates[0].task: family blip2-itm supports retrieval, not vqa" in message
    assert "matches no linear" not in message  # it would repeat the first two lines


def test_a_recipe_with_a_family_is_checked_against_the_model() -> None:
    checkpoint, family = open_source("demo-blip2")
    data = load_recipe("llava-w4-vit8").model_dump()
    data["model"]["family"] = "llava"
    with pytest.raises(PlanError, match="is for family llava, but the model's family is blip2") as caught:
        make_plan(Recipe.model_validate(data), checkpoint, family, CPU)
    assert "remove `family`" in str(caught.value.hint)


def test_sizes_count_scales_and_match_arithmetic(big: Checkpoint) -> None:
    plan = plan_of("llava-w4-vit8", big)
    language = [row for row in plan.of("language") if row.decision == "packed"]
    weights = sum(row.tensor.size for row in language)
    assert weights == 6_476_005_376
    shapes = 16 * len(language)  # weight_shape, two int64
    assert sum(row.bytes_after for row in language) == weights // 2 + weights // 128 * 2 + shapes
    assert FORMATS["compressed_tensors"].stored_bytes(Scheme(8, "row"), 4096, 1024, 2) == 4096 * 1024 + 2048 + 16
    assert plan.bytes_before == 2 * plan.parameters
    assert 4.6 < plan.bits_per_weight < 4.9  # the paper counts 4.656 without scales


def test_units_come_in_data_order(big: Checkpoint) -> None:
    plan = plan_of("llava-w4-vit8", big)
    assert [unit.index for unit in plan.units] == list(range(23 + 32))
    assert [unit.block for unit in plan.units[:2]] == [f"vision_tower.vision_model.encoder.layers.{i}" for i in (0, 1)]
    assert plan.units[23 + 10].block == "language_model.model.layers.10"
    assert plan.units[23].rows[0].linear == "self_attn.q_proj"


def test_the_tables_of_a_plan_have_figures_at_the_right(big: Checkpoint) -> None:
    plan = plan_of("llava-w4-vit8", big)
    table = plan_table(plan)
    columns = {str(column.header): [column.justify, *column.cells] for column in table.columns}
    assert {name: cells[0] for name, cells in columns.items()} == dict.fromkeys(
        ("component", "decision", "scheme"), "left"
    ) | dict.fromkeys(("tensors", "before", "after"), "right")
    assert [cells[1] for cells in columns.values()] == ["vision", "packed", "W8 row rtn", "138", "578.8 MB", "289.8 MB"]
    assert [cells[-1] for cells in columns.values()][:4] == ["total", "", "", str(len(plan.rows))]
    assert all(column.no_wrap for column in table.columns)


def test_later_rules_that_match_nothing_are_an_error(big: Checkpoint) -> None:
    whole_component = Rule(component="language", bits=4, group_size=128)
    shadowed = Rule(component="language", bits=8, blocks="0:4")
    with pytest.raises(PlanError, match=r"quantize\[1\] .*matches no linear"):
        plan_of("llava-w4", big, whole_component, shadowed)
    beyond = Rule(component="vision", bits=8, blocks="23:24")
    with pytest.raises(PlanError, match=r"quantize\[0\] .*matches no linear"):
        plan_of("llava-w4", big, beyond)


def test_blocks_and_roles_are_decided_by_the_first_match(big: Checkpoint) -> None:
    plan = plan_of(
        "llava-w4",
        big,
        Rule(component="language", bits=8, blocks="front", role="mlp"),
        Rule(component="language", bits=16, blocks="end"),
        Rule(component="language", bits=4, group_size=128),
    )
    bits = {row.module: row.scheme.bits if row.scheme else 16 for row in plan.of("language") if row.linear}
    layer = "language_model.model.layers."
    assert bits[f"{layer}0.mlp.up_proj"] == 8
    assert bits[f"{layer}0.self_attn.q_proj"] == 4
    assert bits[f"{layer}31.mlp.up_proj"] == 16
    assert bits[f"{layer}16.mlp.up_proj"] == 4


def test_a_group_that_does_not_divide_is_refused_with_its_shape(big: Checkpoint) -> None:
    with pytest.raises(PlanError, match=r"11008.*") as caught:
        plan_of("llava-w4", big, Rule(component="language", bits=4, group_size=96))
    assert "group" in caught.value.message


def test_stored_dequantized_takes_16_bits(big: Checkpoint) -> None:
    plan = plan_of("llava-w4", big, Rule(component="projector", bits=4, store="dequantized"))
    rows = [row for row in plan.of("projector") if row.linear]
    assert [row.decision for row in rows] == ["dequantized"] * 2
    assert all(row.bytes_after == row.tensor.bytes for row in rows)


def test_incomplete_checkpoint_is_refused(big: Checkpoint) -> None:
    del big.tensors["language_model.model.layers.3.mlp.up_proj.weight"]
    with pytest.raises(PlanError, match=r"layers\.3\.mlp\.up_proj\.weight: missing, expected \[11008, 4096\]"):
        plan_of("llava-w4", big)


def test_tensors_that_the_artifact_leaves_out_are_counted(big: Checkpoint) -> None:
    notes = []
    for names in ((), ("a",), ("a", "b", "c")):
        big.ignored = names  # type: ignore[misc]
        notes += plan_of("llava-w4", big).warnings
    assert [note.partition(",")[0] for note in notes if "left out" in note] == [
        "left out of the artifact: a",
        "left out of the artifact: a and 2 more",
    ]


def test_bits_without_a_standard_kernel_warn_of_the_required_package(big: Checkpoint) -> None:
    assert any("humming-kernels" in warning for warning in plan_of("llava-w3-vit4", big).warnings)
    assert not plan_of("llava-w4-vit8", big).warnings


def test_the_command_plan_imports_neither_torch_nor_transformers(sparse_checkpoint: Callable[[str], Path]) -> None:
    """They take seconds: the processor is read by a helper process, and sizes are arithmetic."""
    folder = sparse_checkpoint(LLAVA_7B)
    write_processor(folder, header_config(LLAVA_7B))
    arguments = ["mmq", "plan", "--recipe", "llava-w4-vit8", "--model", str(folder)]
    code = (
        "import sys; from exporter.__main__ import main\n"
        f"for sys.argv in ({arguments}, {[*arguments, '--json', '--all', '--serve-on', '9.0']}):\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code\n"
        "    finally: print([name for name in ('torch', 'transformers', 'sympy', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if line.startswith("[")] == ["[]", "[]"]
