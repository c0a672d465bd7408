"""The work folder: one safetensors file per finished block. The files present are the only record of progress.

A unit file holds for every quantized linear NAME of its block `NAME.codes` (dense bit stream, int32), `NAME.scale` and
`NAME.zero` (asymmetric only), and `altered.TENSOR` for every tensor that a fold changed. Its header holds the job's
fingerprint, the notes, the errors, and a checksum over tensors and header.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from exporter.errors import CheckpointError, WorkdirError
from exporter.events import Event, Listener, notice
from exporter.files.mapping_diff import changes
from exporter.files.strict_json import read_json
from exporter.files.writing import make_folder, write_tensors, write_text
from exporter.numerics.bit_packing import pack_bits, unpack_bits
from exporter.numerics.quantized import QuantizedLinear
from exporter.out_of_memory import is_shortage
from exporter.planning.plan import PlanRow, Unit


@dataclass(frozen=True)
class UnitResult:
    """The result of quantizing one block.

    linears: module name -> quantized linear. errors: module name -> relative error of the linear's output on the
    calibration data (of its weight, for methods without data). notes: messages for the user.
    altered: tensors of the block that stay in 16 bits and were changed by a fold (norms and biases).
    weights: module name -> the weight `[out, in]` that the linear approximates, for rules that round again; not stored.
    """

    linears: Mapping[str, QuantizedLinear]
    errors: Mapping[str, float]
    notes: tuple[str, ...]
    altered: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)


JOB = "job.json"
LOCK = ".mmq-lock"
AGAIN = "run the same command again: it recomputes this block"
READERS = 4  # threads that check files; each thread holds one unit in memory


class DamagedUnitError(WorkdirError):
    """A unit's file is missing or is not what was written; its block must be computed again."""


class Workdir:
    """A folder of unit files that belong to one job."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self.fingerprint = fingerprint

    @classmethod
    def open(cls, path: Path, inputs: Mapping[str, Any]) -> "Workdir":
        """Create the folder, or resume it when it belongs to the same job.

        inputs: everything that determines the results. WorkdirError lists every difference from the folder's own
        inputs.
        """
        make_folder(path)
        if (path / JOB).exists():
            _refuse_changes(path, inputs)
        elif any(child.name != LOCK for child in path.iterdir()):
            raise WorkdirError(f"{path} is not empty and is not an mmq work folder", "choose another --work folder")
        else:
            write_text(path / JOB, _job_text(inputs))
        for leftover in path.glob(".*.tmp"):  # incomplete file of a killed run
            leftover.unlink()
        return cls(path, fingerprint_of(inputs))

    def clear(self) -> None:
        """Delete all finished blocks."""
        for path in self.path.glob("*.safetensors"):
            path.unlink()

    def drop_damaged(self, units: Sequence[Unit], on_event: Listener) -> None:
        """Delete the files of finished units whose content fails the checksum, so that the blocks are recomputed."""
        finished = [unit for unit in units if (self.path / unit.file).exists()]
        with ThreadPoolExecutor(READERS) as pool:
            for number, damage in enumerate(pool.map(self._find_damage, finished), 1):
                on_event(Event("check", number, len(finished), finished[number - 1].block))
                if damage:
                    (self.path / finished[number - 1].file).unlink()
                    on_event(notice(f"{damage}; this block is recomputed"))

    def commit(self, unit: Unit, result: UnitResult) -> None:
        """Store a finished block atomically; WorkdirError when the file cannot be written."""
        tensors: dict[str, Tensor] = {}
        for name, linear in result.linears.items():
            tensors[f"{name}.codes"] = pack_bits(linear.codes, linear.scheme.bits).cpu()
            tensors[f"{name}.scale"] = linear.scale
            if not linear.scheme.symmetric:
                tensors[f"{name}.zero"] = linear.zero
            if linear.scheme.number == "nvfp4":
                tensors[f"{name}.factor"] = torch.tensor([linear.scale_factor])
        tensors |= {f"altered.{name}": tensor for name, tensor in result.altered.items()}
        summary = json.dumps({"errors": dict(result.errors), "notes": list(result.notes)}, sort_keys=True)
        stored = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        checked = {"fingerprint": self.fingerprint, "result": summary}
        try:
            write_tensors(self.path / unit.file, stored, checked | {"checksum": checksum(checked, stored)})
        except CheckpointError as error:
            raise WorkdirError(error.message, "free disk space and run the same command again: it resumes") from None

    def done(self, units: tuple[Unit, ...]) -> int:
        """The number of leading units that are finished."""
        for i, unit in enumerate(units):
            if not (self.path / unit.file).exists():
                return i
        return len(units)

    def read(self, unit: Unit, device: torch.device | str = "cpu") -> UnitResult:
        """A finished block with its tensors on `device`; DamagedUnitError when its file is missing or damaged."""
        summary, stored = self._read_checked(unit)
        tensors = {name: tensor.to(device) for name, tensor in stored.items()}
        linears = {row.module: _read_linear(tensors, row) for row in unit.rows}
        prefix = "altered."
        altered = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
        return UnitResult(linears, summary["errors"], tuple(summary["notes"]), altered)

    def read_notes(self, unit: Unit) -> tuple[dict[str, float], list[str]]:
        """The errors and notes of a finished block, without reading its tensors."""
        with self._opened(unit) as (_, metadata):
            summary = json.loads(metadata["result"])
            return summary["errors"], summary["notes"]

    def _find_damage(self, unit: Unit) -> str:
        """The problem with a finished unit's file; empty when it is intact."""
        try:
            self._read_checked(unit)
        except DamagedUnitError as error:
            return error.message
        return ""

    def _read_checked(self, unit: Unit) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Errors and notes of a finished unit, and its tensors on the CPU as stored; DamagedUnitError when damaged."""
        with self._opened(unit) as (file, metadata):
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            expected = metadata.pop("checksum")
            if checksum(metadata, stored) != expected:
                raise DamagedUnitError(f"{self.path / unit.file} is damaged: its checksum is wrong", AGAIN)
            if not {f"{row.module}.codes" for row in unit.rows} <= stored.keys():
                raise DamagedUnitError(f"{self.path / unit.file} is damaged: it holds another block", AGAIN)
            return json.loads(metadata["result"]), stored

    @contextmanager
    def _opened(self, unit: Unit) -> Iterator[tuple[Any, dict[str, str]]]:
        """A unit's open file and its metadata; every read error but a lack of memory becomes a WorkdirError."""
        path = self.path / unit.file
        if path.exists() and not path.is_file():  # reading a pipe might never end
            raise WorkdirError(f"{path} is not a regular file", "delete it, and run the same command again")
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                if metadata.get("fingerprint") != self.fingerprint:
                    raise DamagedUnitError(f"{path} belongs to another job", AGAIN)
                yield file, metadata
        except (SafetensorError, FileNotFoundError, KeyError, ValueError) as error:
            if is_shortage(error):
                raise
            raise DamagedUnitError(f"{path} is damaged ({error})", AGAIN) from None
        except OSError as error:  # no evidence of damage
            raise WorkdirError(f"{path} cannot be read ({error})", "run the same command again: it resumes") from error


