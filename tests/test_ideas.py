"""Ideas that the benches measure: joint ranges, the ball of MagR, rotations that keep a model's outputs."""

import json

import pytest
import torch
from safetensors.torch import load_file

from bench.ideas import _onto_ball, joint_range
from bench.rotations import KINDS, MODELS, rotated
from exporter.model.families import FAMILIES
from exporter.numerics.quantized import Scheme, dequantize, quantize
from exporter.numerics.ranges import fit_scale


def test_a_joint_search_is_never_worse_than_the_range() -> None:
    torch.manual_seed(0)
    scheme, weight = Scheme(2, 16, symmetric=False), torch.randn(8, 32)

    def errors(found: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        difference = dequantize(quantize(weight, *found, scheme), *found, scheme) - weight
        return difference.view(8, 2, 16).square().sum(-1)

    ranged, together = (errors(fit(weight, scheme, torch.float32, "mse")) for fit in (fit_scale, joint_range))
    assert (together <= ranged + 1e-5).all()
    assert together.sum() < ranged.sum()


def test_the_ball_keeps_what_is_inside_and_ends_at_its_radius() -> None:
    assert _onto_ball(torch.tensor([[0.2, -0.1]]), 1.0).tolist() == [pytest.approx([0.2, -0.1])]
    assert _onto_ball(torch.tensor([[3.0, -1.0, 0.5]]), 2.0).tolist() == [pytest.approx([2.0, 0.0, 0.0])]
    assert _onto_ball(torch.tensor([[2.0, -2.0]]), 1.0).tolist() == [pytest.approx([0.5, -0.5])]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
def test_a_rotated_model_computes_the_same(kind: str) -> None:
    folder, family = MODELS["demo-blip2"], FAMILIES["blip2"]
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    model = family.skeleton(config).double().eval()
    turned = rotated({name: tensor.double() for name, tensor in tensors.items()}, 2, kind)
    assert any(not torch.equal(turned[name], tensor.double()) for name, tensor in tensors.items())
    pixels = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ends = {"vision_model": ".post_layernorm.weight", "qformer": ".layernorm.weight"}
    tower, former = (model.get_submodule(family.live_name(part + end).removesuffix(end)) for part, end in ends.items())
    queries = []
    for state in (tensors, turned):
        names = {family.live_name(name): tensor.double() for name, tensor in state.items()}
        model.load_state_dict(names, strict=False)
        asked = names[family.live_name("query_tokens")].expand(2, -1, -1)
        with torch.no_grad():
            seen = tower(pixels).last_hidden_state
            queries.append(former(query_embeds=asked, encoder_hidden_states=seen).last_hidden_state)
    assert torch.allclose(*queries, atol=1e-9)
