"""Comparison of quantized linears with the source: it accepts folds and detects lost rows."""

from pathlib import Path

import pytest
import torch

from exporter.artifact.artifact import Artifact
from exporter.artifact.verify import verify
from exporter.artifact.verify_source import MIN_COSINE, row_cosines, unlike_source
from exporter.device import choose
from exporter.errors import ArtifactError
from exporter.events import ignore
from exporter.methods import METHODS
from exporter.model.source import open_source
from exporter.numerics.quantized import QuantizedLinear, Scheme
from tests.test_export import quick_export, quick_recipe


def quantized(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """A linear rounded to nearest."""
    method = METHODS["rtn"]
    linear: QuantizedLinear = method.quantize_linear(
        weight, None, Scheme(bits, group), method.Options(), torch.bfloat16
    )[0]
    return linear.as_served()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [1.0, 1e-20])
def test_rounding_and_folds_keep_the_direction_of_rows(bits: int, size: float) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(64, 256, generator=generator)
    columns = 0.1 + 10 * torch.rand(256, generator=generator)
    rows = 0.1 + 5 * torch.rand(64, 1, generator=generator)
    assert row_cosines(weight * size, quantized(weight, bits, 128) * size).min() > 2 * MIN_COSINE
    assert row_cosines(weight * size, quantized(weight * columns * rows, bits, 32)).min() > 2 * MIN_COSINE


def test_lost_exchanged_and_random_rows_are_detected_and_zero_source_rows_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 256, generator=generator)
    weight[9] = 0
    served = quantized(weight, 4, 128)
    served[3] = 0
    served[5] = served[7]
    served[11] = torch.randn(256, generator=generator)
    cosines = row_cosines(weight, served)
    assert (cosines < MIN_COSINE).nonzero().flatten().tolist() == [3, 5, 11]
    assert row_cosines(weight, torch.zeros_like(weight)).max() == 1  # of row 9 alone
    assert int((row_cosines(weight, torch.zeros_like(weight)) == 0).sum()) == 255


def test_an_artifact_is_compared_with_its_source_and_with_another(tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    done = quick_export(out, recipe=quick_recipe(name="llava-w3-vit4"))
    assert done.verified.source
    source, _ = open_source("demo-llava")
    assert unlike_source(Artifact.open(out), source) == []
    assert verify(out, choose("cpu"), ignore, source=source).source
    assert not verify(out, choose("cpu"), ignore).source
    read = source.read
    name = "language_model.model.layers.1.mlp.up_proj"

    def changed(requested: str) -> torch.Tensor:
        tensor = read(requested)
        return tensor.roll(1, 0) if requested == f"{name}.weight" else tensor

    source.read = changed  # type: ignore[method-assign]
    with pytest.raises(ArtifactError, match=rf"{name}: \d+ of \d+ compared rows do not match the source's"):
        verify(out, choose("cpu"), ignore, source=source)
    few = unlike_source(Artifact.open(out), source, rows=16)
    assert "of 16 compared rows" in few[0]
