"""Method conformance: all entries of `METHODS` fulfil the same rules."""

import pytest
import torch
from pydantic import ValidationError

from exporter.methods import METHODS, rtn
from exporter.methods.gptq import Statistics as Hessian
from exporter.numerics.quantized import QuantizedLinear, Scheme

PROPERTIES = ("signed_scales", "runs_block", "correction_damping", "learned_steps", "learning_rate", "scales_in_loop")
PLAIN = (False, False, None, 0, 0.0, False)
CASES = [
    (Scheme(4, 32), (24, 96)),
    (Scheme(3, 32, False), (7, 100)),  # a ragged last group
    (Scheme(2, "row"), (17, 33)),
    (Scheme(4, 16), (1, 50)),
    (Scheme(8, "tensor"), (24, 40)),
    (Scheme(8, "row", number="fp8"), (24, 40)),
    (Scheme(8, "row", activations="int8"), (24, 40)),
]
every_method = pytest.mark.parametrize("name", METHODS)
every_case = pytest.mark.parametrize(("scheme", "shape"), CASES, ids=lambda value: str(value))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("rtn", {}, PLAIN),
        ("rtn", {"range": "signed"}, (True, *PLAIN[1:])),
        ("awq", {}, PLAIN),
        ("awq", {"range": "signed"}, (True, *PLAIN[1:])),
        ("awq", {"range": "signed", "clip": False}, PLAIN),
        ("awq", {"range": "mse", "search": "block"}, (False, True, *PLAIN[2:])),
        ("gptq", {}, (False, False, None, 0, 1.0, False)),
        ("gptq", {"range": "signed", "damping": 0.5, "correct": True, "steps": 4}, (True, False, 0.5, 4, 0.25, False)),
        ("gptq", {"scales": "in_loop", "order": "none"}, (False, False, None, 0, 1.0, True)),
        ("autoround", {}, (True, False, None, 200, 1 / 200, False)),
        ("autoround", {"steps": 8, "rate": 0.5}, (True, False, None, 8, 0.5, False)),
    ],
)
def test_what_options_ask_for(name: str, options: dict[str, object], expected: tuple[object, ...]) -> None:
    parsed = METHODS[name].Options.model_validate(options)
    assert tuple(getattr(parsed, key) for key in PROPERTIES) == expected


@pytest.mark.parametrize("name", METHODS)
def test_options_cannot_change_after_they_were_checked_and_have_no_other_keys(name: str) -> None:
    options = METHODS[name].Options()
    for key in type(options).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(options, key, getattr(options, key))
    with pytest.raises(ValidationError, match="Extra inputs"):
        METHODS[name].Options.model_validate({"no such option": 1})


def inputs(columns: int) -> torch.Tensor:
    """Correlated rows, some of them much larger than others."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return x * torch.logspace(-1, 1, columns)


def run(name: str, scheme: Scheme, shape: tuple[int, int]) -> tuple[torch.Tensor, QuantizedLinear]:
    """A method on a random weight, with statistics when it wants them."""
    method = METHODS[name]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    statistics = None
    if method.Statistics is not None:
        statistics = method.Statistics(shape[1], torch.device("cpu"))
        statistics.update(inputs(shape[1]))
    linear, _ = method.quantize_linear(weight, statistics, scheme, method.Options(), torch.float16)
    return weight, linear


@every_method
@every_case
def test_codes_and_scales_have_their_types_shapes_and_ranges(name: str, scheme: Scheme, shape: tuple[int, int]) -> None:
    _, linear = run(name, scheme, shape)
    groups = scheme.groups(shape[1])
    assert linear.codes.shape == shape
    assert linear.scale.shape == linear.zero.shape == (shape[0], groups)
    assert linear.codes.dtype == linear.zero.dtype == torch.uint8
    assert linear.scale.dtype == torch.float16
    if scheme.number == "int":
        assert int(linear.codes.max()) <= scheme.levels
        assert not scheme.symmetric or (linear.zero == scheme.middle).all()
    assert torch.isfinite(linear.dequantize()).all()


@every_method
@every_case
def test_runs_are_deterministic_and_leave_their_inputs_alone(name: str, scheme: Scheme, shape: tuple[int, int]) -> None:
    first, second = run(name, scheme, shape)[1], run(name, scheme, shape)[1]
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scale, second.scale)
    weight, _ = run(name, scheme, shape)
    assert torch.equal(weight, torch.randn(shape, generator=torch.Generator().manual_seed(0)))


@every_method
@every_case
def test_output_error_is_never_above_rounding(name: str, scheme: Scheme, shape: tuple[int, int]) -> None:
    weight, linear = run(name, scheme, shape)
    truth = Hessian(shape[1], torch.device("cpu"))
    truth.update(inputs(shape[1]))
    plain, _ = rtn.quantize_linear(weight, None, scheme, rtn.Options(), torch.float16)
    assert truth.energy(weight - linear.dequantize()) <= truth.energy(weight - plain.dequantize()) * 1.0001
    assert METHODS[name].VERSION >= 1
