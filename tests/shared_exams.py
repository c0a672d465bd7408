"""Studies of one model with the same samples share an exam: preparing one takes most of the time of a test."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from exporter import data
from exporter.study import worker_tasks
from exporter.study.worker_tasks import Examiner, Setup


@cache
def _examiner(setup: Setup, keys: object, candidates: int) -> Examiner:
    return Examiner(setup, keys)  # type: ignore[arg-type]


def share_exams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let studies in this process reuse the examiners of earlier ones; only a setting's units are in a folder."""

    def shared(setup: Setup, keys: object = None) -> Examiner:
        anywhere = replace(setup, folder=Path("anywhere"), table="study", sequential=False)
        return _examiner(anywhere, keys, data.DEMO_CANDIDATES)

    monkeypatch.setattr(worker_tasks, "examiner", shared)
