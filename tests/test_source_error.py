"""The check of quantized weights against the source: all methods pass it, lost weights do not."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from exporter.errors import CalibrationError
from exporter.files.shard_writer import ShardWriter
from exporter.methods import METHODS, awq, gptq, rtn
from exporter.model.checkpoint import Checkpoint
from exporter.numerics.hessian import Statistics
from exporter.numerics.quantized import QuantizedLinear, Scheme
from exporter.numerics.source_error import MAX_RATIO, source_error
from exporter.planning.recipe import Rule
from tests.test_calibrate import LLAVA, plan_for, streamed, tiny_checkpoint
from tests.test_families import live_model, tiny_inputs

SCHEMES = [
    Scheme(2, 64),
    Scheme(3, 64, False),
    Scheme(4, 64),
    Scheme(4, "row"),
    Scheme(8, "row"),
    Scheme(8, "tensor"),
    Scheme(8, "row", number="fp8"),
    Scheme(4, 16, number="nvfp4"),
    Scheme(4, 32, number="mxfp4"),
    Scheme(8, 32, number="mxfp8"),
    Scheme(8, "block", number="fp8"),
    Scheme(4, 128, activations="fp8"),
]
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label())
FAST = (Scheme(4, 64), Scheme(8, "row", number="fp8"))  # where all methods run


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights() -> dict[str, Tensor]:
    """Plain ones, heavy tails, and large columns."""
    plain = drawn(96, 128) * 0.02
    columns = plain.clone()
    columns[:, ::9] *= 20
    return {"plain": plain, "heavy": plain * drawn(96, 128, seed=1).abs().pow(3), "columns": columns}


@cache
def statistics() -> dict[str, Statistics]:
    """Inputs without structure, in few dimensions, with outliers, an offset, or columns that are always 0."""
    plain = drawn(600, 128, seed=2)
    off = plain.clone()
    off[:, ::9] = 0
    rows = {
        "plain": plain,
        "few dimensions": drawn(600, 8, seed=3) @ drawn(8, 128, seed=4),
        "outliers": plain * torch.where(torch.arange(128) % 17 == 0, 100.0, 1.0),
        "offset": plain + 30,
        "columns off": off,
    }
    result = {}
    for name, x in rows.items():
        result[name] = Statistics(128, torch.device("cpu"))
        result[name].update(x)
    return result


@pytest.mark.parametrize(
    "scheme",
    [pytest.param(s, id=s.label(), marks=() if s in FAST else pytest.mark.slow) for s in SCHEMES],
)
def test_every_method_stays_near_what_rounding_explains(scheme: Scheme) -> None:
    worst, dtype = 0.0, torch.bfloat16
    for weight in weights().values():
        for options in (rtn.Options(), rtn.Options(range="mse")):
            worst = max(worst, source_error(weight, rtn.quantize_linear(weight, None, scheme, options, dtype)[0]))
        for inputs in statistics().values():
            for options in (gptq.Options(), gptq.Options(damping=1e-4)):
                linear, _ = gptq.quantize_linear(weight, inputs, scheme, options, dtype)
                worst = max(worst, source_error(weight, linear, inputs))
            linear, _ = awq.quantize_linear(weight, inputs, scheme, awq.Options(), dtype)
            worst = max(worst, source_error(weight, linear, inputs))
    assert 0.3 < worst < 3 < MAX_RATIO / 2


@schemes
@pytest.mark.parametrize("seen", [None, "plain", "outliers"])
def test_a_lost_row_is_detected(scheme: Scheme, seen: str | None) -> None:
    weight = weights()["plain"]
    linear, _ = rtn.quantize_linear(weight, None, scheme, rtn.Options(), torch.bfloat16)
    rows = slice(None) if scheme.group_size == "tensor" else slice(5, 6)
    codes = linear.codes.clone()
    codes[rows] = linear.zero[rows].repeat_interleave(scheme.columns_per_group(128), 1)[:, :128]
    lost = replace(linear, codes=codes)
    inputs = statistics()[seen] if seen else None
    assert source_error(weight, linear, inputs) < 3
    assert source_error(weight, lost, inputs) == float("inf")


def test_a_tensor_with_zero_rows_is_lost_when_its_other_rows_are() -> None:
    weight = weights()["plain"]
    weight[:4] = 0
    linear, _ = rtn.quantize_linear(weight, None, Scheme(8, "tensor"), rtn.Options(), torch.bfloat16)
    lost = replace(linear, codes=torch.full_like(linear.codes, 128))
    assert source_error(weight, linear) < 3
    assert source_error(weight, lost) == float("inf")


@schemes
def test_too_coarse_steps_are_detected(scheme: Scheme) -> None:
    """As 32 times too large a scale would make them, where the weight does not become zero altogether."""
    weight = weights()["plain"]
    linear, _ = rtn.quantize_linear(32 * weight, None, scheme, rtn.Options(), torch.bfloat16)
    assert source_error(weight, linear) > MAX_RATIO


def test_small_float16_weights_are_as_close_as_large_ones() -> None:
    shape = drawn(16, 128).clamp_(-3, 3) / 3
    for size in (1e-1, 2e-3, 1e-4, 3e-5, 1e-6):
        weight = (shape * size).half().float()
        linear, _ = rtn.quantize_linear(weight, None, Scheme(8, "row"), rtn.Options(), torch.float16)
        assert source_error(weight, linear) < 1.5


def test_zero_weights_are_exact() -> None:
    weight = torch.zeros(4, 64)
    linear, _ = rtn.quantize_linear(weight, None, Scheme(4, 32), rtn.Options(), torch.float16)
    assert source_error(weight, linear) == 0.0


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_calibration_that_loses_a_weight_stops(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales are spoiled behind the method's back, as float16 once did without anybody noticing."""
    quantize_linear = METHODS[method].quantize_linear

    def spoiled(*arguments: Any) -> tuple[QuantizedLinear, tuple[str, ...]]:
        linear, notes = quantize_linear(*arguments)
        return replace(linear, scale=linear.scale * 30), notes

    checkpoint = tiny_checkpoint(tmp_path / "model")
    rule = Rule(component="language", method=method, bits=4, group_size=32)
    monkeypatch.setattr(METHODS[method], "quantize_linear", spoiled)
    with pytest.raises(
        CalibrationError, match=r"layers\.0\.self_attn\.q_proj: .* times as large as rounding to W4 g32 explains"
    ):
        streamed(plan_for(checkpoint, (rule,)), checkpoint, tmp_path / "work", [tiny_inputs(LLAVA)])


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_float16_checkpoint_keeps_its_small_linears(method: str, tmp_path: Path) -> None:
    """One linear whose weights are 1e-4 of the others': it became zero, and the artifact was called verified."""
    small = "language_model.model.layers.0.mlp.up_proj"
    (tmp_path / "model").mkdir()
    writer = ShardWriter(tmp_path / "model", 10**9)
    for name, parameter in live_model(LLAVA).named_parameters():
        size = 1e-4 if LLAVA.canonical_name(name) == f"{small}.weight" else 1.0
        writer.add(LLAVA.canonical_name(name), (parameter.detach() * size).half())
    writer.finish()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAVA.tiny_config() | {"dtype": "float16"}))
    checkpoint = Checkpoint.open(tmp_path / "model", LLAVA.canonical_name)
    plan = plan_for(checkpoint, (Rule(component="language", method=method, bits=8),))
    unit = streamed(plan, checkpoint, tmp_path / "work", [tiny_inputs(LLAVA)]).read(plan.units[0])
    weight = checkpoint.read(f"{small}.weight").float()
    assert unit.linears[small].scale.dtype == torch.float16
    assert float((unit.linears[small].dequantize() - weight).norm() / weight.norm()) < 0.02
    assert unit.errors[small] < 0.02
