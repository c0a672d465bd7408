"""The artifact: packed units and untouched source tensors in one folder that an engine opens; and reading it back.

Everything is written into a temporary folder beside the destination and renamed when it is complete.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from exporter.artifact.artifact_config import artifact_config
from exporter.artifact.artifact_tensors import write_tensors
from exporter.artifact.manifest import (
    MANIFEST,
    Manifest,
    Provenance,
    RecipeIdentity,
    SizeRecord,
    SourceRecord,
    as_line,
    read_manifest,
    write_manifest,
)
from exporter.artifact.output import put_in_place, temporary_folder
from exporter.distribution import PROGRAM, installed_version
from exporter.errors import ArtifactError
from exporter.events import Listener
from exporter.files.file_hashes import sha256
from exporter.files.shard_writer import SHARD_BYTES, sync_folder
from exporter.files.writing import disk_error, write_text
from exporter.formats import FORMATS, read_groups
from exporter.formats.group import Group
from exporter.model.checkpoint import Checkpoint
from exporter.model.families import FAMILIES, Family
from exporter.model.processor_files import processor_files
from exporter.numerics.activation_rounding import ServedRounding
from exporter.numerics.quantized import QuantizedLinear, Scheme
from exporter.planning.plan import Plan
from exporter.planning.vllm_rules import matches
from exporter.quantization.workdir import Workdir

REPORT = "mmq_report.json"
CACHE_SCALES = (".k_scale", ".v_scale")
COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*")
NOT_COPIED = {"config.json", "model.safetensors.index.json", MANIFEST, REPORT, "adapter_config.json"}
PACKAGES = (PROGRAM, "torch", "transformers", "safetensors", "tokenizers", "numpy", "pillow")


def write(
    plan: Plan,
    checkpoint: Checkpoint,
    workdir: Workdir,
    out: Path,
    provenance: Mapping[str, Any],
    on_event: Listener,
    device: torch.device,
    check: Callable[[Path], None] = lambda folder: None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the artifact to `out`, with `overwrite` over another one (CheckpointError when a source is bad).

    provenance: of calibration data and device, for the manifest. device: where codes are packed.
    check: called with the complete folder before it gets its name; what it raises leaves `out` as it was.
    """
    temporary = temporary_folder(out)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        written = write_tensors(plan, checkpoint, workdir, temporary, device, on_event, shard_bytes)
        _write_texts(plan, checkpoint, temporary)
        texts = sorted(path.name for path in temporary.iterdir() if path.name not in written.files)
        files = {**written.files, **{name: sha256(temporary / name) for name in texts}}
        made = Provenance.model_validate(provenance, strict=False)  # its lists become tuples
        source = SourceRecord(
            model=as_line(plan.origin),
            digest=checkpoint.digest(on_event),
            shards=checkpoint.shard_hashes(),
            processor=processor_files(checkpoint.folder),
            adapter=checkpoint.adapter.name if checkpoint.adapter else None,
        )
        write_manifest(temporary, _manifest(plan, workdir, written.digests, source, made, files, tuple(written.files)))
        with ThreadPoolExecutor(1, "sync") as pool:
            synced = pool.submit(sync_folder, temporary)  # the check reads the page cache meanwhile
            check(temporary)
            synced.result()
        put_in_place(temporary, out, overwrite)
    except OSError as error:
        raise disk_error(out, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_texts(plan: Plan, checkpoint: Checkpoint, folder: Path) -> None:
    write_text(folder / "config.json", json.dumps(artifact_config(plan, checkpoint.config), indent=2) + "\n")
    for pattern in COPIED:
        for path in sorted(checkpoint.folder.glob(pattern)):
            if path.name not in NOT_COPIED and path.is_file():
                shutil.copyfile(path, folder / path.name)
    write_text(folder / "recipe.yaml", yaml.safe_dump(plan.recipe.model_dump(mode="json"), sort_keys=False))


def _manifest(
    plan: Plan,
    workdir: Workdir,
    digests: dict[str, str],
    source: SourceRecord,
    provenance: Provenance,
    files: dict[str, str],
    shards: Sequence[str],
) -> Manifest:
    results = [workdir.read_notes(unit) for unit in plan.units]
    return Manifest(
        family=plan.family.name,
        format=plan.recipe.format,
        recipe=RecipeIdentity(name=plan.recipe.name, sha256=plan.recipe.digest()),
        source=source,
        provenance=provenance,
        files=files,
        linears=digests,
        errors={name: error for errors, _ in results for name, error in errors.items()},
        units=tuple(unit.block for unit in plan.units),
        bytes=SizeRecord(before=plan.bytes_before, after=plan.bytes_after),
        bits_per_weight=plan.bits_per_weight,
        versions={name: installed_version(name) or "absent" for name in PACKAGES},
        shards=tuple(shards),
        fingerprint=workdir.fingerprint,
        notes=tuple(note for _, notes in results for note in notes),
    )


@dataclass(frozen=True)
class Artifact:
    """A finished artifact, read back: its tensors by checkpoint name, quantized ones unpacked on `device`."""

    checkpoint: Checkpoint
    manifest: Manifest
    groups: tuple[Group, ...]
    device: torch.device

    @classmethod
    def open(cls, folder: Path, device: torch.device | None = None) -> "Artifact":
        """Headers, config and manifest; ArtifactError when the folder is no mmq artifact."""
        manifest = read_manifest(folder)
        checkpoint = Checkpoint.open(folder, origin=folder.name)
        groups = described_groups(manifest.format, checkpoint.config, str(folder))
        return cls(checkpoint, manifest, groups, device or torch.device("cpu"))

    @property
    def family(self) -> Family:
        """The model family."""
        return FAMILIES[self.manifest.family]

    def source_config(self) -> dict[str, Any]:
        """config.json as the source had it: what builds the model that the dequantized tensors go into."""
        return {key: value for key, value in self.checkpoint.config.items() if key != "quantization_config"}

    def names(self) -> list[str]:
        """Checkpoint names of all tensors, as if nothing were packed."""
        inside = self.packed_names()
        whole = [name for name in self.checkpoint.tensors if name not in inside and not name.endswith(CACHE_SCALES)]
        return whole + [f"{module}.weight" for module in self.manifest.linears]

    def packed_names(self) -> set[str]:
        """Names of the stored tensors that stand for packed linears."""
        return {name for module in self.manifest.linears for name in self._stored(module)}

    def scheme_of(self, module: str) -> Scheme:
        """The scheme that the config's patterns give to a module, as the engine will match it."""
        name = self.family.runtime_name(module)
        schemes: set[Scheme] = {g.scheme for g in self.groups if any(matches(target, name) for target in g.targets)}
        if len(schemes) != 1:
            raise ArtifactError(f"config.json gives {name} {len(schemes)} schemes, expected one")
        return schemes.pop()

    def _stored(self, module: str) -> tuple[str, ...]:
        names: tuple[str, ...] = FORMATS[self.manifest.format].tensor_names(module, self.scheme_of(module))
        return names

    def parameters(self) -> int:
        """Parameters of the model that the artifact stands for: weights, never the words that hold several of them."""
        counts = {name: info.size for name, info in self.checkpoint.tensors.items() if not name.endswith(CACHE_SCALES)}
        for module in self.manifest.linears:
            codes, *others = self._stored(module)
            counts[codes] = self.checkpoint.tensors[codes].bytes * 8 // self.scheme_of(module).bits
            for name in others:
                counts.pop(name, None)
        return sum(counts.values())

    @property
    def kv_cache(self) -> str | None:
        """What an engine keeps keys and values in: "fp8", or None for the model's 16 bits."""
        described = (self.checkpoint.config.get("quantization_config") or {}).get("kv_cache_scheme")
        return "fp8" if described else None

    def rounded(self) -> ServedRounding:
        """What an engine rounds while it computes."""
        kinds = {module: self.scheme_of(module).activations for module in self.manifest.linears}
        return ServedRounding(
            {self.family.live_name(name): kind for name, kind in kinds.items() if kind}, self.kv_cache
        )

    def linear(self, module: str) -> QuantizedLinear:
        """One packed linear, unpacked."""
        scheme = self.scheme_of(module)
        tensors = {name: self.checkpoint.read(name).to(self.device) for name in self._stored(module)}
        linear: QuantizedLinear = FORMATS[self.manifest.format].unpack(module, tensors, scheme)
        return linear

    def read(self, name: str) -> Tensor:
        """One tensor by its checkpoint name, as an engine multiplies by it where it is packed."""
        module = name.removesuffix(".weight")
        if module in self.manifest.linears:
            return self.linear(module).as_served()
        return self.checkpoint.read(name)


def described_groups(format_name: str, config: Mapping[str, Any], where: str) -> tuple[Group, ...]:
    """The schemes that an artifact's config.json describes; ArtifactError when they are not of this format.

    where: names the artifact.
    """
    try:
        groups = tuple(read_groups(format_name, config))
        for target in (target for group in groups for target in group.targets):
            re.compile(target.removeprefix("re:"))
    except (LookupError, TypeError, AttributeError, ValueError, re.error) as error:
        said = (
            f"{where}: config.json does not describe weights of format {format_name} ({type(error).__name__}: {error})"
        )
        raise ArtifactError(said, "export the artifact again") from None
    return groups
