"""Units of a study (one role of one block, quantized by one rule), their keys, their store, and their quantization.

A setting of the whole model is a set of units, and settings share units: seven bit widths of two components give 49
settings from 14 sets of units. Sharing needs an approximation: every unit is calibrated on its block's inputs in the
full-precision model. An export calibrates each block on the outputs of the quantized blocks before it, so that GPTQ can
compensate their errors. `mmq study --sequential` quantizes every setting as an export does.
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
from exporter.methods import METHODS
from exporter.model.checkpoint import Checkpoint
from exporter.model.inference.encoding import Batch
from exporter.planning.plan import Plan, PlanRow, Unit
from exporter.quantization import calibrate
from exporter.quantization.block_io import BlockIO
from exporter.quantization.smoothing import Folding
from exporter.quantization.workdir import UnitResult, Workdir

VERSION = 1  # increment it when a change of this file changes the numbers


@dataclass(frozen=True)
class StudyUnit(Unit):
    """One role of one block with one rule. key: digest of everything that determines its numbers."""

    key: str

    @property
    def file(self) -> str:
        """Name of the unit's file in the store."""
        return f"{self.key}.safetensors"


def units_of(plan: Plan, source: str, calibration: str) -> tuple[StudyUnit, ...]:
    """The plan's units, which other plans can share.

    source: digest of model and machine (`Keys.model`). calibration: digest of the calibration data; it enters the keys
    only of methods that use the data.
    """
    study_units = []
    for unit in plan.units:
        component = plan.family.component(unit.component)
        groups: dict[tuple[str, str], list[PlanRow]] = {}
        for row in unit.rows:
            assert row.rule is not None
            bare_rule = row.rule.model_copy(update={"blocks": None, "role": None, "store": "packed"})
            role = component.roles[row.linear]
            groups.setdefault((role, bare_rule.model_dump_json()), []).append(replace(row, rule=bare_rule))
        for (_, rule), rows in groups.items():
            assert rows[0].rule is not None
            method = METHODS[rows[0].rule.method]
            key_fields: dict[str, Any] = {
                "source": source,
                "linears": [row.module for row in rows],
                "rule": json.loads(rule),
                "versions": [VERSION, calibrate.VERSION, method.VERSION],
                "calibration": calibration if rows[0].rule.needs_data else None,
            }
            study_units.append(StudyUnit(0, unit.component, unit.block, tuple(rows), digest(key_fields)[:32]))
    return tuple(study_units)


class UnitStore:
    """A folder of finished units; files are written atomically."""

    def __init__(self, folder: Path) -> None:
        make_folder(folder)
        self._workdir = Workdir(folder, "study")

    def has(self, unit: StudyUnit) -> bool:
        """Whether the unit is quantized already."""
        return (self._workdir.path / unit.file).exists()

    def write(self, unit: StudyUnit, result: UnitResult) -> None:
        """Store a finished unit."""
        self._workdir.commit(unit, result)

    def remove(self, unit: StudyUnit) -> None:
        """Delete a unit, so that it is quantized again."""
        (self._workdir.path / unit.file).unlink(missing_ok=True)

    def read(self, unit: Unit, device: torch.device | str = "cpu") -> UnitResult:
        """Read a finished unit, with its tensors on `device`. Raises DamagedUnitError if its file is damaged."""
        return self._workdir.read(unit, device)

    @property
    def workdir(self) -> Workdir:
        """The folder as a Workdir, for calibration."""
        return self._workdir


def quantize(
    plan: Plan,
    checkpoint: Checkpoint,
    store: UnitStore,
    units: Sequence[StudyUnit],
    batches: Callable[[], Sequence[Batch]],
    device: Device,
) -> int:
    """Quantize the units that the store lacks; returns their number.

    plan: any plan of this checkpoint, for its family, recipe and memory. batches: returns the calibration data; called
    only if a unit needs it.
    """
    missing = [unit for unit in units if not store.has(unit)]
    with ThreadPoolExecutor(2) as pool:
        io = BlockIO(replace(plan, units=()), checkpoint, store.workdir, device, ignore, pool)
        for component in plan.family.components:
            component_units = [unit for unit in missing if unit.component == component.name]
            inputs = batches() if any(unit.needs_statistics for unit in component_units) else ()
            for block in calibrate.walk(io, component, component_units, inputs, sequential=False):
                assert isinstance(block.unit, StudyUnit)
                targets, folding = calibrate.learned_outputs(block), Folding.start(block)
                store.write(block.unit, calibrate.refined(block, targets, folding, block.quantize()))
                del targets, folding  # the copies of the block and of its outputs
    return len(missing)
