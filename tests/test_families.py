"""Family conformance: tests that are parametrized over the registry, so that they cover new families too."""

import copy
import itertools
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from docs.family_support import declaration
from exporter.model.config_check import known_family
from exporter.model.families import FAMILIES, Family
from exporter.model.families.parts.text import BlockKinds
from exporter.model.inference.forward_hooks import first_output, run_until_stopped, watch_inputs
from exporter.model.stream import Stream, build_skeleton
from exporter.numerics.scale_folding import fold, misfit
from exporter.quantization.block_calls import capture_calls
from tests.conftest import header, header_config
from tests.headers.read import HEADER_NAMES, SMALLEST
from tests.slow import some, some_of
from tests.tiny_models import CONFIGS, random_weights, tiny_inputs

families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
models = pytest.mark.parametrize(("family", "config"), CONFIGS.values(), ids=CONFIGS)
# Every family, and every part in LLaVA; the same parts in its relatives are slow.
parts = pytest.mark.parametrize(
    ("family", "config"),
    some_of(CONFIGS, [name for name, (family, _) in CONFIGS.items() if name in FAMILIES or family.name == "llava"]),
)
published = pytest.mark.parametrize("name", HEADER_NAMES)


def live_model(family: Family, seed: int = 0, config: Mapping[str, Any] | None = None) -> nn.Module:
    """The tiny model with random weights large enough that every part matters."""
    return random_weights(family.skeleton(config or family.tiny_config()).eval(), seed)


def family_of(name: str) -> Family:
    """The family of a published checkpoint, with the components of its parts."""
    return known_family(header_config(name), name)