def fingerprint_of(inputs: Mapping[str, Any]) -> str:
    """The fingerprint of a job: sha256 of its inputs."""
    return hashlib.sha256(_job_text(inputs).encode()).hexdigest()


def _job_text(inputs: Mapping[str, Any]) -> str:
    return json.dumps(inputs, indent=1, sort_keys=True)


def _refuse_changes(path: Path, inputs: Mapping[str, Any]) -> None:
    """WorkdirError that lists every difference, unless the folder's job had the same inputs."""
    hint = f"undo the change to resume, or start over: choose another --work folder, or delete {path}"
    try:
        before = read_json(path / JOB)
    except CheckpointError as error:
        raise WorkdirError(f"{error.message}: the job of the blocks in {path} is unknown", hint) from None
    lines = changes(before, json.loads(_job_text(inputs)))
    if lines:
        listed = "".join(f"\n  {line}" for line in lines)
        raise WorkdirError(f"{path} holds finished blocks of another job:{listed}", hint)


def checksum(texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """sha256 over texts, and over name, dtype, shape and bytes of every tensor (on the CPU, contiguous)."""
    names = sorted(tensors)
    with ThreadPoolExecutor(READERS) as pool:
        hashes = list(pool.map(lambda name: _tensor_hash(tensors[name]), names))
    described = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    return hashlib.sha256(json.dumps([dict(texts), described, hashes], sort_keys=True).encode()).hexdigest()


def _tensor_hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().data).hexdigest()


def _read_linear(tensors: Mapping[str, Tensor], row: PlanRow) -> QuantizedLinear:
    """One quantized linear from a unit's tensors: codes `[out, in]`, scale and zero `[out, groups]`."""
    scheme = row.scheme
    assert scheme is not None
    codes = unpack_bits(tensors[f"{row.module}.codes"], scheme.bits, row.tensor.shape[1])
    scale = tensors[f"{row.module}.scale"]
    if scheme.symmetric:
        zero = torch.full(scale.shape, scheme.zero_code, dtype=torch.uint8, device=scale.device)
    else:
        zero = tensors[f"{row.module}.zero"]
    factor = float(tensors[f"{row.module}.factor"]) if scheme.number == "nvfp4" else 0.0
    return QuantizedLinear(scheme, codes, scale, zero, factor)
