"""Tensors are checked for NaN and infinity in parts, so that an embedding does not take a gigabyte for it."""

import pytest
import torch

from exporter import job
from exporter.errors import CheckpointError


@pytest.mark.parametrize("place", [0, 7, 8, 19])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_value_is_seen_wherever_it_is(place: int, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "CHECKED_AT_ONCE", 8)
    tensor = torch.zeros(4, 5, dtype=torch.bfloat16)
    assert job.finite("good", tensor) is tensor
    tensor.view(-1)[place] = value
    with pytest.raises(CheckpointError, match="bad holds values that are not finite"):
        job.finite("bad", tensor)


def test_no_more_than_a_part_is_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    compare = torch.isfinite

    def counted(part: torch.Tensor) -> torch.Tensor:
        sizes.append(part.numel())
        return compare(part)

    monkeypatch.setattr(torch, "isfinite", counted)
    job.finite("embedding", torch.zeros(3, job.CHECKED_AT_ONCE // 2 + 1))
    assert max(sizes) <= job.CHECKED_AT_ONCE
    assert sum(sizes) == 3 * (job.CHECKED_AT_ONCE // 2 + 1)
