"""Units of a study: one role of one block by one rule, named by everything that decides its numbers.

A setting of the whole model is a set of such units, so settings share them: seven widths of two components make 49
settings and 14 sets of units. What makes this possible is an approximation. Every unit is calibrated on the inputs that
the full-precision model gives its block, while an export calibrates each block on the quantized blocks before it, so
that GPTQ can make up for their errors. `mmq study --sequential` quantizes every setting as an export does.
"""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from exporter.device import Device
from exporter.evaluation.answers import digest
from exporter.events import ignore
from exporter.files.writing import make_folder
from exporter.inference.encoding import Batch
from exporter.methods import METHODS
from exporter.model.checkpoint import Checkpoint
from exporter.planning.plan import Plan, PlanRow, Unit
from exporter.quantization import calibrate
from exporter.quantization.block_io import BlockIO
from exporter.quantization.smoothing import Folding
from exporter.quantization.workdir import UnitResult, Workdir

VERSION = 1  # raise it when this file changes the numbers


@dataclass(frozen=True)
class StudyUnit(Unit):
    """One role of one block by one rule; its file is named by `key`."""

    key: str

    @property
    def file(self) -> str:
        """Name of its file among the study's units."""
        return f"{self.key}.safetensors"


def units_of(plan: Plan, source: str, calibration: str) -> tuple[StudyUnit, ...]:
    """The plan's work as units that other plans may share.

    source: digest of the model and of what computes (`Keys.model`). calibration: digest of the calibration data; units
    of methods that do not read it do not depend on it.
    """
    found = []
    for unit in plan.units:
        component = plan.family.component(unit.component)
        groups: dict[tuple[str, str], list[PlanRow]] = {}
        for row in unit.rows:
            assert row.rule is not None
            bare = row.rule.model_copy(update={"blocks": None, "role": None, "store": "packed"})
            role = component.roles[row.linear]
            groups.setdefault((role, bare.model_dump_json()), []).append(replace(row, rule=bare))
        for (_, rule), rows in groups.items():
            method = METHODS[rows[0].rule.method]  # type: ignore[union-attr]  # set just above
            decides: dict[str, Any] = {
                "source": source,
                "linears": [row.module for row in rows],
                "rule": json.loads(rule),
                "versions": [VERSION, calibrate.VERSION, method.VERSION],
                "calibration": calibration if method.Statistics is not None else None,
            }
            found.append(StudyUnit(0, unit.component, unit.block, tuple(rows), digest(decides)[:32]))
    return tuple(found)


class UnitStore:
    """A folder of finished units; a file that is there was written whole."""

    def __init__(self, folder: Path) -> None:
        make_folder(folder)
        self._workdir = Workdir(folder, "study")

    def has(self, unit: StudyUnit) -> bool:
        """Whether it is quantized already."""
        return (self._workdir.path / unit.file).exists()

    def write(self, unit: StudyUnit, result: UnitResult) -> None:
        """Keep a finished unit."""
        self._workdir.commit(unit, result)

    def remove(self, unit: StudyUnit) -> None:
        """Delete a unit, so that it is made again."""
        (self._workdir.path / unit.file).unlink(missing_ok=True)

    def read(self, unit: Unit, device: torch.device | str = "cpu") -> UnitResult:
        """A finished unit, its tensors on `device` (WorkdirError when its file is damaged)."""
        return self._workdir.read(unit, device)

    @property
    def workdir(self) -> Workdir:
        """The folder as the calibration's code knows it."""
        return self._workdir


def quantize(
    plan: Plan,
    checkpoint: Checkpoint,
    store: UnitStore,
    wanted: Sequence[StudyUnit],
    batches: Callable[[], Sequence[Batch]],
    device: Device,
) -> int:
    """Make the units that are not there yet; how many were made.

    plan: any plan for this checkpoint (its family, recipe and memory are used). batches: the calibration data, asked
    for once some unit needs it.
    """
    missing = [unit for unit in wanted if not store.has(unit)]
    with ThreadPoolExecutor(2) as pool:
        io = BlockIO(replace(plan, units=()), checkpoint, store.workdir, device, ignore, pool)
        for component in plan.family.components:
            mine = [unit for unit in missing if unit.component == component.name]
            inputs = batches() if any(unit.needs_statistics for unit in mine) else ()
            for block in calibrate.walk(io, component, mine, inputs, sequential=False):
                assert isinstance(block.unit, StudyUnit)
                folding, result = Folding.start(block), block.quantize()
                if folding:
                    result = folding.best(result, block.quantize() if folding.fold(result) else None)
                store.write(block.unit, result)
                del folding, result  # a copy of the block; its codes are being written
    return len(missing)
