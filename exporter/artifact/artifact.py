"""Write an artifact folder (packed linears, unchanged source tensors, config.json, manifest) and open it.

`write` completes a temporary folder beside the destination and then renames it.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from exporter.artifact.artifact_config import artifact_config
from exporter.artifact.artifact_tensors import write_tensors
from exporter.artifact.manifest import (
    MANIFEST,
    ComponentSize,
    Manifest,
    PromptRecord,
    Provenance,
    RecipeIdentity,
    SizeRecord,
    SourceRecord,
    as_line,
    read_manifest,
    write_manifest,
)
from exporter.artifact.output_folder import put_in_place, temporary_folder
from exporter.artifact.recorded_prompts import with_recorded_prompts
from exporter.distribution import PROGRAM, installed_version
from exporter.errors import ArtifactError
from exporter.events import Listener
from exporter.files.file_hashes import sha256
from exporter.files.shard_writer import SHARD_BYTES, sync_folder
from exporter.files.writing import disk_error, write_text
from exporter.formats import FORMATS, read_groups
from exporter.formats.config_group import ConfigGroup
from exporter.model.checkpoint import Checkpoint
from exporter.model.families import FAMILIES, Family
from exporter.model.processors.files import processor_files
from exporter.model.processors.served_template import ship_template
from exporter.numerics.activation_rounding import ServedRounding
from exporter.numerics.kv_caches import BY_FLAG
from exporter.numerics.quantized import QuantizedLinear, Scheme
from exporter.planning.plan import Plan
from exporter.planning.prompts import prompts_by_task
from exporter.planning.recipe import Recipe
from exporter.planning.recipe_file import load_recipe
from exporter.planning.vllm_rules import matches
from exporter.quantization.workdir import Workdir

REPORT = "mmq_report.json"
OTHER_TENSORS = "other tensors"  # those of no component
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
    """Write the artifact to `out` (CheckpointError when a source tensor is not finite).

    provenance: calibration data and device, for the manifest. device: device that packs the codes.
    check: called with the complete folder before the rename; an exception from it leaves `out` unchanged.
    overwrite: whether the artifact may replace another one in `out`.
    """
    temporary = temporary_folder(out)
    try:
        temporary.mkdir(parents=True)
        written = write_tensors(plan, checkpoint, workdir, temporary, device, on_event, shard_bytes)
        _write_texts(plan, checkpoint, temporary)
        texts = sorted(path.name for path in temporary.iterdir() if path.name not in written.files)
        files = {**written.files, **{name: sha256(temporary / name) for name in texts}}
        record = Provenance.model_validate(provenance, strict=False)  # converts lists to tuples
        source = SourceRecord(
            model=as_line(plan.origin),
            digest=checkpoint.digest(on_event),
            shards=checkpoint.shard_hashes(),
            processor=processor_files(checkpoint.folder),
            adapter=checkpoint.adapter.name if checkpoint.adapter else None,
        )
        write_manifest(
            temporary, _manifest(plan, workdir, written.digests, source, record, files, tuple(written.files))
        )
        with ThreadPoolExecutor(1, "sync") as pool:
            sync = pool.submit(sync_folder, temporary)  # meanwhile the check reads from the page cache
            check(temporary)
            sync.result()
        put_in_place(temporary, out, overwrite)
    except OSError as error:
        raise disk_error(out, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_texts(plan: Plan, checkpoint: Checkpoint, folder: Path) -> None:
    """Write config.json, recipe.yaml and the chat template, and copy tokenizer, processor and license files."""
    write_text(folder / "config.json", json.dumps(artifact_config(plan, checkpoint.config), indent=2) + "\n")
    for pattern in COPIED:
        for path in sorted(checkpoint.folder.glob(pattern)):
            if path.name not in NOT_COPIED and path.is_file():
                shutil.copyfile(path, folder / path.name)
    ship_template(checkpoint.folder, folder, plan.family)
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
        recipe=_identity(plan.recipe),
        source=source,
        provenance=provenance,
        files=files,
        linears=digests,
        errors={name: error for errors, _ in results for name, error in errors.items()},
        units=tuple(unit.block for unit in plan.units),
        bytes=size_record(plan),
        bits_per_weight=plan.bits_per_weight,
        versions={name: installed_version(name) or "absent" for name in PACKAGES},
        shards=tuple(shards),
        fingerprint=workdir.fingerprint,
        notes=(*plan.fallbacks, *(note for _, notes in results for note in notes)),
        prompts={task: PromptRecord(**record) for task, record in prompts_by_task(plan.family).items()},
        kv_cache=plan.recipe.kv_cache if plan.recipe.kv_cache in BY_FLAG else None,
    )


def size_record(plan: Plan) -> SizeRecord:
    """Bytes of all tensors and of each component, as the plan predicts them."""
    components = {}
    for name in (*(component.name for component in plan.family.components), ""):
        if rows := plan.of(name):
            components[name or OTHER_TENSORS] = ComponentSize(
                before=sum(row.tensor.bytes for row in rows),
                after=sum(row.bytes_after for row in rows),
                kept=sum(row.bytes_after for row in rows if row.decision == "kept"),
            )
    return SizeRecord(before=plan.bytes_before, after=plan.bytes_after, components=components)


def _identity(recipe: Recipe) -> RecipeIdentity:
    overrides = {as_line(key): as_line(value) for key, value in recipe.overrides.items()}
    return RecipeIdentity(name=recipe.name, sha256=recipe.digest(), overrides=overrides)


@dataclass(frozen=True)
class Artifact:
    """A finished artifact, opened for reading: tensors by checkpoint name, quantized linears unpacked on `device`."""

    checkpoint: Checkpoint
    manifest: Manifest
    groups: tuple[ConfigGroup, ...]
    device: torch.device

    def __post_init__(self) -> None:
        """ArtifactError when config.json does not describe a model of the manifest's family."""
        _, problems = FAMILIES[self.manifest.family].read(self.checkpoint.config)
        if problems:
            message = f"{self.checkpoint.origin}: config.json does not describe the model: {problems[0]}"
            raise ArtifactError(message, "export the artifact again")

    @classmethod
    def open(cls, folder: Path, device: torch.device | None = None) -> "Artifact":
        """Read headers, config and manifest; ArtifactError when the folder is not an mmq artifact."""
        manifest = read_manifest(folder)
        checkpoint = Checkpoint.open(folder, origin=folder.name)
        groups = described_groups(manifest.format, checkpoint.config, str(folder))
        return cls(checkpoint, manifest, groups, device or torch.device("cpu"))

    @cached_property
    def family(self) -> Family:
        """The model family, with the components of the model's parts and the prompts of the export."""
        return with_recorded_prompts(FAMILIES[self.manifest.family].of(self.checkpoint.config), self.manifest)

    def recipe(self) -> Recipe:
        """The recipe of the export. RecipeError when the folder has none."""
        return load_recipe(str(self.checkpoint.folder / "recipe.yaml"))

    def source_config(self) -> dict[str, Any]:
        """config.json without its quantization config; it builds the model for the dequantized tensors."""
        return {key: value for key, value in self.checkpoint.config.items() if key != "quantization_config"}

    def names(self) -> list[str]:
        """Checkpoint names of all tensors of the dequantized model."""
        packed = self.packed_names()
        plain = [name for name in self.checkpoint.tensors if name not in packed and not name.endswith(CACHE_SCALES)]
        return plain + [f"{module}.weight" for module in self.manifest.linears]

    def packed_names(self) -> set[str]:
        """Names of the stored tensors of all packed linears: codes, scales and zero points."""
        return {name for module in self.manifest.linears for name in self._stored(module)}

    def scheme_of(self, module: str) -> Scheme:
        """Scheme of a module, matched against the patterns of config.json as vLLM matches them.

        ArtifactError when no scheme or several schemes match.
        """
        name = self.family.runtime_name(module)
        schemes: set[Scheme] = {g.scheme for g in self.groups if any(matches(target, name) for target in g.targets)}
        if len(schemes) != 1:
            raise ArtifactError(f"config.json has {len(schemes)} schemes for {name}; expected one")
        return schemes.pop()

    def _stored(self, module: str) -> tuple[str, ...]:
        names: tuple[str, ...] = FORMATS[self.manifest.format].tensor_names(module, self.scheme_of(module))
        return names

    def parameters(self) -> int:
        """Number of parameters of the dequantized model; one for each weight, not for each word of packed weights."""
        counts = {name: info.size for name, info in self.checkpoint.tensors.items() if not name.endswith(CACHE_SCALES)}
        for module in self.manifest.linears:
            codes, *others = self._stored(module)
            counts[codes] = self.checkpoint.tensors[codes].bytes * 8 // self.scheme_of(module).bits
            for name in others:
                counts.pop(name, None)
        return sum(counts.values())

    @property
    def kv_cache(self) -> str | None:
        """Number type of the KV cache, as in `Recipe.kv_cache`; None for the model's 16-bit dtype."""
        described = (self.checkpoint.config.get("quantization_config") or {}).get("kv_cache_scheme")
        return "fp8" if described else self.manifest.kv_cache

    def rounded(self) -> ServedRounding:
        """Rounding of activations and KV cache that vLLM applies while it computes."""
        kinds = {module: self.scheme_of(module).input_rounding for module in self.manifest.linears}
        return ServedRounding(
            {self.family.live_name(name): kind for name, kind in kinds.items() if kind}, self.kv_cache
        )

    def linear(self, module: str) -> QuantizedLinear:
        """Unpack one packed linear."""
        scheme = self.scheme_of(module)
        tensors = {name: self.checkpoint.read(name).to(self.device) for name in self._stored(module)}
        linear: QuantizedLinear = FORMATS[self.manifest.format].unpack(module, tensors, scheme)
        return linear

    def read(self, name: str) -> Tensor:
        """Read one tensor by its checkpoint name; a packed weight is dequantized as vLLM serves it."""
        module = name.removesuffix(".weight")
        if module in self.manifest.linears:
            return self.linear(module).as_served()
        return self.checkpoint.read(name)


def described_groups(format_name: str, config: Mapping[str, Any], where: str) -> tuple[ConfigGroup, ...]:
    """Read the schemes from an artifact's config.json; ArtifactError when they do not fit the format.

    where: name of the artifact for the error.
    """
    try:
        groups = tuple(read_groups(format_name, config))
        for target in (target for group in groups for target in group.targets):
            re.compile(target.removeprefix("re:"))
    except (LookupError, TypeError, AttributeError, ValueError, re.error) as error:
        raise ArtifactError(
            f"{where}: config.json does not describe weights of format {format_name} ({type(error).__name__}: {error})",
            "export the artifact again",
        ) from None
    return groups
