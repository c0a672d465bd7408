"""Smoothing of live blocks: it helps with outliers, is exact, is stored, and falls back with a note."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from exporter.artifact import artifact
from exporter.files.shard_writer import ShardWriter
from exporter.methods import rtn
from exporter.model.checkpoint import Checkpoint
from exporter.numerics.quantized import Scheme
from exporter.planning.plan import Plan
from exporter.planning.recipe import Rule
from exporter.quantization import smoothing as smooth
from exporter.quantization.workdir import UnitResult, Workdir
from tests.test_calibrate import LLAVA, plan_for, streamed
from tests.test_families import live_model, tiny_inputs

AWQ = Rule(component="language", method="awq", bits=3, group_size="row")
BATCHES = [tiny_inputs(LLAVA, 2, 6), tiny_inputs(LLAVA, 3, 9)]


def outlier_checkpoint(folder: Path) -> Checkpoint:
    """The tiny model in bfloat16 with a few large channels behind each norm, as trained models have them."""
    folder.mkdir()
    writer = ShardWriter(folder, 10**9)
    for name, parameter in live_model(LLAVA, seed=1).named_parameters():  # of seed 0, no block gets better
        tensor = parameter.detach().clone()
        if name.endswith("layernorm.weight"):
            tensor[::17] *= 60
        writer.add(LLAVA.canonical_name(name), tensor.bfloat16())
    writer.finish()
    (folder / "config.json").write_text(json.dumps(LLAVA.tiny_config()))
    return Checkpoint.open(folder, LLAVA.canonical_name)


@pytest.fixture(scope="module")
def smoothed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Plan, Workdir]:
    """A finished AWQ calibration."""
    root = tmp_path_factory.mktemp("smooth")
    checkpoint = outlier_checkpoint(root / "model")
    plan = plan_for(checkpoint, (AWQ,))
    return checkpoint, plan, streamed(plan, checkpoint, root / "work", BATCHES)


def results(plan: Plan, workdir: Workdir) -> list[UnitResult]:
    """Every finished unit."""
    return [workdir.read(unit) for unit in plan.units]


def test_outliers_are_smoothed_and_the_folded_norms_are_stored_with_the_unit(
    smoothed: tuple[Checkpoint, Plan, Workdir],
) -> None:
    checkpoint, plan, workdir = smoothed
    first = results(plan, workdir)[0]
    assert f"{plan.units[0].block}.input_layernorm.weight" in first.altered
    assert all(name.endswith("layernorm.weight") for name in first.altered)  # linears are in the codes
    for name, tensor in first.altered.items():
        assert tensor.dtype == torch.bfloat16
        assert not torch.equal(tensor, checkpoint.read(name))


def test_smoothing_lowers_the_output_error(smoothed: tuple[Checkpoint, Plan, Workdir], tmp_path: Path) -> None:
    checkpoint, plan, workdir = smoothed
    plain = plan_for(checkpoint, (AWQ.model_copy(update={"options": {"points": 1, "clip": False}}),))
    unsmoothed = streamed(plain, checkpoint, tmp_path / "plain", BATCHES)
    worst = [max(result.errors.values()) for result in results(plan, workdir)]
    assert worst[0] < max(unsmoothed.read(plain.units[0]).errors.values())


def test_product_of_norm_and_columns_is_unchanged(smoothed: tuple[Checkpoint, Plan, Workdir]) -> None:
    """Dequantized columns times the folded norm approximate the original product, channel by channel."""
    checkpoint, plan, workdir = smoothed
    block = plan.units[0].block
    result = workdir.read(plan.units[0])
    norm, module = f"{block}.input_layernorm.weight", f"{block}.self_attn.q_proj"
    before = checkpoint.read(f"{module}.weight").float() * checkpoint.read(norm).float()
    after = result.linears[module].dequantize() * result.altered[norm].float()
    assert float((before - after).norm() / before.norm()) < 0.35  # 3 bits; a lost fold would give more than 1
    wrong = result.linears[module].dequantize() * checkpoint.read(norm).float()
    assert float((before - wrong).norm() / before.norm()) > 0.5


def test_artifact_holds_the_folded_norms(smoothed: tuple[Checkpoint, Plan, Workdir], tmp_path: Path) -> None:
    checkpoint, plan, workdir = smoothed
    provenance = {"calibration": {"data": "random", "seed": 0, "samples": []}, "device": "CPU"}
    artifact.write(plan, checkpoint, workdir, tmp_path / "out", provenance, lambda event: None, torch.device("cpu"))
    opened = artifact.Artifact.open(tmp_path / "out")
    for result in results(plan, workdir):
        for name, tensor in result.altered.items():
            assert torch.equal(opened.read(name), tensor)
    untouched = "language_model.model.norm.weight"
    assert torch.equal(opened.read(untouched), checkpoint.read(untouched))


def test_resuming_gives_the_same_units(smoothed: tuple[Checkpoint, Plan, Workdir], tmp_path: Path) -> None:
    checkpoint, plan, workdir = smoothed
    resumed = streamed(plan, checkpoint, tmp_path / "work", BATCHES)
    (tmp_path / "work" / plan.units[1].file).unlink()
    resumed = streamed(plan, checkpoint, tmp_path / "work", BATCHES)
    for first, two in zip(results(plan, workdir), results(plan, resumed), strict=True):
        assert first.altered.keys() == two.altered.keys()
        for name, linear in first.linears.items():
            assert torch.equal(linear.codes, two.linears[name].codes), name


def test_a_block_with_a_larger_error_falls_back_with_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exporter.methods import awq

    def bad(weights: list, statistics: object, *rest: object) -> tuple[torch.Tensor, float, float]:
        scales = torch.ones(weights[0].shape[1])
        scales[::2] = 3000.0  # claims to help, ruins the block
        return scales, 1.0, 0.5

    monkeypatch.setattr(awq, "find_scales", bad)
    checkpoint = outlier_checkpoint(tmp_path / "model")
    plan = plan_for(checkpoint, (AWQ,))
    workdir = streamed(plan, checkpoint, tmp_path / "work", BATCHES)
    for result in results(plan, workdir):
        assert result.altered == {}
        assert any("smoothing left out" in note for note in result.notes)


def test_a_block_without_useful_scales_is_quantized_once_without_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporter.methods import awq

    calls: list[int] = []
    rounding = awq.quantize_linear

    def counted(*arguments: object) -> object:
        calls.append(1)
        return rounding(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(awq, "quantize_linear", counted)
    monkeypatch.setattr(awq, "find_scales", lambda weights, *rest: (torch.ones(weights[0].shape[1]), 1.0, 1.0))
    checkpoint = outlier_checkpoint(tmp_path / "model")
    plan = plan_for(checkpoint, (AWQ,))
    workdir = streamed(plan, checkpoint, tmp_path / "work", BATCHES)
    assert len(calls) == 4 * len(plan.units)  # q/k/v, o, gate/up and down, each once
    assert all(result.notes == () for result in results(plan, workdir))


def test_folds_between_linears_are_kept_when_they_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a fold changes no tensor that is kept in 16 bits: all of it is in the codes."""
    language = LLAVA.component("language")
    pairs = tuple(s for s in language.smoothings if not s.source.endswith("layernorm"))
    assert pairs
    applies = smooth._applies
    monkeypatch.setattr(smooth, "_applies", lambda smoothing, rows: smoothing in pairs and applies(smoothing, rows))
    distances = iter([0.5, 0.4] * 2)  # plain, then smoothed, for each block
    monkeypatch.setattr(smooth, "_distance", lambda found, truth: next(distances))
    checkpoint = outlier_checkpoint(tmp_path / "model")
    plan = plan_for(checkpoint, (AWQ,))
    workdir = streamed(plan, checkpoint, tmp_path / "work", BATCHES)
    assert all(result.notes == () and result.altered == {} for result in results(plan, workdir))