@models
def test_every_linear_is_planned_or_kept_with_a_reason(family: Family, config: dict[str, Any]) -> None:
    model = live_model(family, config=config)
    planned = {
        component.module(i, linear)
        for component in family.components
        for i in range(component.stored(config))
        for linear in component.linears_of(config, i)
    }
    linears = [family.canonical_name(f"{n}.weight")[:-7] for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert len(linears) > 10
    for name in linears:
        assert (name in planned) != (family.reason_kept(name) is not None), name
    assert planned <= set(linears)
    for component in family.components:
        assert set(component.roles) == set(component.linears)
        assert component.unpadded <= set(component.linears)


@pytest.mark.parametrize("name", some(HEADER_NAMES, SMALLEST))
def test_names_are_total_and_injective_on_real_headers(name: str) -> None:
    family, tensors = family_of(name), header(name)
    model = build_skeleton(family, header_config(name), torch.device("meta"))
    model.tie_weights()
    live = {family.live_name(tensor) for tensor in tensors}
    assert live == {n for n, _ in model.named_parameters()}
    assert len({family.runtime_name(tensor) for tensor in tensors}) == len(tensors)
    assert [family.canonical_name(tensor) for tensor in tensors] == list(tensors)
    assert {family.canonical_name(tensor) for tensor in live} == set(tensors)  # what transformers 5 saves


def test_every_family_has_a_published_checkpoint() -> None:
    assert {family_of(name).name for name in HEADER_NAMES} == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_declared_in_at_most_120_lines(name: str) -> None:
    """What families share is in other files; some files declare two families."""
    file, lines, count = declaration(FAMILIES[name])
    assert lines <= 120 * count, file
    assert "shared" not in file


@models
def test_skeleton_has_the_buffers_of_an_eager_model(family: Family, config: dict[str, Any]) -> None:
    skeleton = build_skeleton(family, config, torch.device("cpu"))
    eager = dict(family.skeleton(config).named_buffers())
    assert bool(eager) == (family.name != "blip2")  # there every position is learned
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    for name, buffer in skeleton.named_buffers():
        assert torch.equal(buffer, eager[name]), name


@parts
def test_members_of_a_phase_receive_the_same_tensor(family: Family, config: dict[str, Any]) -> None:
    model, inputs = live_model(family, config=config), tiny_inputs(family, config=config)
    for component in family.components:
        linears = component.linears_of(config, 0)
        live = {name: model.get_submodule(family.live_name(component.module(0, name))) for name in linears}
        reached: set[str] = set()
        for entry in component.passes:
            received: dict[str, torch.Tensor] = {}

            def see(name: str, x: torch.Tensor, received: dict = received) -> None:
                received.setdefault(name, x.clone())

            with watch_inputs(live, see, stop=False):
                run_until_stopped(entry.run, model, inputs)
            reached |= received.keys()
            phases = [[name for name in phase if name in received] for phase in component.phases]
            for phase in filter(None, phases):
                for name in phase[1:]:
                    assert torch.equal(received[name], received[phase[0]]), name
            position = {name: i for i, name in enumerate(received)}
            for earlier, later in itertools.pairwise(filter(None, phases)):
                assert max(position[n] for n in earlier) < min(position[n] for n in later), component.name
        assert reached == set(linears)


@parts
def test_streamed_blocks_equal_the_whole_model(family: Family, config: dict[str, Any]) -> None:
    model, inputs = live_model(family, config=config), tiny_inputs(family, config=config)
    weights = {family.canonical_name(name): p.detach() for name, p in model.named_parameters()}
    for component in family.components:
        stream = Stream(family, config, torch.device("cpu"), torch.float32)
        stream.load(weights, weights.__getitem__)
        names = [component.block(i) for i in range(component.used(config))]
        assert not any(parameter.requires_grad for name in names for parameter in stream.module(name).parameters())
        chains = [names] if component.chained else [[name] for name in names]
        for entry, chain in itertools.product(component.passes, chains):
            blocks = [stream.module(name) for name in chain]
            (entered,) = capture_calls(stream.model, blocks, [inputs], entry.run, component.name)
            hidden = entered.hidden
            for call, block in zip(entered.calls, blocks, strict=True):
                with torch.no_grad():
                    hidden = first_output(call(block, hidden if call.added is None else hidden + call.added))
            last = model.get_submodule(family.live_name(chain[-1]))
            outputs: list[torch.Tensor] = []
            handle = last.register_forward_hook(
                lambda m, a, o, e=outputs: e.append(o[0] if isinstance(o, tuple) else o)
            )
            with torch.no_grad():
                entry.run(model, inputs)
            handle.remove()
            assert torch.equal(hidden, outputs[0]), component.name


@published
def test_targets_match_their_linears_under_both_names_and_no_others(name: str) -> None:
    family, config = family_of(name), header_config(name)
    modules = [t[:-7] for t in header(name) if t.endswith(".weight")]
    for component in family.components:
        for i in {0, component.used(config) - 1} if component.used(config) else ():
            pattern = component.target.replace("{i}", str(i)) + r"(\.|$)"
            members = {m for m in modules if f"{m}.".startswith(component.block(i) + ".")}
            assert members
            for rename in (family.runtime_name, family.live_name):
                assert {m for m in modules if re.match(pattern, rename(m))} == members


@parts
@torch.no_grad()
def test_every_smoothing_is_an_exact_fold(family: Family, config: dict[str, Any]) -> None:
    """The whole model computes the same with scales from 1/30 to 30 in every block, one smoothing at a time."""
    batch_inputs = tiny_inputs(family, config=config)
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in batch_inputs.items()}
    generator = torch.Generator().manual_seed(2)
    whole, folded = live_model(family, config=config).double(), []
    before = family.outputs(whole, inputs)
    for component in family.components:
        for smoothing in component.smoothings:
            model = copy.deepcopy(whole)
            for i in range(component.used(config)):
                block = model.get_submodule(family.live_name(component.block(i)))
                if set(smoothing.targets) <= set(component.linears_of(config, i)):
                    assert misfit(block, smoothing.source, smoothing.targets, smoothing.rows) is None
                    size = block.get_submodule(smoothing.targets[0]).in_features
                    scales = 30 ** (2 * torch.rand(size, generator=generator) - 1)
                    fold(block, smoothing.source, smoothing.targets, smoothing.rows, scales)
                    folded.append(smoothing)
            torch.testing.assert_close(family.outputs(model, inputs), before, rtol=1e-9, atol=1e-9)
    assert set(folded) == {smoothing for component in family.components for smoothing in component.smoothings}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, None),
        ({"activation_function": "relu", "do_layer_norm_before": True}, None),
        ({"activation_function": "gelu"}, 'activation_function is "gelu", but mmq supports only "relu"'),
        ({"do_layer_norm_before": False}, "do_layer_norm_before is false, but mmq supports only true"),
        ({"model_type": "t5"}, "its language model is t5"),
    ],
)
def test_blip2_supports_only_the_published_opts(changed: dict[str, Any], expected: str | None) -> None:
    family = FAMILIES["blip2"]
    config = dict(family.tiny_config())
    refused = family.refuses(config | {"text_config": config["text_config"] | changed})
    assert refused is None if expected is None else expected in str(refused)
    encoder_decoder = family.refuses(config | {"use_decoder_only_language_model": False})
    assert "its language model is opt" in str(encoder_decoder)


@pytest.mark.parametrize("kinds", [["full_attention", "other"], ["other"], "full_attention", [3], {}])
def test_kinds_of_blocks_are_a_list_of_known_names(kinds: object) -> None:
    field = BlockKinds()
    assert "layer_types: expected" in f"layer_types: {field.problem(kinds)}"
    assert field.problem(None) is field.problem([]) is field.problem(["full_attention", "sliding_attention"]) is None
