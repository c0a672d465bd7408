"""The work folder: one file for each finished block. The set of files is the progress; there is no other state.

A unit file holds, for every quantized linear NAME of its block, `NAME.codes` (dense bit stream, int32), `NAME.scale`,
`NAME.zero` (asymmetric only), `altered.TENSOR` for every tensor that a fold changed, and in its header the job's
fingerprint, the notes and the errors.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from exporter.checkpoint import make_folder, write_tensors, write_text
from exporter.errors import CheckpointError, WorkdirError
from exporter.plan import PlanRow, Unit
from exporter.quantized import QuantizedLinear, pack_bits, unpack_bits
from exporter.strict_json import read_json


@dataclass(frozen=True)
class UnitResult:
    """What became of one block.

    linears: module name -> quantized linear. errors: module name -> relative error of its output on the calibration
    data (of its weight, for methods without data). notes: what the user should read.
    altered: tensors of the block that are kept in 16 bits but not as they were (folded norms and biases).
    """

    linears: Mapping[str, QuantizedLinear]
    errors: Mapping[str, float]
    notes: tuple[str, ...]
    altered: Mapping[str, Tensor] = field(default_factory=dict)


JOB = "job.json"


def fingerprint_of(path: Path) -> str:
    """The identity of the job that a work folder belongs to."""
    return hashlib.sha256((path / JOB).read_bytes()).hexdigest()


class Workdir:
    """A folder of unit files that all belong to one job."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self.fingerprint = fingerprint

    @classmethod
    def open(cls, path: Path, inputs: Mapping[str, Any]) -> "Workdir":
        """Create the folder, or resume it when it belongs to the same job.

        inputs: everything that changes the numbers. WorkdirError names the fields that differ.
        """
        text = json.dumps(inputs, indent=1, sort_keys=True)
        fingerprint = hashlib.sha256(text.encode()).hexdigest()
        job = path / JOB
        make_folder(path)
        if job.exists():
            before = read_json(job)
            now = json.loads(text)
            changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
            if changed:
                raise WorkdirError(
                    f"{path} belongs to another job: {', '.join(changed)} differ",
                    "give another --work folder, or delete this one to start over",
                )
        elif any(path.iterdir()):
            raise WorkdirError(f"{path} is not empty and is no mmq work folder", "give another --work folder")
        else:
            write_text(job, text)
        for leftover in path.glob(".*.tmp"):  # a killed run's half-written file
            leftover.unlink()
        return cls(path, fingerprint)

    def commit(self, unit: Unit, result: UnitResult) -> None:
        """Store a finished block, atomically."""
        tensors: dict[str, Tensor] = {}
        for name, linear in result.linears.items():
            tensors[f"{name}.codes"] = pack_bits(linear.codes, linear.scheme.bits).cpu()
            tensors[f"{name}.scale"] = linear.scale
            if not linear.scheme.symmetric:
                tensors[f"{name}.zero"] = linear.zero
        tensors |= {f"altered.{name}": tensor for name, tensor in result.altered.items()}
        said = {"errors": dict(result.errors), "notes": list(result.notes)}
        metadata = {"fingerprint": self.fingerprint, "result": json.dumps(said, sort_keys=True)}
        try:
            write_tensors(self.path / unit.file, tensors, metadata)
        except CheckpointError as error:
            raise WorkdirError(error.message, "free some space and run the same command again: it resumes") from None

    def done(self, units: tuple[Unit, ...]) -> int:
        """How many leading units are finished."""
        for i, unit in enumerate(units):
            if not (self.path / unit.file).exists():
                return i
        return len(units)

    def read(self, unit: Unit, device: torch.device | str = "cpu") -> UnitResult:
        """A finished block, its tensors on `device` (WorkdirError when its file is damaged or foreign)."""
        with self._opened(unit, device) as (file, said):
            linears = {row.module: _read_linear(file, row) for row in unit.rows}
            names = [name for name in file.keys() if name.startswith("altered.")]  # noqa: SIM118 (no mapping)
            altered = {name.removeprefix("altered."): file.get_tensor(name) for name in names}
        return UnitResult(linears, said["errors"], tuple(said["notes"]), altered)

    def read_notes(self, unit: Unit) -> tuple[dict[str, float], list[str]]:
        """The errors and notes of a finished block, without its tensors."""
        with self._opened(unit, "cpu") as (_, said):
            return said["errors"], said["notes"]

    @contextmanager
    def _opened(self, unit: Unit, device: torch.device | str) -> Iterator[tuple[Any, dict[str, Any]]]:
        """A unit's file and what its header says; whatever is wrong with it becomes a WorkdirError."""
        path = self.path / unit.file
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if metadata.get("fingerprint") != self.fingerprint:
                    raise WorkdirError(f"{path} belongs to another job", "delete the file and run again")
                yield file, json.loads(metadata["result"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise WorkdirError(f"{path} is damaged ({error})", "delete the file and run again: it resumes") from None


def _read_linear(file: Any, row: PlanRow) -> QuantizedLinear:
    """One linear of an opened unit file: codes `[out, in]`, scale and zero `[out, groups]`."""
    scheme = row.scheme
    assert scheme is not None
    codes = unpack_bits(file.get_tensor(f"{row.module}.codes"), scheme.bits, row.tensor.shape[1])
    scale = file.get_tensor(f"{row.module}.scale")
    if scheme.symmetric:
        middle = 0 if scheme.number == "fp8" else scheme.middle
        zero = torch.full(scale.shape, middle, dtype=torch.uint8, device=scale.device)
    else:
        zero = file.get_tensor(f"{row.module}.zero")
    return QuantizedLinear(scheme, codes, scale, zero)