def real_outputs(block: nn.Module, calls: list[dict[str, Any]]) -> torch.Tensor:
    """What the block puts out for tokens that no mask hides, all batches, one row a token."""
    rows = []
    for call in calls:
        output = block(**call["kwargs"])
        rows.append((output[0] if isinstance(output, tuple) else output)[call["real"]])
    return torch.cat(rows)


@torch.no_grad()
def test_a_block_search_tries_every_point_on_all_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a search by hand in the whole model: q, k and v of the first block, six batches."""
    from exporter.methods import awq

    choices: list[tuple[torch.Tensor, float, float]] = []
    best = awq.best

    def recorded(expected_candidates: Any) -> tuple[torch.Tensor, float, float]:
        choices.append(best(expected_candidates))
        return choices[-1]

    monkeypatch.setattr(awq, "best", recorded)
    checkpoint = outlier_checkpoint(tmp_path / "model")
    batches = [tiny_inputs(LLAVA, 2, 4 + i) for i in range(6)]
    plan = plan_for(checkpoint, (AWQ.model_copy(update={"options": {"search": "block", "points": 6}}),))
    streamed(plan, checkpoint, tmp_path / "work", batches)

    model = live_model(LLAVA, seed=1)
    for name, parameter in model.named_parameters():
        parameter.copy_(checkpoint.read(LLAVA.canonical_name(name)).float())
    block, calls = model.get_submodule(LLAVA.live_name("language_model.model.layers.0")), []
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    for batch in batches:
        model(**batch, use_cache=False)
    handle.remove()
    runs = [
        {"kwargs": {**kwargs, **({"hidden_states": args[0]} if args else {})}, "real": batch["attention_mask"].bool()}
        for (args, kwargs), batch in zip(calls, batches, strict=True)
    ]
    truth = real_outputs(block, runs)
    linears = [block.get_submodule(f"self_attn.{part}_proj") for part in "qkv"]
    inputs: list[torch.Tensor] = []
    handle = linears[0].register_forward_hook(lambda _, args, output: inputs.append(args[0]))
    real_outputs(block, runs)
    handle.remove()
    rows = torch.cat([x[run["real"]] for x, run in zip(inputs, runs, strict=True)])
    size, weights = rows.square().mean(0).sqrt(), [linear.weight.clone() for linear in linears]
    stacked = torch.cat(weights).abs()
    reach = (stacked / stacked.amax(1, keepdim=True)).mean(0)
    errors, expected_candidates = [], [torch.ones_like(size)]
    for point in range(6):
        scales = size ** (point / 6) / reach ** (1 - point / 6)
        expected_candidates.append(scales / (scales.max() * scales.min()).sqrt())
    for scales in expected_candidates:
        for linear, weight in zip(linears, weights, strict=True):
            rounded, _ = rtn.quantize_linear(weight * scales, None, Scheme(3, "row"), rtn.Options(), torch.bfloat16)
            linear.weight.copy_(rounded.dequantize() / scales)
        errors.append(float((real_outputs(block, runs) - truth).norm() / truth.norm()))
    scales, before, after = choices[0]
    assert min(errors) < errors[0]
    assert (before, after) == (pytest.approx(errors[0], rel=1e-3), pytest.approx(min(errors), rel=1e-3))
    torch.testing.assert_close(scales, expected_candidates[errors.index(min(errors))], rtol=1e-3, atol=0)


def test_a_candidate_weight_is_removed_after_its_trial() -> None:
    own, weights = {"a": torch.zeros(2), "b": torch.zeros(3)}, []
    live = dict(own)
    block = SimpleNamespace(parameter=live.__getitem__, put=live.__setitem__, restore=live.update)

    def error(block: object) -> float:
        weights.append(dict(live))
        return 0.25

    candidates = iter([torch.ones(2), torch.ones(3)])
    assert smooth._error_with(block, ["a", "b"], candidates, SimpleNamespace(error=error)) == 0.25  # type: ignore[arg-type]
    assert [part.tolist() for part in weights[0].values()] == [[1, 1], [1, 1, 1]]
    assert all(live[name] is own[name] for name in own)


def test_scales_move_before_another_method_where_the_rule_folds(tmp_path: Path) -> None:
    """GPTQ then quantizes the scaled weights; the product with the folded norm still approximates the source's."""
    checkpoint = outlier_checkpoint(tmp_path / "model")
    plan = plan_for(checkpoint, (AWQ.model_copy(update={"method": "gptq", "fold": "awq"}),))
    unit = plan.units[0]
    result = streamed(plan, checkpoint, tmp_path / "work", BATCHES).read(unit)
    norm, module = f"{unit.block}.input_layernorm.weight", f"{unit.block}.self_attn.q_proj"
    assert not torch.equal(result.altered[norm], checkpoint.read(norm))
    before = checkpoint.read(f"{module}.weight").float() * checkpoint.read(norm).float()
    after = result.linears[module].dequantize() * result.altered[norm].float()
    lost = result.linears[module].dequantize() * checkpoint.read(norm).float()  # as if the fold were lost
    assert float((before - after).norm()) < 0.8 * float((before - lost).norm())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"method": "rtn"}, "not possible with method: rtn"),
        ({"method": "awq"}, "not possible with method: awq"),
        ({"method": "gptq", "options": {"correct": True}}, "correct: false"),
        ({"method": "gptq", "fold": "gptq"}, "Input should be 'awq'"),
    ],
)
def test_rules_that_cannot_fold_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Rule.model_validate({"component": "language", "bits": 3, "fold": "awq", **change})


def test_only_a_rule_that_folds_has_the_key() -> None:
    plain = Rule(component="language", method="gptq", bits=3)
    assert "fold" not in plain.model_dump()
    assert Rule.model_validate(plain.model_dump() | {"fold": "awq"}).model_dump()["fold"] == "awq"
