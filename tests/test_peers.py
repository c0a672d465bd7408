"""The judge of `bench/peers.py`: its figures from the divergences of test samples."""

import json
from pathlib import Path

import pytest
import torch

from bench.peers import on_grid
from bench.peers_figures import divergences, table
from bench.peers_record import gathered


def test_one_changed_answer_shows_in_the_error_and_not_in_the_figure_without_outliers() -> None:
    quiet, changed = [0.001] * 300, [0.001] * 299 + [2.7]
    figures = divergences([quiet, changed])
    assert figures["kl"] == pytest.approx((0.001 + 0.001 * 299 / 300 + 2.7 / 300) / 2)
    assert figures["kl_99"] == pytest.approx(0.001)
    assert figures["kl_error"] == pytest.approx(2.699 / 300 / 2)  # one sample of 300 carries the spread of one task


def test_at_least_one_sample_of_each_task_is_left_out() -> None:
    assert divergences([[0.0, 1.0], [0.5, 3.0, 0.1]])["kl_99"] == pytest.approx((0.0 + 0.3) / 2)


def test_the_table_has_means_over_draws() -> None:
    row = {"bits": 3, "method": "gptq", "kl": 0.2, "kl_error": 0.05, "kl_99": 0.1, "captions": 0.9, "seconds": 1.0}
    other = {**row, "kl": 0.4, "kl_error": 0.15, "kl_99": 0.3, "captions": 0.7, "seconds": 3.0}
    cells = [cell.strip() for cell in table([row, other]).splitlines()[-1].strip("|").split("|")]
    assert cells == ["3", "gptq", "2", "0.30000", "0.10000", "0.20000 to 0.40000", "0.20000", "80.0 %", "2.0"]


def test_rows_judged_on_validation_samples_are_not_recorded(tmp_path: Path) -> None:
    row = {"model": "m", "method": "gptq", "bits": 3, "draw": 0, "kl": 0.5}
    rows = [row, {**row, "draw": 1, "split": "test"}, {**row, "split": "validation", "kl": 0.25}]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert gathered([lines], {}) == rows[:2]


def test_weights_that_a_tool_left_in_full_precision_are_noticed() -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, 4, (20, 4, 8)).float() * torch.rand(20, 4, 1)
    assert on_grid(codes.flatten(1), bits=2, group_size=8)
    assert not on_grid(codes.flatten(1), bits=1, group_size=8)
    assert not on_grid(torch.randn(20, 32), bits=2, group_size=8)
