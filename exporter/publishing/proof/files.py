"""Check the files and tensors of an artifact: those that an export writes and no others, a usable processor, finite."""

from collections.abc import Iterator
from fnmatch import fnmatch

import torch

from exporter.artifact.artifact import CACHE_SCALES, COPIED, NOT_COPIED, Artifact
from exporter.artifact.artifact_config import cache_scales
from exporter.artifact.manifest_coverage import NEEDED
from exporter.errors import MmqError
from exporter.model.processors.check import check_libraries
from exporter.model.processors.files import processor_files
from exporter.model.processors.served_template import as_in_source, engine_file
from exporter.planning.plan import Plan
from exporter.publishing.repository import INDEX

AT_MOST = 5  # names in one problem


def file_problems(artifact: Artifact) -> list[str]:
    """One line per group of files that an export would not write, would write differently, or that are missing."""
    return [*_unexpected(artifact), *_of_processor(artifact), *_not_finite(artifact)]


def _unexpected(artifact: Artifact) -> Iterator[str]:
    """Files in the manifest that an export does not write, and a wrong list of weight files."""
    manifest, shards = artifact.manifest, set(artifact.checkpoint.files())
    others = manifest.files.keys() - shards - {*NEEDED, INDEX}
    foreign = {name for name in others if not _is_copied(name) and not name.endswith(".safetensors")}
    if foreign:  # `missing_from_manifest` reports weights that the model does not read
        yield f"the manifest names files that mmq does not write: {_listed(foreign)}"
    if set(manifest.shards) != shards and (manifest.shards or manifest.source.digest):
        yield f"the manifest's shards differ from the weight files: {_listed(set(manifest.shards) ^ shards)}"


def _is_copied(name: str) -> bool:
    """Whether an export copies a file of this name from the source."""
    kept = name not in NOT_COPIED and not name.startswith(".") and "/" not in name
    return kept and any(fnmatch(name, pattern) for pattern in COPIED)


def _of_processor(artifact: Artifact) -> Iterator[str]:
    """Differences between the artifact's processor files and those of the source that an export copies.

    An export inserts the start token into the chat template or adds a template (`served_template`).
    """
    source = {name: file for name, file in artifact.manifest.source.processor.items() if _is_copied(name)}
    if not source and artifact.manifest.source.digest is None:
        return  # an older mmq did not record them
    folder, family = artifact.checkpoint.folder, artifact.family
    stored = processor_files(folder)
    try:
        check_libraries(artifact.checkpoint.changed(config=artifact.source_config()), family, needed=False)
        if engine_file(folder, family):
            yield "its chat template lacks the start token of the training prompts: export the artifact again"
        stored = as_in_source(folder, family, stored, source)
    except MmqError as error:
        yield error.message
    for name in sorted(source.keys() | stored.keys()):
        if name not in stored:
            yield f"{name} of the source is missing: prompts or pictures may be processed otherwise"
        elif source.get(name) != stored[name]:
            yield f"{name} differs from the source's file: prompts or pictures may be processed otherwise"


def _not_finite(artifact: Artifact) -> Iterator[str]:
    """A problem when a floating-point tensor, which includes scales, has values that are not finite."""
    tensors = artifact.checkpoint.tensors
    named = [name for name, info in tensors.items() if info.dtype.is_floating_point and info.dtype.itemsize > 1]
    wrong = {name for name in named if not bool(torch.isfinite(artifact.checkpoint.read(name)).all())}
    if wrong:
        yield f"tensors have values that are not finite: {_listed(wrong)}"


def cache_problems(plan: Plan, artifact: Artifact) -> Iterator[str]:
    """Differences between the stored scales of the KV cache and those that the plan stores, which are 1."""
    expected = set(cache_scales(plan))
    stored = {name for name in artifact.checkpoint.tensors if name.endswith(CACHE_SCALES)}
    if stored != expected:
        yield f"the scales of the KV cache differ from the recipe's: {_listed(stored ^ expected)}"
    wrong = {name for name in stored & expected if not bool((artifact.checkpoint.read(name) == 1).all())}
    if wrong:
        yield f"the scales of the KV cache are not 1: {_listed(wrong)}"


def _listed(names: set[str]) -> str:
    more = f" and {len(names) - AT_MOST} more" if len(names) > AT_MOST else ""
    return ", ".join(sorted(names)[:AT_MOST]) + more
