"""Token weights in the statistics: padding has weight 0, pictures the weight of the recipe."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from exporter.device import choose
from exporter.errors import CalibrationError
from exporter.methods import gptq
from exporter.planning.plan import make_plan
from exporter.planning.recipe import Rule
from exporter.quantization import component_inputs
from exporter.quantization.block_inputs import counted_rows, token_weights, weighted
from tests.slow import some
from tests.test_calibrate import LLAVA, batches_for, plan_for, streamed, tiny_checkpoint
from tests.test_families import live_model

IDS = torch.tensor([[1, 9, 9, 5, 6], [1, 9, 9, 7, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])


def hidden(tokens: int) -> torch.Tensor:
    return torch.zeros(2, tokens, 3)


def test_padding_has_weight_zero_and_pictures_their_own_weight() -> None:
    batch = {"input_ids": IDS, "attention_mask": MASK}
    assert token_weights(batch, hidden(5), 9, 0.5).tolist() == [[1, 0.5, 0.5, 1, 1], [1, 0.5, 0.5, 1, 0]]
    assert token_weights(batch, hidden(7), None, 0.5).tolist() == [[0.5, 0.5, 1, 1, 1, 1, 1], [0.5, 0.5, 1, 1, 1, 1, 0]]
    assert token_weights(batch, hidden(2), 9, 0.5).tolist() == [
        [1, 1],
        [1, 0],
    ]  # the last tokens only
    assert token_weights(batch, hidden(5), 9, 1.0).tolist() == MASK.tolist()
    assert token_weights({"input_ids": IDS[:1], "attention_mask": MASK[:1]}, hidden(5)[:1], 9, 1.0) is None


def test_counted_rows_have_their_weights() -> None:
    x = torch.arange(20.0).view(2, 5, 2)
    rows, weights = counted_rows(x, token_weights({"input_ids": IDS, "attention_mask": MASK}, hidden(5), 9, 0.5))
    assert rows.tolist() == x.view(10, 2)[:9].tolist()
    assert weights is not None
    assert weights.tolist() == [1, 0.5, 0.5, 1, 1, 1, 0.5, 0.5, 1]
    flat, none = counted_rows(x.view(10, 2), MASK.float())
    assert flat.tolist() == rows.tolist()
    assert none is None
    text, none = counted_rows(x, token_weights({"input_ids": IDS, "attention_mask": MASK}, hidden(5), 9, 0.0))
    assert text.tolist() == x[IDS.lt(9) & IDS.gt(0)].tolist()
    assert none is None


def test_errors_of_a_block_are_weighted_by_token() -> None:
    before, after = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    weights = torch.rand(2, 5)
    lost = (weighted(before, weights) - weighted(after, weights)).square().sum()
    each = [float(weights[i, j] * (before[i, j] - after[i, j]).square().sum()) for i in range(2) for j in range(5)]
    assert float(lost) == pytest.approx(sum(each), rel=1e-5)


@pytest.mark.parametrize("vision", some([0.0, 0.1, 1.0, 10.0], [0.0, 10.0]))
def test_gptq_uses_the_token_weights_of_the_recipe(vision: float, tmp_path: Path) -> None:
    """Against one whole forward pass, every token's outer product added by hand."""
    rule = Rule(component="language", method="gptq", bits=3, group_size=32, blocks="0:1", role="attention")
    checkpoint = tiny_checkpoint(tmp_path / "model")
    recipe = plan_for(checkpoint, (rule,)).recipe.adjusted(calibration={"vision_weight": vision})
    plan = make_plan(recipe, checkpoint, LLAVA, choose("cpu"))
    linears = streamed(plan, checkpoint, tmp_path / "work", batches_for(LLAVA)).read(plan.units[0]).linears
    name = "language_model.model.layers.0.self_attn.q_proj"
    linear = live_model(LLAVA).get_submodule(LLAVA.live_name(name))
    hessian, image = torch.zeros(96, 96, dtype=torch.float64), LLAVA.tiny_config()["image_token_index"]
    for batch in batches_for(LLAVA):
        tokens, real = batch["input_ids"].flatten(), batch["attention_mask"].flatten()
        for x, token, counts in zip(inputs(name, batch), tokens, real, strict=True):
            hessian += float(counts) * (vision if token == image else 1.0) * torch.outer(x, x)
    statistics = gptq.Statistics(96, torch.device("cpu"))
    statistics.hessian = hessian.float()
    expected, _ = gptq.quantize_linear(
        linear.weight.detach(), statistics, rule.scheme(), gptq.Options(), torch.bfloat16
    )
    assert int((linears[name].codes != expected.codes).sum()) <= 2


def inputs(name: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What one linear receives, f64 `[batch * tokens, in]`."""
    captured: list[torch.Tensor] = []
    model = live_model(LLAVA)
    model.get_submodule(LLAVA.live_name(name)).register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    with torch.no_grad():
        model(**batch)
    return captured[0].flatten(0, 1).double()


def test_a_picture_weight_needs_an_image_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    rule = Rule(component="language", method="gptq", bits=3, group_size=32)
    recipe = plan_for(checkpoint, (rule,)).recipe.adjusted(calibration={"vision_weight": 0.5})
    plan = make_plan(recipe, checkpoint, LLAVA, choose("cpu"))
    monkeypatch.setattr(component_inputs, "image_token", lambda config: None)
    with pytest.raises(CalibrationError, match=r"vision_weight needs the image token's id .* config\.json has neither"):
        streamed(plan, checkpoint, tmp_path / "work", batches_for(LLAVA))


def test_the_image_token_has_two_names() -> None:
    assert component_inputs.image_token(SimpleNamespace(image_token_index=7)) == 7
    assert component_inputs.image_token(SimpleNamespace(image_token_id=0)) == 0
    assert component_inputs.image_token(SimpleNamespace(image_token_index=None)) is None


def test_hidden_states_that_do_not_match_the_mask_are_refused() -> None:
    batch = {"input_ids": IDS, "attention_mask": MASK}
    for shape in ((10, 3), (1, 10, 3)):
        with pytest.raises(CalibrationError, match=r"expected \[batch, tokens, width\]"):
            token_weights(batch, torch.zeros(shape), 9, 1.0)
