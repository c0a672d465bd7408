"""Tensors are checked for NaN and infinity without a mask, which takes a gigabyte for an embedding."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from exporter.errors import CheckpointError
from exporter.model.checkpoint import Checkpoint
from exporter.model.source import narrowed
from exporter.quantization import block_io


def stored(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    """A checkpoint of these tensors."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text("{}")
    return Checkpoint.open(folder)


@pytest.mark.parametrize("place", [0, 7, 8, 19])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_value_is_reported_at_any_position(place: int, value: float, tmp_path: Path) -> None:
    tensor = torch.zeros(4, 5, dtype=torch.bfloat16)
    bad = tensor.clone()
    bad.view(-1)[place] = value
    checkpoint = stored(tmp_path / "model", {"good": tensor, "bad": bad})
    assert block_io.require_finite(checkpoint, "good", tensor) is tensor
    with pytest.raises(CheckpointError, match="bad has 1 values that are not finite"):
        block_io.require_finite(checkpoint, "bad", checkpoint.read("bad"))


def test_values_outside_the_requested_dtype_are_not_reported_as_damage(tmp_path: Path) -> None:
    checkpoint = narrowed(stored(tmp_path / "model", {"large": torch.tensor([1.0, -1e5])}), "float16")
    with pytest.raises(CheckpointError, match=r"large has values up to 100000 .* largest float16 is 65504") as e:
        block_io.require_finite(checkpoint, "large", checkpoint.read("large"))
    assert e.value.hint is not None
    assert "set it to bfloat16" in e.value.hint


@pytest.mark.parametrize("peak", [1e-9, 5e-8, 3e-6])
def test_a_matrix_that_float16_cannot_represent_is_refused(peak: float, tmp_path: Path) -> None:
    """Such a linear became zero, and it equalled the source because that was read in float16 too."""
    small = torch.linspace(-peak, peak, 6).reshape(2, 3)
    tensors = {"small": small, "zero": torch.zeros(2, 3), "bias": small[0].clone(), "usual": small * 1e3 / peak}
    checkpoint = narrowed(stored(tmp_path / "model", tensors), "float16")
    with pytest.raises(CheckpointError, match=r"small has values of at most .*, which float16 cannot represent") as e:
        block_io.require_finite(checkpoint, "small", checkpoint.read("small"))
    assert "set it to bfloat16" in str(e.value.hint)
    for name in ("zero", "bias", "usual"):
        block_io.require_finite(checkpoint, name, checkpoint.read(name))
    for whole in (stored(tmp_path / "whole", tensors), narrowed(stored(tmp_path / "wide", tensors), "bfloat16")):
        block_io.require_finite(whole, "small", whole.read("small"))
    half = stored(tmp_path / "half", {"small": small.half()})  # what a float16 checkpoint stores is exact
    block_io.require_finite(half, "small", half.read("small"))


def test_values_that_a_fold_made_infinite_are_not_reported_as_damage(tmp_path: Path) -> None:
    checkpoint = stored(tmp_path / "model", {"norm": torch.ones(4)})
    with pytest.raises(CheckpointError, match="norm is finite, but folding scales into it overflows"):
        block_io.require_finite(checkpoint, "norm", torch.full((4,), float("inf")))


def test_a_check_makes_no_mask_of_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    compare = torch.isfinite

    def counted(part: torch.Tensor) -> torch.Tensor:
        sizes.append(part.numel())
        return compare(part)

    monkeypatch.setattr(torch, "isfinite", counted)
    checkpoint = stored(tmp_path / "model", {"embedding": torch.zeros(1)})
    block_io.require_finite(checkpoint, "embedding", torch.zeros(3, 1000))
    assert sizes == [2]


def test_empty_tensors_and_integers_are_finite(tmp_path: Path) -> None:
    checkpoint = stored(tmp_path / "model", {"x": torch.zeros(1)})
    for tensor in (torch.zeros(0, 4), torch.zeros(2, dtype=torch.int64)):
        assert block_io.require_finite(checkpoint, "x", tensor) is tensor
